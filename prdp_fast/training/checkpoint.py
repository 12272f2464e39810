"""Checkpoints that a crash cannot spoil, and of which only a whole one is gone on from.

A checkpoint is written into a hidden sibling and renamed when it is whole and on the disk. What a copy or a disk makes of it
afterwards is found before anything of it is used: every file is read and compared with the manifest.

Training need not wait for the disk. Each rank copies its shard, a thread of each rank writes the copy, and rank 0's thread makes
the checkpoint whole when it has word of all. These threads take part in no collective: the main threads are somewhere else in
theirs. What has become of a checkpoint the ranks agree on in `settle`, which the main threads call at the same points.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from prdp_fast.core import checkpoint_files, distributed, environment, ranks
from prdp_fast.core.checkpoint_files import Best, Files, Written
from prdp_fast.core.errors import OneRankError, UserError, brief
from prdp_fast.core.files import partial_path, sync_directory, write_json
from prdp_fast.core.format import format_bytes
from prdp_fast.core.run_directory import CHECKPOINTS
from prdp_fast.training.health import first_of_ranks
from prdp_fast.training.state import TrainState

Result = TypeVar("Result")
MOST_NAMED = 3  # faults in one line


class Checkpoints:
    """Those of one run: the newest few, milestones, and the best.

    Every rank calls every method, unless it says otherwise. `newest` is the checkpoint that the run stands at: the one that it
    went on from, or the last that it saved.
    """

    def __init__(
        self, run_directory: Path | None, *, keep: int, milestone: int | None = None, keep_best: str | None = None
    ) -> None:
        """
        Args:
            run_directory: None keeps none.
            keep: the newest this many stay.
            milestone: a checkpoint after a multiple of so many epochs stays too.
            keep_best: a metric; the checkpoint with its highest value stays too, see `evaluated`.
        """
        self.directory = None if run_directory is None else run_directory / CHECKPOINTS
        self.keep, self.milestone, self.keep_best = keep, milestone, keep_best
        self.newest: Path | None = None
        self.best: Best | None = None  # evaluation so far
        self.best_is_saved = True
        self.behind: Writing | None = None  # what is on its way while training goes on
        self.begun = 0
        self.thread = ThreadPoolExecutor(1, "checkpoint")
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
        best = checkpoint_files.find_best(self.directory, self.keep_best) if self.keep_best and distributed.is_main() else None
        self.best = distributed.from_main(best and checkpoint_files.best_of(best))
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

    def evaluated(self, value: float) -> bool:
        """Note an evaluation by the metric that `keep_best` names.

        Returns: whether it is the best so far. What is saved next is kept for it, until another one is better.
        """
        assert self.keep_best is not None
        value = distributed.from_main(value)
        if not math.isfinite(value) or (self.best is not None and value <= self.best.value):
            return False
        self.best, self.best_is_saved = Best(self.keep_best, value), False
        return True

    def save(self, state: TrainState, save_engine: Callable[[Path], list[Path]]) -> str | None:
        """Write a checkpoint, and wait for it. None may be on its way, see `settle`.

        Args: save_engine: writes this rank's shard into a directory and returns its files. It raises an OSError only after the
            last collective of what it calls.
        Returns: why that cannot be done, the same on every rank; earlier checkpoints are as they were then. None if it is done.
        """
        one, fault = self.begin(state)
        if one is None:
            return fault
        parts, fault = together(lambda: finish_files(one.partial, save_engine(one.partial)))
        return self.end(one, self.conclude(one, parts, fault) if distributed.is_main() else None)

    def save_behind(self, state: TrainState, copy_engine: Callable[[Path], Callable[[], list[Path]]]) -> str | None:
        """Copy what a checkpoint consists of. A thread of each rank writes it while training goes on, until `settle`.

        Args: copy_engine: copies this rank's shard. It returns what writes that into the directory and returns its files, and
            raises as `save_engine` does.
        Returns: why that cannot be done, the same on every rank; None if it is on its way.
        """
        one, fault = self.begin(state)
        if one is None:
            return fault
        writers: list[Callable[[], list[Path]]] = []
        _, fault = together(lambda: writers.append(copy_engine(one.partial)))
        if fault is not None:
            return self.end(one, self.conclude(one, [], fault) if distributed.is_main() else None)
        self.behind = one
        one.own = self.thread.submit(self.write, one, writers[0])
        if distributed.is_main():
            one.outcome = self.thread.submit(lambda: self.conclude(one, *one.parts()))
        return None

    def settle(self, *, wait: bool) -> str | None:
        """Note what has become of the checkpoint that is on its way, if there is one.

        Args: wait: for its end; otherwise it may go on.
        Returns: why it cannot be written, as `save` does. None if it is, or is still on its way.
        """
        one = self.behind
        if one is None or not (wait or distributed.from_main(one.outcome is not None and one.outcome.done())):
            return None
        assert one.own is not None
        one.own.result()  # first: of a rank whose disk hangs the others say that it does not come
        fault = None
        if one.outcome is not None:
            with ranks.waiting("the writing of a checkpoint"):
                fault = one.outcome.result()
        self.behind = None
        return self.end(one, fault)

    def begin(self, state: TrainState) -> tuple[Writing | None, str | None]:
        """Make the directory of a checkpoint. Returns: it, None if there is nothing to write; and why it cannot be made."""
        assert self.behind is None, "the one before is not settled"
        if self.directory is None:
            return None, None
        final = self.directory / checkpoint_files.name_of(state.epoch)
        if final == self.newest:  # a finished run resumed, or a stop right after a periodic checkpoint: nothing is newer
            return None, None
        self.begun += 1
        one = Writing(
            partial_path(final), final, state.epoch, state.state_dict(), None if self.best_is_saved else self.best,
            f"checkpoint/{self.begun}",
        )  # fmt: skip
        _, fault = together(lambda: one.partial.mkdir() if distributed.is_main() else None)
        if fault is None:
            return one, None
        return None, self.end(one, self.conclude(one, [], fault) if distributed.is_main() else None)

    def end(self, one: Writing, fault: str | None) -> str | None:
        """Args: fault: of rank 0. Returns: it, on every rank."""
        fault = distributed.from_main(fault)
        if fault is None:
            self.newest = one.final
            self.best_is_saved |= one.best == self.best
        return fault

    # In a thread of each rank, or where every rank waits for it.

    def write(self, one: Writing, write: Callable[[], list[Path]]) -> None:
        """This rank's files, and word of them to rank 0."""
        part, fault = None, None
        try:
            part = finish_files(one.partial, write())
        except Exception as error:  # of the disk, and what torch and safetensors say of it
            fault = fault_of(error)
        distributed.leave(one.key, [part and {name: [file.size, file.sha256] for name, file in part.items()}, fault])

    def conclude(self, one: Writing, parts: Sequence[Files | None], fault: str | None) -> str | None:
        """Make a checkpoint of what the ranks have written, or remove it. Rank 0 alone calls this.

        Args:
            parts: of every rank.
            fault: the first one of a rank.
        Returns: what is to be said of it if it cannot be written.
        """
        if fault is None:
            try:
                self.finish(one, {name: file for part in parts for name, file in (part or {}).items()})
            except Exception as error:  # of the disk
                fault = fault_of(error)
        if fault is not None:
            return self.given_up(one, fault)
        self.prune(one.epoch)
        return None

    def finish(self, one: Writing, written: Files) -> None:
        """Make a checkpoint of what the ranks have written. Rank 0 alone calls this. Raises: OSError."""
        write_json(one.partial / checkpoint_files.STATE, one.state | {checkpoint_files.PROVEN: True})
        names = {path.relative_to(one.partial).as_posix(): path for path in one.partial.rglob("*") if path.is_file()}
        if elsewhere := next((name for name in sorted(written) if name not in names), None):
            raise OSError(f"{elsewhere} is on another machine; --output must be on a file system that all machines share")
        # What no rank speaks of: the state, and DeepSpeed's scripts.
        rest = {name: checkpoint_files.finish_file(path) for name, path in names.items() if name not in written}
        kept = self.milestone is not None and one.epoch % self.milestone == 0
        checkpoint_files.write_manifest(one.partial, written | rest, kept=kept, best=one.best)
        if one.final.exists():  # from a copy, or of a time that the run has gone back from
            self.set_aside(one.final)
        one.partial.rename(one.final)
        sync_directory(one.final.parent)  # before an older one is removed

    def given_up(self, one: Writing, fault: str) -> str:
        """Remove what there is of a checkpoint that cannot be written. Returns: the line about it. Rank 0 alone calls this."""
        room = "unknown"
        try:
            shutil.rmtree(one.partial, ignore_errors=True)
            room = format_bytes(shutil.disk_usage(one.final.parent).free)
        except OSError:  # of a disk that is gone
            pass
        last = f"the last whole one is {self.newest.name}" if self.newest else "there is none before it"
        return f"checkpoint {one.final} cannot be written ({fault}; {room} free there); {last}"

    def prune(self, epoch: int) -> None:
        """Remove what the checkpoint of `epoch` replaces. Rank 0 alone calls this."""
        assert self.directory is not None
        best = checkpoint_files.find_best(self.directory, self.keep_best) if self.keep_best else None
        old = [
            path for path in checkpoint_files.find(self.directory)[: -self.keep]
            if path != best and not checkpoint_files.outlives(path)
        ]  # fmt: skip
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


@dataclass
class Writing:
    """A checkpoint that is being written."""

    partial: Path
    final: Path
    epoch: int
    state: dict[str, Any]  # JSON, as it was at that moment
    best: Best | None  # the evaluation that it is kept for
    key: str  # under which ranks tell rank 0 what they have written
    own: Future[None] | None = None  # of this rank's files
    outcome: Future[str | None] | None = None  # on rank 0: None, or why it cannot be written

    def parts(self) -> tuple[list[Files | None], str | None]:
        """What every rank has written, once all have; and the first fault. Rank 0 alone calls this."""
        found = distributed.collect(self.key)
        parts = [part and {name: Written(*file) for name, file in part.items()} for part, _ in found]
        return parts, next((fault for _, fault in found if fault), None)


def finish_files(directory: Path, paths: list[Path]) -> Files:
    """Bring files that were just written to the disk, and measure them. Raises: OSError."""
    return {path.relative_to(directory).as_posix(): checkpoint_files.finish_file(path) for path in paths}


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
        fault = fault_of(error)
    gathered = distributed.gather_objects((result, fault))
    return [one for one, _ in gathered], next((one for _, one in gathered if one), None)


def fault_of(error: Exception) -> str:
    """In a few words, with the rank if there are several."""
    return brief(error) if distributed.world_size() == 1 else f"rank {distributed.rank()}: {brief(error)}"
