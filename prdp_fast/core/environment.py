"""What has to be in place before anything heavy is imported. The entry points call `prepare` first."""

from __future__ import annotations

import os
import sys
from pathlib import Path

_set_here: dict[str, str] = {}


def prepare() -> None:
    """Set the variables that libraries read when they are imported, and let a clone find its `prdp_kernels`."""
    local_ranks = int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 1)
    # One thread pool per rank: without this every rank would start a thread for every core.
    _set_default("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // local_ranks)))
    # transformers and diffusers log while they are imported.
    _set_default("TRANSFORMERS_VERBOSITY", "error")
    _set_default("DIFFUSERS_VERBOSITY", "error")
    _find_kernels()


def before_prepare() -> dict[str, str]:
    """The environment without what `prepare` set, for a launcher whose ranks call `prepare` themselves.

    This process may use every core. If the ranks inherited its OMP_NUM_THREADS, each of them would do so too.
    """
    return {name: value for name, value in os.environ.items() if _set_here.get(name) != value}


def _set_default(name: str, value: str) -> None:
    if name not in os.environ:
        os.environ[name] = _set_here[name] = value


def _find_kernels() -> None:
    """Put a clone's `kernels/` on the path: without an installation nothing else does.

    It comes before installed packages, so that the two packages of a clone are used together.
    """
    folder = Path(__file__).resolve().parents[2] / "kernels"
    if (folder / "prdp_kernels").is_dir() and str(folder) not in sys.path:
        sys.path.insert(1, str(folder))
