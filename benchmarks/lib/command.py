"""What the command lines of all measurements share."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from prdp_fast.core import distributed
from prdp_fast.core.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def module_name(file: str) -> str:
    """benchmarks.epoch.profile, from the `__file__` of that script: as `python -m` takes it."""
    return ".".join(Path(file).resolve().relative_to(ROOT).with_suffix("").parts)


def environment() -> dict[str, str]:
    """This process's environment for a child: with the packages of this repository first on the child's import path."""
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def words(arguments: list[str] | None) -> list[str]:
    """The command line behind `main(arguments)`."""
    return sys.argv[1:] if arguments is None else arguments


def parser_of(description: str | None) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_job_options(parser: argparse.ArgumentParser) -> None:
    """How the measured job is changed."""
    parser.add_argument("--config", default="zero2.json", help="DeepSpeed JSON, as for training")
    add_overrides(parser)


def add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE")


def add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, help="JSON: the numbers, and the machine, versions, commit and command")


def add_local_rank(parser: argparse.ArgumentParser) -> None:
    """The option that DeepSpeed's launcher adds to every rank's command."""
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)


def run(measure: Callable[[], int]) -> int:
    """measure(), on OMP_NUM_THREADS threads. A UserError becomes one line and exit status 2.

    Returns: the exit status.
    """
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    try:
        return measure()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        distributed.shutdown()
