"""Only a whole checkpoint is gone on from, and one that cannot be written leaves the last whole one, on every rank alike."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import launching
import pytest
from damage import KINDS, damage, told
from drive_checkpoints import FILES
from launching import ROOT

from prdp_fast.core import checkpoint_files, distributed
from prdp_fast.core.errors import OneRankError, UserError
from prdp_fast.core.files import read_json, write_json
from prdp_fast.training.checkpoint import Checkpoints
from prdp_fast.training.state import TrainState


@pytest.fixture(scope="module", params=[1, 2], ids=["1 rank", "2 ranks"])
def results(request, tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp(f"checkpoints{request.param}")
    launching.run(ROOT / "tests/drive_checkpoints.py", folder, ranks=request.param, cwd=folder)
    return json.loads((folder / "results.json").read_text()) | {"ranks": request.param}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_one_is_set_aside_and_its_epoch_saved_again(results: dict[str, Any], file: str, kind: str) -> None:
    case = results[f"{kind} {file}"]
    assert case["got"] == [[2, "epoch-000002", None]] * results["ranks"]
    (line,) = case["told"]
    assert told(file, kind) in line and "set aside as damaged-epoch-000003, and the run falls back to epoch-000002" in line
    assert case["names"] == ["damaged-epoch-000003", "epoch-000001", "epoch-000002"]
    assert case["later"] == ["epoch-000001", "epoch-000002", "epoch-000003"] and case["again"] == [3] * results["ranks"]


def test_whole_ones_are_used_without_a_word(results: dict[str, Any]) -> None:
    case = results["none"]
    assert case["got"] == [[3, "epoch-000003", None]] * results["ranks"] and case["told"] == []


def test_each_one_that_is_passed_over_has_a_line(results: dict[str, Any]) -> None:
    case = results["two"]
    assert case["got"] == [[1, "epoch-000001", None]] * results["ranks"]
    assert len(case["told"]) == 2 and all("falls back to epoch-000001" in line for line in case["told"])
    assert case["later"] == ["epoch-000001", "epoch-000002", "epoch-000003"]


def test_without_a_whole_one_the_run_does_not_begin_anew(results: dict[str, Any]) -> None:
    case = results["all"]
    for epoch, newest, refused in case["got"]:
        assert (epoch, newest) == (0, None)
        assert "has no whole checkpoint (epoch-000003: weights.pt has 25,000 bytes, expected 50,000, epoch-000002" in refused
        assert "put the files back from a copy, or remove that directory to begin anew" in refused
    assert case["names"] == ["epoch-000001", "epoch-000002", "epoch-000003"], "nothing is moved where nothing is gone on from"


def test_one_ranks_full_disk_is_every_ranks(results: dict[str, Any]) -> None:
    for number in range(results["ranks"]):
        case = results[f"full {number}"]
        (fault,) = set(case["faults"])
        assert "epoch-000002 cannot be written (" in fault and "No space left on device" in fault
        assert fault.endswith("the last whole one is epoch-000001") and (f"rank {number}: " in fault) == (results["ranks"] > 1)
        assert case["names"] == ["epoch-000001"], "nothing half written is left"
        assert case["next"] is None and case["later"] == ["epoch-000003"]


def test_one_is_whole_when_the_slowest_rank_has_written_and_no_main_thread_waits(results: dict[str, Any]) -> None:
    for number in range(results["ranks"]):
        case, all_ranks = results[f"behind {number}"], results["ranks"]
        assert case["begun"] == [None] * all_ranks and case["sums"]
        assert case["early"] == [[None, "epoch-000001"]] * all_ranks
        assert case["meanwhile"] == [".epoch-000002.partial", "epoch-000001"]
        assert case["faults"] == [None] * all_ranks and case["names"] == ["epoch-000002"]
        assert case["newest"] == ["epoch-000002"] * all_ranks and case["again"] == [2] * all_ranks


def test_one_ranks_full_disk_is_every_ranks_in_the_background_too(results: dict[str, Any]) -> None:
    for number in range(results["ranks"]):
        case = results[f"behind full {number}"]
        (fault,) = set(case["faults"])
        assert "epoch-000002 cannot be written (" in fault and "No space left on device" in fault
        assert fault.endswith("the last whole one is epoch-000001") and (f"rank {number}: " in fault) == (results["ranks"] > 1)
        assert case["names"] == ["epoch-000001"] and case["newest"] == ["epoch-000001"] * results["ranks"]
        assert case["again"] == [1] * results["ranks"]


# One rank, in this process.


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Path]:
    distributed.init()
    yield tmp_path
    distributed.shutdown()


def write(directory: Path) -> list[Path]:
    (directory / "zero").mkdir()
    (directory / "zero/weights.pt").write_bytes(os.urandom(1000))
    return [directory / "zero/weights.pt"]


def save(run: Path, epochs: range, **options: Any) -> list[str]:
    checkpoints = Checkpoints(run, **options)
    checkpoints.choose()
    for epoch in epochs:
        assert checkpoints.save(TrainState(epoch=epoch), write) is None
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def epochs(*numbers: int) -> list[str]:
    return [f"epoch-{number:06d}" for number in numbers]


def test_milestones_stay_beside_the_newest(alone: Path) -> None:
    assert save(alone, range(2, 15, 2), keep=2, milestone=4) == epochs(4, 8, 12, 14)
    assert save(alone, range(16, 25, 2), keep=1, milestone=10) == epochs(4, 8, 12, 20, 24), "once kept, kept"


def test_everything_is_on_the_disk_before_an_older_one_goes(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fsync of each file and directory, then the name, its directory, and only then the removal."""
    save(alone, range(1, 2), keep=1)
    events: list[str] = []
    fsync, rename, rmtree = os.fsync, Path.rename, shutil.rmtree

    def synced(descriptor: int) -> None:
        events.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    def renamed(path: Path, target: Path) -> Path:
        events.append(f"rename {path.name} {target.name}")
        return rename(path, target)

    def removed(path: Path, **options: Any) -> None:
        events.append(f"remove {Path(path).name}")
        rmtree(path, **options)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    monkeypatch.setattr(shutil, "rmtree", removed)
    save(alone, range(2, 3), keep=1)
    partial = ".epoch-000002.partial"
    name = events.index(f"rename {partial} epoch-000002")
    manifest = events.index("sync .manifest.json.partial")
    for before in ("sync weights.pt", "sync state.json", "sync zero", f"sync {partial}"):
        assert before in events[:manifest], f"{before}: {events}"
    assert f"sync {partial}" in events[manifest:name] and events[name + 1] == "sync checkpoints"
    assert events.index("remove .epoch-000001.partial") > name + 1


def test_only_a_damaged_one_that_was_set_aside_is_no_beginning(alone: Path) -> None:
    save(alone, range(1, 3), keep=2)
    damage(alone / "checkpoints/epoch-000002", "zero/weights.pt", "bit")
    assert save(alone, range(0), keep=2) == ["damaged-epoch-000002", "epoch-000001"]
    shutil.rmtree(alone / "checkpoints/epoch-000001")
    with pytest.raises(UserError, match=r"no whole checkpoint \(damaged-epoch-000002 was set aside\)"):
        save(alone, range(0), keep=2)


def test_a_directory_of_another_epoch_is_not_this_one(alone: Path) -> None:
    save(alone, range(1, 3), keep=2)
    folder = alone / "checkpoints"
    (folder / "epoch-000002").rename(folder / "epoch-000007")
    checkpoints = Checkpoints(alone, keep=2)
    assert checkpoints.choose().epoch == 1 and (folder / "damaged-epoch-000007").is_dir()


@pytest.mark.parametrize("value", [None, "7", 7.5, True])
def test_a_state_without_a_number_of_epochs_is_damaged(alone: Path, value: object) -> None:
    save(alone, range(1, 3), keep=2)
    newest = alone / "checkpoints/epoch-000002"
    state = read_json(newest / "state.json") | {"epoch": value}
    write_json(newest / "state.json", {name: item for name, item in state.items() if name != "manifest"})
    (newest / "manifest.json").unlink()
    assert Checkpoints(alone, keep=2).choose().epoch == 1


def read_only(path: Path, *_: Any, **__: Any) -> None:
    raise OSError(30, "Read-only file system", str(path))


@pytest.mark.parametrize("broken", ["mkdir", "rename"], ids=["nothing can be made", "the last step fails"])
def test_a_disk_that_turned_read_only_keeps_the_last_whole_one(alone: Path, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    checkpoints = Checkpoints(alone, keep=1)
    assert checkpoints.save(TrainState(epoch=1), write) is None
    with monkeypatch.context() as patch:
        patch.setattr(Path, broken, read_only)
        fault = checkpoints.save(TrainState(epoch=2), write)
    assert fault and "epoch-000002 cannot be written (" in fault and "Read-only file system" in fault
    assert checkpoints.newest and checkpoints.newest.name == "epoch-000001"
    assert [path.name for path in (alone / "checkpoints").iterdir()] == ["epoch-000001"]
    assert checkpoints.save(TrainState(epoch=2), write) is None


def test_one_that_cannot_be_removed_ends_nothing(alone: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    checkpoints = Checkpoints(alone, keep=1)
    assert checkpoints.save(TrainState(epoch=1), write) is None
    monkeypatch.setattr(shutil, "rmtree", read_only)
    assert checkpoints.save(TrainState(epoch=2), write) is None
    assert "older checkpoints cannot be removed (" in capsys.readouterr().err


def test_what_no_manifest_vouches_for_and_cannot_be_read_is_refused(alone: Path) -> None:
    def load(path: Path) -> None:
        raise RuntimeError("bad bytes")

    save(alone, range(1, 3), keep=2)
    checkpoints = Checkpoints(alone, keep=2)
    checkpoints.choose()
    with pytest.raises(OneRankError, match=r"bad bytes.*remove this directory to go on from epoch-000001, the one before it"):
        checkpoints.load(load)


def test_a_run_directory_that_the_machines_do_not_share_is_told(alone: Path) -> None:
    checkpoints = Checkpoints(alone, keep=1)
    one, _ = checkpoints.begin(TrainState(epoch=1))
    assert one is not None
    fault = checkpoints.conclude(one, [{"zero/of-rank-8.pt": checkpoint_files.Written(1, "0")}], None)
    assert fault and "zero/of-rank-8.pt is on another machine; --output must be on a file system that all machines share" in fault


def test_nothing_is_kept_without_a_run_directory(alone: Path) -> None:
    checkpoints = Checkpoints(None, keep=1)
    assert checkpoints.choose().epoch == 0 and checkpoints.save(TrainState(epoch=1), write) is None
    assert checkpoints.load(lambda path: None) is None


def test_the_manifest_is_valid_for_what_was_saved(alone: Path) -> None:
    save(alone, range(1, 2), keep=1)
    files, fault = checkpoint_files.look(alone / "checkpoints/epoch-000001")
    assert fault is None and sorted(files) == ["state.json", "zero/weights.pt"]


# Written while training goes on.


class Slow:
    """An engine whose writer waits until it may go on, or fails."""

    def __init__(self) -> None:
        self.weights = bytearray(b"first")
        self.may_write, self.writes = threading.Event(), threading.Event()
        self.fault: Exception | None = None

    def copy(self, directory: Path) -> Callable[[], list[Path]]:
        taken = bytes(self.weights)

        def write() -> list[Path]:
            self.writes.set()
            (directory / "zero").mkdir()
            (directory / "zero/weights.pt").write_bytes(taken[:2])
            assert self.may_write.wait(30)
            if self.fault is not None:
                raise self.fault
            (directory / "zero/weights.pt").write_bytes(taken)
            return [directory / "zero/weights.pt"]

        return write


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_what_is_saved_is_of_the_moment_of_the_save(alone: Path) -> None:
    """Weights and progress change before the writer comes to them."""
    checkpoints, engine, state = Checkpoints(alone, keep=2), Slow(), TrainState(epoch=1, seen_rewards={"clip": [1.0]})
    assert checkpoints.save_behind(state, engine.copy) is None
    assert engine.writes.wait(30)
    engine.weights[:] = b"later"
    state.epoch = 2
    state.seen_rewards["clip"][0] = 5.0
    assert checkpoints.settle(wait=False) is None and checkpoints.newest is None, "it is on its way"
    assert names(alone) == [".epoch-000001.partial"]
    engine.may_write.set()
    assert checkpoints.settle(wait=True) is None
    newest = alone / "checkpoints/epoch-000001"
    assert checkpoints.newest == newest and names(alone) == ["epoch-000001"]
    assert (newest / "zero/weights.pt").read_bytes() == b"first"
    found = Checkpoints(alone, keep=2).choose()
    assert found.epoch == 1 and found.seen_rewards == {"clip": [1.0]}
    files, fault = checkpoint_files.look(newest)
    assert fault is None and checkpoint_files.content_fault(newest, files.items()) is None


def test_it_is_whole_as_soon_as_it_is_written_whatever_the_main_thread_does(alone: Path) -> None:
    """An epoch may take long, and a run can be killed in it."""
    checkpoints, engine = Checkpoints(alone, keep=1), Slow()
    engine.may_write.set()
    assert checkpoints.save_behind(TrainState(epoch=1), engine.copy) is None
    deadline = time.monotonic() + 30
    while not (alone / "checkpoints/epoch-000001").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert names(alone) == ["epoch-000001"] and Checkpoints(alone, keep=1).choose().epoch == 1


def test_two_in_a_row(alone: Path) -> None:
    checkpoints, engine = Checkpoints(alone, keep=1), Slow()
    assert checkpoints.save_behind(TrainState(epoch=1), engine.copy) is None
    with pytest.raises(AssertionError, match="not settled"):
        checkpoints.save_behind(TrainState(epoch=2), engine.copy)
    engine.may_write.set()
    assert checkpoints.settle(wait=True) is None and checkpoints.save_behind(TrainState(epoch=2), engine.copy) is None
    assert checkpoints.settle(wait=True) is None and names(alone) == ["epoch-000002"]
    assert checkpoints.save_behind(TrainState(epoch=2), engine.copy) is None and checkpoints.behind is None, "nothing is newer"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("unexpected pos 64 vs 0")])
def test_a_writer_that_fails_keeps_the_last_whole_one(alone: Path, error: Exception) -> None:
    checkpoints, engine = Checkpoints(alone, keep=1), Slow()
    engine.may_write.set()
    assert checkpoints.save(TrainState(epoch=1), write) is None
    engine.fault = error
    assert checkpoints.save_behind(TrainState(epoch=2), engine.copy) is None
    fault = checkpoints.settle(wait=True)
    assert fault and f"epoch-000002 cannot be written ({error}; " in fault and fault.endswith("whole one is epoch-000001")
    assert names(alone) == ["epoch-000001"] and checkpoints.newest and checkpoints.newest.name == "epoch-000001"
    engine.fault = None
    assert checkpoints.save_behind(TrainState(epoch=3), engine.copy) is None and checkpoints.settle(wait=True) is None
    assert names(alone) == ["epoch-000003"]


@pytest.mark.parametrize("broken", ["mkdir", "copy", "rename"])
def test_other_steps_that_fail(alone: Path, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    """No directory, no memory for the copy, and at the end a disk that turned read-only."""
    checkpoints, engine = Checkpoints(alone, keep=1), Slow()
    engine.may_write.set()
    assert checkpoints.save(TrainState(epoch=1), write) is None
    with monkeypatch.context() as patch:
        patch.setattr(*((Slow, "copy", lambda *_: read_only(alone)) if broken == "copy" else (Path, broken, read_only)))
        fault = checkpoints.save_behind(TrainState(epoch=2), Slow.copy.__get__(engine)) or checkpoints.settle(wait=True)
    assert fault and "epoch-000002 cannot be written (" in fault and "Read-only file system" in fault
    assert checkpoints.behind is None and names(alone) == ["epoch-000001"]


def test_a_kill_while_it_is_written_leaves_the_one_before(alone: Path) -> None:
    checkpoints, engine = Checkpoints(alone, keep=1), Slow()
    assert checkpoints.save(TrainState(epoch=1), write) is None
    assert checkpoints.save_behind(TrainState(epoch=2), engine.copy) is None and engine.writes.wait(30)
    left = alone.with_name("left")
    shutil.copytree(alone, left)  # what a kill leaves
    engine.may_write.set()
    assert names(left) == [".epoch-000002.partial", "epoch-000001"]
    again = Checkpoints(left, keep=1)
    assert again.choose().epoch == 1 and names(left) == ["epoch-000001"]
    assert checkpoints.settle(wait=True) is None


# The best.

UNSEEN = "evaluation/unseen"


def train(run: Path, values: dict[int, float], *, keep_best: str | None = UNSEEN, broken: int = 0) -> list[bool]:
    """A save after each epoch, keeping the newest one. Args: values: of the evaluation after an epoch; broken: an epoch."""

    def write_or_fail(directory: Path) -> list[Path]:
        if int(directory.name[7:13]) == broken:
            raise OSError(28, "No space left on device")
        return write(directory)

    checkpoints = Checkpoints(run, keep=1, keep_best=keep_best)
    first, improved = checkpoints.choose().epoch + 1, []
    for epoch in range(first, max(values) + 1):
        if epoch in values:
            improved.append(checkpoints.evaluated(values[epoch]))
        assert (checkpoints.save(TrainState(epoch=epoch), write_or_fail) is None) == (epoch != broken)
    return improved


def test_the_best_stays_until_another_one_is_better(alone: Path) -> None:
    assert train(alone, {1: 0.2, 3: 0.5, 5: 0.5, 7: float("nan"), 8: 0.4}) == [True, True, False, False, False]
    assert names(alone) == epochs(3, 8)
    assert train(alone, {9: 0.45, 10: 0.1}) == [False, False], "what was best is known to the next start"
    assert names(alone) == epochs(3, 10)
    assert train(alone, {12: 0.6, 13: 0.1}) == [True, False]
    assert names(alone) == epochs(12, 13)
    assert checkpoint_files.best_of(alone / "checkpoints/epoch-000012") == checkpoint_files.Best(UNSEEN, 0.6)


def test_the_next_one_is_kept_where_that_of_the_best_cannot_be_written(alone: Path) -> None:
    assert train(alone, {1: 0.2, 3: 0.5, 5: 0.1}, broken=3) == [True, True, False]
    assert names(alone) == epochs(4, 5)
    assert checkpoint_files.find_best(alone / "checkpoints") == alone / "checkpoints/epoch-000004"


def test_another_metric_begins_anew(alone: Path) -> None:
    """And one that nobody asks for any more keeps nothing."""
    train(alone, {1: 0.9, 2: 0.1})
    assert train(alone, {3: 0.3, 4: 0.2}, keep_best="evaluation/unseen/held/clip") == [True, False]
    assert names(alone) == epochs(3, 4)
    assert checkpoint_files.find_best(alone / "checkpoints") == alone / "checkpoints/epoch-000003"
    save(alone, range(5, 7), keep=1)
    assert names(alone) == epochs(6)
