"""Checkpoints that a crash cannot spoil.

A checkpoint is written into a hidden sibling and renamed when it is whole, so a directory called `epoch-000010` is always usable.
What a copy or a disk makes of it afterwards is found when it is read: the sizes of its files are in its `state.json`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from prdp_fast.core import distributed
from prdp_fast.core.errors import OneRankError, UserError
from prdp_fast.core.files import read_json, write_json
from prdp_fast.core.format import format_bytes
from prdp_fast.core.run_directory import CHECKPOINTS
from prdp_fast.training.state import TrainState

STATE = "state.json"
SIZES = "files"  # in it: bytes of the checkpoint's other files, by their paths in the directory


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
        """Of the newest checkpoint, or of a run that begins. Every rank calls this. Raises: UserError if it is damaged."""
        state, latest = TrainState(), self.latest()
        if latest is None:
            return state
        found = None
        try:
            values = read_json(latest / STATE)
            state.load_state_dict(values)
            found = missing_part(latest, values.get(SIZES, {}))  # checkpoints of earlier versions have no sizes
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            empty = (latest / STATE).is_file() and not (latest / STATE).stat().st_size
            found = f"{STATE} cannot be read ({'it is empty' if empty else reason(error)})"
        found = next((one for one in distributed.gather_objects(found) if one), None)
        if found is not None:
            raise UserError(self.damaged(latest, found))
        return state

    def load(self, load_engine: Callable[[Path], None]) -> Path | None:
        """Give the newest checkpoint to `load_engine`. Every rank calls this.

        Returns: it, None if there is none.
        Raises: UserError if it is damaged.
        """
        latest = self.latest()
        if latest is None:
            return None
        try:
            load_engine(latest)
        except (UserError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # of torch, pickle, zip and DeepSpeed: bytes that are not what was written
            raise OneRankError(self.damaged(latest, f"it cannot be read ({reason(error)})")) from error
        return latest

    def damaged(self, checkpoint: Path, fault: str) -> str:
        """What to say of a checkpoint that cannot be gone on from, and where the run can."""
        earlier = [path for path in self.all() if path < checkpoint]
        place = f"from {earlier[-1].name}, the one before it" if earlier else "from the beginning"
        return (
            f"checkpoint {checkpoint}: {fault}; expected what was written: put it back, or remove this directory to go on {place}"
        )

    def save(self, state: TrainState, save_engine: Callable[[Path], None]) -> None:
        """Every rank calls this.

        Args: save_engine: writes this rank's shard into a directory.
        Raises: OneRankError if that cannot be done; earlier checkpoints are as they were.
        """
        if self.directory is None:
            return
        final = self.directory / f"epoch-{state.epoch:06d}"
        partial = self.directory / f".{final.name}.partial"
        if final.exists():  # a finished run resumed, or a stop right after a periodic checkpoint: nothing is newer
            return
        if distributed.is_main():
            with self.told(partial, final):
                partial.mkdir()
        distributed.barrier()
        with self.told(partial, final):
            save_engine(partial)
        distributed.barrier()
        if distributed.is_main():
            with self.told(partial, final):
                files = [path for path in partial.rglob("*") if path.is_file()]
                sizes = {path.relative_to(partial).as_posix(): path.stat().st_size for path in files}
                write_json(partial / STATE, state.state_dict() | {SIZES: sizes})
                for path in [*files, partial / STATE]:  # the rename must not reach the disk before the data
                    with path.open("rb") as file:
                        os.fsync(file.fileno())
                partial.rename(final)
            for old in self.all()[: -self.keep]:
                # Renamed first: a crash in the middle of the removal must not leave a checkpoint that looks whole.
                doomed = old.with_name(f".{old.name}.partial")
                old.rename(doomed)
                shutil.rmtree(doomed)
        distributed.barrier()

    @contextlib.contextmanager
    def told(self, partial: Path, final: Path) -> Iterator[None]:
        """A checkpoint that cannot be written, in one line. The other ranks wait in a collective of what writes it."""
        try:
            yield
        except (UserError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # of the disk, and what torch and safetensors say of it
            room = format_bytes(shutil.disk_usage(final.parent).free)
            shutil.rmtree(partial, ignore_errors=True)
            latest = self.latest()
            raise OneRankError(
                f"checkpoint {final} cannot be written ({reason(error)}; {room} free there); make room, or lift a limit of "
                f"file sizes, and give the same command: it goes on from {latest.name if latest else 'the beginning'}"
            ) from error


def missing_part(checkpoint: Path, sizes: dict[str, Any]) -> str | None:
    """The first file that is not as long as it was written; None if all are."""
    for name, size in sorted(sizes.items()):
        path = checkpoint / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            return f"{name} is missing" if found is None else f"{name} has {found:,} bytes of {size:,}"
    return None


def reason(error: Exception) -> str:
    """In a few words."""
    return (" ".join(str(error).split()) or type(error).__name__)[:160]
