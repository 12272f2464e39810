"""Checkpoints that a crash cannot spoil, and of which only a whole one is gone on from.

A checkpoint is written into a hidden sibling and renamed when it is whole and on the disk. What a copy or a disk makes of it
afterwards is found before anything of it is used: every file is read and compared with the manifest.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from prdp_fast.core import checkpoint_files, distributed, environment
from prdp_fast.core.checkpoint_files import Files
from prdp_fast.core.errors import OneRankError, UserError, brief
from prdp_fast.core.files import partial_path, sync_directory, write_json
from prdp_fast.core.format import format_bytes
from prdp_fast.core.run_directory import CHECKPOINTS
from prdp_fast.training.health import first_of_ranks
from prdp_fast.training.state import TrainState

Result = TypeVar("Result")
MOST_NAMED = 3  # faults in one line


class Checkpoints:
    """Those of one run: the newest few, and milestones.

    Every rank calls every method, unless it says otherwise. `newest` is the checkpoint that the run stands at: the one that it
    went on from, or the last that it saved.
    """

    def __init__(self, run_directory: Path | None, *, keep: int, milestone: int | None = None) -> None:
        """
        Args:
            run_directory: None keeps none.
            keep: the newest this many stay.
            milestone: a checkpoint after a multiple of so many epochs stays too.
        """
        self.directory = None if run_directory is None else run_directory / CHECKPOINTS
        self.keep, self.milestone = keep, milestone
        self.newest: Path | None = None
        if self.directory is not None and distributed.is_main():
            self.directory.mkdir(parents=True, exist_ok=True)
            for leftover in self.directory.glob(".*.partial"):
                shutil.rmtree(leftover)
        distributed.barrier()

    # Read.

    def choose(self) -> TrainState:
        """Find the newest whole checkpoint, and set aside newer ones, which are not.

        Returns: its state, or that of a run that begins.
        Raises: UserError if there are checkpoints and none is whole: a run never begins anew without being asked to.
        """
        state = TrainState()
        if self.directory is None:
            return state
        faults: dict[Path, str] = {}
        aside: list[Path]
        found, aside = distributed.from_main(
            (checkpoint_files.find(self.directory), checkpoint_files.find_damaged(self.directory))
        )
        for checkpoint in reversed(found):
            fault = self.examine(checkpoint) or self.read_state(checkpoint, state)
            if fault is None:
                self.newest = checkpoint
                break
            faults[checkpoint] = fault
        if self.newest is None and (faults or aside):
            raise UserError(self.none_whole(faults, aside))
        for checkpoint, fault in faults.items():
            assert self.newest is not None
            environment.say(
                f"checkpoint {checkpoint}: {fault}; it is set aside as {checkpoint_files.DAMAGED}{checkpoint.name}, and the run "
                f"falls back to {self.newest.name}"
            )
            if distributed.is_main():
                self.set_aside(checkpoint)
        distributed.barrier()
        return state

    def examine(self, checkpoint: Path) -> str | None:
        """What is wrong with a checkpoint; None if every file holds what was written. Ranks of a machine share the reading."""
        files: Files
        files, fault = distributed.from_main(checkpoint_files.look(checkpoint) if distributed.is_main() else None)
        if fault is not None:
            return fault
        part = checkpoint_files.share(files, distributed.local_rank(), distributed.local_ranks())
        return first_of_ranks(checkpoint_files.content_fault(checkpoint, part))

    def read_state(self, checkpoint: Path, state: TrainState) -> str | None:
        """Fill in `state` from a checkpoint. Returns: what is wrong with it; None if nothing is."""
        values: dict[str, Any] = {}
        fault = None
        if distributed.is_main():
            try:
                values = checkpoint_files.read_state(checkpoint)
                epoch = TrainState.of(values).epoch
                if epoch != checkpoint_files.epoch_of(checkpoint):
                    fault = f"{checkpoint_files.STATE} is that of epoch {epoch}, not of the directory's name"
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                fault = f"{checkpoint_files.STATE} cannot be read ({brief(error)})"
        values, fault = distributed.from_main((values, fault))
        if fault is None:
            state.load_state_dict(values)
        return fault

    def none_whole(self, faults: dict[Path, str], aside: list[Path]) -> str:
        """What to say where no checkpoint can be gone on from."""
        listed = [f"{checkpoint.name}: {fault}" for checkpoint, fault in faults.items()]
        listed += [f"{checkpoint.name} was set aside" for checkpoint in reversed(aside)]
        more = f", and {len(listed) - MOST_NAMED} more" if len(listed) > MOST_NAMED else ""
        return (
            f"{self.directory} has no whole checkpoint ({', '.join(listed[:MOST_NAMED])}{more}); put the files back from a copy, "
            "or remove that directory to begin anew"
        )

    def set_aside(self, checkpoint: Path) -> None:
        """Out of the way of the same epoch's next checkpoint. Rank 0 alone calls this."""
        damaged = checkpoint.with_name(f"{checkpoint_files.DAMAGED}{checkpoint.name}")
        if damaged.exists():
            shutil.rmtree(damaged)
        checkpoint.rename(damaged)
        sync_directory(checkpoint.parent)

    def load(self, load_engine: Callable[[Path], None]) -> Path | None:
        """Give the checkpoint that was chosen to `load_engine`.

        Returns: it, None if there is none.
        Raises: UserError if it cannot be loaded.
        """
        if self.newest is None:
            return None
        try:
            load_engine(self.newest)
        except (UserError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # of torch, pickle, zip and DeepSpeed: bytes that no manifest vouches for
            raise OneRankError(self.damaged(f"it cannot be read ({brief(error)})")) from error
        return self.newest

    def damaged(self, fault: str) -> str:
        """What to say of the chosen checkpoint if it cannot be gone on from, and where the run can. Any rank calls this."""
        assert self.directory is not None and self.newest is not None
        found = checkpoint_files.find(self.directory)
        earlier = found[: found.index(self.newest)] if self.newest in found else found
        place = f"from {earlier[-1].name}, the one before it" if earlier else "from the beginning"
        advice = f"put it back, or remove this directory to go on {place}"
        return f"checkpoint {self.newest}: {fault}; expected what was written: {advice}"

    # Written.

    def save(self, state: TrainState, save_engine: Callable[[Path], list[Path]]) -> str | None:
        """
        Args: save_engine: writes this rank's shard into a directory and returns its files. It raises an OSError only after the
            last collective of what it calls.
        Returns: why that cannot be done, the same on every rank; earlier checkpoints are as they were then. None if it is done.
        """
        if self.directory is None:
            return None
        final = self.directory / checkpoint_files.name_of(state.epoch)
        partial = partial_path(final)
        if final == self.newest:  # a finished run resumed, or a stop right after a periodic checkpoint: nothing is newer
            return None

        def begin() -> None:
            if distributed.is_main():
                partial.mkdir()

        def write() -> Files:
            own = save_engine(partial)
            return {path.relative_to(partial).as_posix(): checkpoint_files.finish_file(path) for path in own}

        def finish() -> None:
            if distributed.is_main():
                self.finish(partial, final, state, written)

        _, fault = together(begin)
        if fault is None:
            parts, fault = together(write)
            written = {name: file for part in parts if part for name, file in part.items()}
        if fault is None:
            _, fault = together(finish)
        if fault is not None:
            return self.given_up(partial, final, fault)
        self.newest = final
        if distributed.is_main():
            self.prune(state.epoch)
        distributed.barrier()
        return None

    def finish(self, partial: Path, final: Path, state: TrainState, written: Files) -> None:
        """Make a checkpoint of what the ranks have written. Rank 0 alone calls this. Raises: OSError."""
        state_file = partial / checkpoint_files.STATE
        write_json(state_file, state.state_dict() | {checkpoint_files.PROVEN: True})
        files = [path for path in partial.rglob("*") if path.is_file()]
        names = {path.relative_to(partial).as_posix(): path for path in files}
        if elsewhere := next((name for name in sorted(written) if name not in names), None):
            raise OSError(f"{elsewhere} is on another machine; --output must be on a file system that all machines share")
        # What no rank speaks of: the state, and DeepSpeed's scripts.
        rest = {name: checkpoint_files.finish_file(path) for name, path in names.items() if name not in written}
        kept = self.milestone is not None and state.epoch % self.milestone == 0
        checkpoint_files.write_manifest(partial, written | rest, kept=kept)
        if final.exists():  # from a copy, or of a time that the run has gone back from
            self.set_aside(final)
        partial.rename(final)
        sync_directory(final.parent)  # before an older one is removed

    def given_up(self, partial: Path, final: Path, fault: str) -> str:
        """Remove what there is of a checkpoint that cannot be written. Returns: the line about it."""
        room = "unknown"
        if distributed.is_main():
            try:
                shutil.rmtree(partial, ignore_errors=True)
                room = format_bytes(shutil.disk_usage(final.parent).free)
            except OSError:  # of a disk that is gone
                pass
        room = distributed.from_main(room)
        last = f"the last whole one is {self.newest.name}" if self.newest else "there is none before it"
        return f"checkpoint {final} cannot be written ({fault}; {room} free there); {last}"

    def prune(self, epoch: int) -> None:
        """Remove what the checkpoint of `epoch` replaces. Rank 0 alone calls this."""
        assert self.directory is not None
        old = [path for path in checkpoint_files.find(self.directory)[: -self.keep] if not checkpoint_files.outlives(path)]
        old += [path for path in checkpoint_files.find_damaged(self.directory) if checkpoint_files.epoch_of(path) <= epoch]
        try:
            for path in old:
                # Renamed first: a crash in the middle of the removal must not leave a checkpoint that looks whole.
                doomed = partial_path(path)
                path.rename(doomed)
                shutil.rmtree(doomed)
        except OSError as error:
            environment.say(
                f"warning: {self.directory}: older checkpoints cannot be removed ({brief(error)}); remove them by hand"
            )


def together(do: Callable[[], Result]) -> tuple[list[Result | None], str | None]:
    """Do something on every rank. One rank's failure is every rank's.

    Returns: what every rank has got; and the first failure, with its rank if there are several.
    """
    result, fault = None, None
    try:
        result = do()
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of the disk, and what torch and safetensors say of it
        fault = brief(error) if distributed.world_size() == 1 else f"rank {distributed.rank()}: {brief(error)}"
    gathered = distributed.gather_objects((result, fault))
    return [one for one, _ in gathered], next((one for _, one in gathered if one), None)
