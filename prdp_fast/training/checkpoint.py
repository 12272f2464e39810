"""Checkpoints that a crash cannot spoil.

A checkpoint is written into a hidden sibling and renamed when it is whole, so a directory called `epoch-000010` is always usable.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from prdp_fast.core import distributed
from prdp_fast.core.files import read_json, write_json
from prdp_fast.core.run_directory import CHECKPOINTS
from prdp_fast.training.state import TrainState

STATE = "state.json"


class Checkpoints:
    """The last `keep` checkpoints of one run."""

    def __init__(self, run_directory: Path | None, *, keep: int) -> None:
        """Every rank calls this. run_directory: None keeps none."""
        self.directory = None if run_directory is None else run_directory / CHECKPOINTS
        self.keep = keep
        if self.directory is not None and distributed.is_main():
            self.directory.mkdir(parents=True, exist_ok=True)
            for leftover in self.directory.glob(".*.partial"):
                shutil.rmtree(leftover)
        distributed.barrier()

    def all(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        if self.directory is None:
            return []
        return sorted(path for path in self.directory.glob("epoch-*") if (path / STATE).is_file())

    def latest(self) -> Path | None:
        return next(reversed(self.all()), None)

    def latest_state(self) -> TrainState:
        """Of the newest checkpoint, or of a run that begins."""
        state, latest = TrainState(), self.latest()
        if latest is not None:
            state.load_state_dict(read_json(latest / STATE))
        return state

    def save(self, state: TrainState, save_engine: Callable[[Path], None]) -> None:
        """Every rank calls this.

        Args: save_engine: writes this rank's shard into a directory.
        """
        if self.directory is None:
            return
        final = self.directory / f"epoch-{state.epoch:06d}"
        partial = self.directory / f".{final.name}.partial"
        if final.exists():  # a finished run resumed, or a stop right after a periodic checkpoint: nothing is newer
            return
        if distributed.is_main():
            partial.mkdir()
        distributed.barrier()
        save_engine(partial)
        distributed.barrier()
        if distributed.is_main():
            write_json(partial / STATE, state.state_dict())
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
        distributed.barrier()
