"""A manifest proves every file of a checkpoint, and is on the disk after all of them."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
from damage import KINDS, damage, told

from prdp_fast.core import checkpoint_files
from prdp_fast.core.checkpoint_files import Written
from prdp_fast.core.files import write_json

WEIGHTS, OPTIMIZER, STATE = "zero/weights.pt", "zero/optimizer.pt", "state.json"


def make(checkpoint: Path, *, kept: bool = False) -> Path:
    (checkpoint / "zero").mkdir(parents=True)
    (checkpoint / WEIGHTS).write_bytes(os.urandom(3000))
    (checkpoint / OPTIMIZER).write_bytes(os.urandom(5_000_000))
    write_json(checkpoint / STATE, {"epoch": 4, "manifest": True})
    files = {name: checkpoint_files.finish_file(checkpoint / name) for name in (WEIGHTS, OPTIMIZER, STATE)}
    checkpoint_files.write_manifest(checkpoint, files, kept=kept)
    return checkpoint


def fault(checkpoint: Path) -> str | None:
    files, found = checkpoint_files.look(checkpoint)
    return found or checkpoint_files.content_fault(checkpoint, files.items())


def test_a_whole_one_has_no_fault_and_hashes_that_any_tool_knows(tmp_path: Path) -> None:
    checkpoint = make(tmp_path / "epoch-000004", kept=True)
    (checkpoint / ".nfs0001").write_text("a file system's own")
    assert fault(checkpoint) is None and checkpoint_files.outlives(checkpoint)
    entry = json.loads((checkpoint / "manifest.json").read_text())["files"][OPTIMIZER]
    data = (checkpoint / OPTIMIZER).read_bytes()
    assert entry == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [WEIGHTS, OPTIMIZER, STATE])
def test_any_damage_is_found_and_told_with_what_was_expected(tmp_path: Path, name: str, kind: str) -> None:
    checkpoint = make(tmp_path / "epoch-000004")
    damage(checkpoint, name, kind)
    assert told(name, kind) in str(fault(checkpoint))


@pytest.mark.parametrize("kind", ["cut", "missing", "empty"])
def test_a_damaged_manifest_is_no_checkpoint_of_an_earlier_version(tmp_path: Path, kind: str) -> None:
    checkpoint = make(tmp_path / "epoch-000004")
    damage(checkpoint, "manifest.json", kind)
    expected = {"missing": "manifest.json is missing", "empty": "(it is empty)", "cut": "manifest.json cannot be read ("}[kind]
    assert expected in str(fault(checkpoint))


def test_every_bit_of_the_manifest_counts(tmp_path: Path) -> None:
    checkpoint = make(tmp_path / "epoch-000004")
    manifest = checkpoint / "manifest.json"
    whole = manifest.read_bytes()
    for place in range(0, len(whole), 7):
        if not chr(whole[place]).isspace():
            manifest.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            assert fault(checkpoint), f"byte {place}, {chr(whole[place])!r}"


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", ""])
def test_a_manifest_speaks_of_its_own_directory_only(tmp_path: Path, name: str) -> None:
    checkpoint = make(tmp_path / "epoch-000004")
    content = {"version": 1, "kept": False, "files": {name: {"bytes": 1, "sha256": "0"}}}
    write_json(checkpoint / "manifest.json", content | {"sha256": checkpoint_files._digest(content)})
    assert "is no file of a checkpoint" in str(fault(checkpoint))


def test_a_pipe_is_no_manifest(tmp_path: Path) -> None:
    checkpoint = make(tmp_path / "epoch-000004")
    (checkpoint / "manifest.json").unlink()
    os.mkfifo(checkpoint / "manifest.json")
    assert fault(checkpoint) == "manifest.json is no file"


@pytest.mark.parametrize("content", ["[]", "1", '{"version": 1}', '{"version": 2}', "[" * 100_000, '{"version": 1, "files": []}'])
def test_what_is_no_manifest_is_a_fault_and_no_traceback(tmp_path: Path, content: str) -> None:
    checkpoint = make(tmp_path / "epoch-000004")
    (checkpoint / "manifest.json").write_text(content)
    assert "manifest.json cannot be read (" in str(fault(checkpoint))


def test_checkpoints_of_earlier_versions_have_their_sizes_looked_at(tmp_path: Path) -> None:
    checkpoint = make(tmp_path / "epoch-000004")
    (checkpoint / "manifest.json").unlink()
    sizes = {name: (checkpoint / name).stat().st_size for name in (WEIGHTS, OPTIMIZER)}
    write_json(checkpoint / STATE, {"epoch": 4, "files": sizes})
    (checkpoint / "notes.txt").write_text("nobody knew what belongs to it")
    assert fault(checkpoint) is None
    damage(checkpoint, WEIGHTS, "cut")
    assert fault(checkpoint) == f"{WEIGHTS} has 1,500 bytes, expected 3,000"
    write_json(checkpoint / STATE, {"epoch": 4})  # of versions before those, nothing is known
    assert fault(checkpoint) is None


def test_readers_share_the_bytes_and_leave_none_out() -> None:
    files = {f"{number}": Written(size, "") for number, size in enumerate([90, 50, 40, 10, 10, 0])}
    for readers in (1, 2, 3, 8):
        shares = [checkpoint_files.share(files, number, readers) for number in range(readers)]
        assert sorted(name for part in shares for name, _ in part) == sorted(files)
        loads = [sum(file.size for _, file in part) for part in shares]
        assert max(loads) <= max(90, 200 / readers * 1.2)


def test_names_are_ordered_as_numbers(tmp_path: Path) -> None:
    for name in ("epoch-1000000", "epoch-000009", "epoch-999999", "damaged-epoch-000010", "epoch-x", ".epoch-000011.partial"):
        (tmp_path / name).mkdir()
    assert [path.name for path in checkpoint_files.find(tmp_path)] == ["epoch-000009", "epoch-999999", "epoch-1000000"]
    assert [path.name for path in checkpoint_files.find_damaged(tmp_path)] == ["damaged-epoch-000010"]
