"""Only a whole checkpoint is gone on from, and one that cannot be written leaves the last whole one, on every rank alike."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
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
    checkpoints, partial = Checkpoints(alone, keep=1), alone / "checkpoints/.epoch-000001.partial"
    partial.mkdir()
    elsewhere = {"zero/of-rank-8.pt": checkpoint_files.Written(1, "0")}
    with pytest.raises(OSError, match=r"zero/of-rank-8.pt is on another machine; --output must be on a file system that all"):
        checkpoints.finish(partial, alone / "checkpoints/epoch-000001", TrainState(epoch=1), elsewhere)


def test_nothing_is_kept_without_a_run_directory(alone: Path) -> None:
    checkpoints = Checkpoints(None, keep=1)
    assert checkpoints.choose().epoch == 0 and checkpoints.save(TrainState(epoch=1), write) is None
    assert checkpoints.load(lambda path: None) is None


def test_the_manifest_is_valid_for_what_was_saved(alone: Path) -> None:
    save(alone, range(1, 2), keep=1)
    files, fault = checkpoint_files.look(alone / "checkpoints/epoch-000001")
    assert fault is None and sorted(files) == ["state.json", "zero/weights.pt"]
