"""Checkpoints that a crash cannot spoil, and the run directory they live in.

A checkpoint is written into a hidden sibling and renamed when it is whole, so a directory called `epoch-000010` is always usable.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prdp_fast.errors import UserError
from prdp_fast.files import write_json

STATE = "state.json"
RUN = "run.json"
SUMMARY = "summary.json"

# What a resumed run may change: how long it goes on and what it keeps, never what an epoch computes.
MAY_CHANGE = (
    "schedule.epochs", "schedule.time_limit_minutes", "schedule.on_failure", "schedule.max_repeats", "checkpoint.every",
    "checkpoint.keep", "model.push_to_hub",
)  # fmt: skip


class Checkpoints:
    """The last `keep` checkpoints of one run."""

    def __init__(self, run_directory: Path, *, keep: int, is_main: bool, barrier: Callable[[], None]) -> None:
        self.directory = run_directory / "checkpoints"
        self.keep, self.is_main, self.barrier = keep, is_main, barrier
        if is_main:
            self.directory.mkdir(parents=True, exist_ok=True)
            for leftover in self.directory.glob(".*.partial"):
                shutil.rmtree(leftover)
        barrier()

    def all(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        return sorted(path for path in self.directory.glob("epoch-*") if (path / STATE).is_file())

    def latest(self) -> Path | None:
        return next(reversed(self.all()), None)

    def save(self, epoch: int, save_engine: Callable[[Path], None], state: dict[str, Any]) -> None:
        """Every rank calls this.

        Args:
            epoch: epochs finished; also the data position, for the prompts of an epoch depend on its number alone.
            save_engine: writes this rank's shard into a directory.
            state: JSON of everything else a resumed run needs.
        """
        final = self.directory / f"epoch-{epoch:06d}"
        partial = self.directory / f".{final.name}.partial"
        if final.exists():  # a finished run resumed, or a stop right after a periodic checkpoint: nothing is newer
            return
        if self.is_main:
            partial.mkdir()
        self.barrier()
        save_engine(partial)
        self.barrier()
        if self.is_main:
            write_json(partial / STATE, state | {"epoch": epoch})
            for path in partial.rglob("*"):  # the rename must not reach the disk before the data
                if path.is_file():
                    with path.open("rb") as file:
                        os.fsync(file.fileno())
            partial.rename(final)
            for old in self.all()[: -self.keep]:
                # Renamed first: a crash in the middle of the removal must not leave a checkpoint that looks whole.
                doomed = old.with_name(f".{old.name}.partial")
                old.rename(doomed)
                shutil.rmtree(doomed)
        self.barrier()


def read_state(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / STATE).read_text())


def claim_run_directory(directory: Path, job: dict[str, Any], resume: str) -> None:
    """Make `directory` this job's, or refuse it.

    Args:
        job: resolved recipe, DeepSpeed configuration and rank count, as JSON.
        resume: "auto" continues the same job's run, "never" wants a directory without one.
    Raises: UserError; nothing in the directory is touched then.
    """
    record = directory / RUN
    if not record.exists():
        if directory.is_dir() and any(directory.iterdir()):
            raise UserError(f"--output {directory} is not empty and holds no run of prdp_fast; choose a new directory")
        directory.mkdir(parents=True, exist_ok=True)
        write_json(record, job)
        return
    if resume == "never":
        raise UserError(f"--output {directory} holds a run already; choose another directory, or continue it with --resume auto")
    difference = first_difference(json.loads(record.read_text()), json.loads(json.dumps(job)))
    if difference:
        raise UserError(f"--output {directory} holds another run: {difference}; choose another directory, or give the same job")
    write_json(record, job)


def first_difference(old: Any, new: Any, place: str = "") -> str | None:
    """The first setting in which two jobs differ, as 'schedule.epochs was 3, now 4'; None if they may share a directory."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            found = first_difference(old.get(key), new.get(key), f"{place}.{key}" if place else key)
            if found:
                return found
        return None
    allowed = place.removeprefix("recipe.") in MAY_CHANGE
    return None if old == new or allowed else f"{place} was {old!r}, now {new!r}"
