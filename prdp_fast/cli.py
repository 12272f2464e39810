"""The command line: `prdp SUBCOMMAND ...`.

A subcommand is a module with `add_arguments(parser)` and `run(args) -> int`, imported when it is named and not before, so that
`prdp --help` stays quick and a subcommand costs its own libraries only.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from typing import NamedTuple, NoReturn

from prdp_fast.core import environment

environment.prepare()

from prdp_fast.core.errors import UserError
from prdp_fast.core.paths import fault


class Subcommand(NamedTuple):
    module: str
    help: str


SUBCOMMANDS = {
    "train": Subcommand("prdp_fast.train", "finetune a model"),
    "doctor": Subcommand("prdp_fast.commands.doctor", "examine this machine before the first job"),
    "compile": Subcommand("prdp_fast.commands.compile", "compile a job's denoisers before it starts"),
    "shards": Subcommand("prdp_fast.commands.shards", "build, describe and verify prompt sets"),
    "embed": Subcommand("prdp_fast.commands.embed", "store the text embeddings of a prompt set"),
    "serve-reward": Subcommand("prdp_fast.commands.serve_reward", "serve a reward over HTTP"),
    "evaluate": Subcommand("prdp_fast.commands.evaluate", "score a run or a model on held prompts"),
    "checkpoint": Subcommand("prdp_fast.commands.checkpoint", "list and verify a run's checkpoints"),
    "study": Subcommand("prdp_fast.commands.study", "run and compare several recipes over several seeds"),
    "report": Subcommand("prdp_fast.commands.report", "table, curves and page of a run, or of several"),
    "watch": Subcommand("prdp_fast.commands.watch", "follow a run in the terminal"),
}


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, like every other error here."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see '{self.prog} --help'\n")


def _overview(subcommands: dict[str, Subcommand]) -> argparse.ArgumentParser:
    """The parser of the first word. The rest is parsed by the subcommand's own, once it is known which one."""
    width = max(map(len, subcommands), default=0) + 2
    listed = "".join(f"\n  {name:{width}}{subcommand.help}" for name, subcommand in subcommands.items())
    parser = _Parser(
        prog="prdp",
        usage="prdp [-h] SUBCOMMAND ...",
        description=f"Finetune text-to-image diffusion models on rewards.\n\nsubcommands:{listed}",
        epilog="'prdp SUBCOMMAND --help' says more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("subcommand", metavar="SUBCOMMAND", help=argparse.SUPPRESS)
    return parser


def _dispatch(arguments: list[str]) -> int:
    subcommands = SUBCOMMANDS
    parser = _overview(subcommands)
    name = parser.parse_args(arguments[:1]).subcommand
    if name not in subcommands:
        near = get_close_matches(name, subcommands, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"subcommand {name!r} is unknown; expected one of {', '.join(subcommands)}{hint}")
    module = import_module(subcommands[name].module)
    subparser = _Parser(
        prog=f"prdp {name}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(subparser)
    return module.run(subparser.parse_args(arguments[1:]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns: the exit status; 0 all right, 1 the check that was asked for found faults, 2 a mistake that the user can mend."""
    try:
        status = _dispatch(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()
        return status
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except OSError as error:
        if isinstance(error, BrokenPipeError):  # `prdp ... | head` has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is still buffered has nowhere to go at exit
            return 0
        if error.filename is None:  # not of a file
            raise
        print(f"error: {fault(error)}; check the path and its permissions", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        return 130


if __name__ == "__main__":
    sys.exit(main())
