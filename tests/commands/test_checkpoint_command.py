"""`prdp checkpoint list|verify RUN`: a line a checkpoint, and status 1 if one is damaged."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from damage import damage

from prdp_fast import cli
from prdp_fast.core import checkpoint_files
from prdp_fast.core.files import write_json


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Checkpoints after epochs 2 (a milestone), 4 and 6."""
    write_json(tmp_path / "run.json", {})
    for epoch in (2, 4, 6):
        checkpoint = tmp_path / "checkpoints" / checkpoint_files.name_of(epoch)
        (checkpoint / "zero").mkdir(parents=True)
        (checkpoint / "zero/weights.pt").write_bytes(bytes(range(256)) * 8)
        write_json(checkpoint / "state.json", {"epoch": epoch, "manifest": True})
        files = {name: checkpoint_files.finish_file(checkpoint / name) for name in ("zero/weights.pt", "state.json")}
        checkpoint_files.write_manifest(checkpoint, files, kept=epoch == 2)
    return tmp_path


def table(capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    """Its cells: epoch, files, size with its unit, state."""
    return [line.split(maxsplit=4) for line in capsys.readouterr().out.splitlines()[1:]]


@pytest.mark.parametrize(("action", "said"), [("list", "sizes are right"), ("verify", "whole")])
def test_whole_ones(run: Path, capsys: pytest.CaptureFixture[str], action: str, said: str) -> None:
    assert cli.main(["checkpoint", action, str(run)]) == 0
    rows = table(capsys)
    assert [row[0] for row in rows] == ["2", "4", "6"] and {row[1] for row in rows} == {"3"}
    assert [row[-1] for row in rows] == [f"{said}, kept for good", said, said]


def test_the_best_one_is_marked(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those that were the best before are not."""
    for epoch, value in ((2, 0.25), (4, 0.75)):
        checkpoint = run / "checkpoints" / checkpoint_files.name_of(epoch)
        files = checkpoint_files.read_manifest(checkpoint)[0]
        best = checkpoint_files.Best("evaluation/unseen/held/clip", value)
        checkpoint_files.write_manifest(checkpoint, files, kept=epoch == 2, best=best)
    assert cli.main(["checkpoint", "verify", str(run)]) == 0
    assert [row[-1] for row in table(capsys)] == [
        "whole, kept for good", "whole, best evaluation/unseen/held/clip: 0.75", "whole",
    ]  # fmt: skip


def test_a_flipped_bit_is_seen_by_verify_alone(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage(run / "checkpoints/epoch-000004", "zero/weights.pt", "bit")
    assert cli.main(["checkpoint", "list", str(run)]) == 0
    capsys.readouterr()
    assert cli.main(["checkpoint", "verify", str(run)]) == 1
    rows = table(capsys)
    assert rows[1][-1].startswith("DAMAGED: zero/weights.pt has SHA-256 ") and [rows[0][-1], rows[2][-1]] == [
        "whole, kept for good",
        "whole",
    ]


def test_list_sees_what_is_missing(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage(run / "checkpoints/epoch-000006", "state.json", "missing")
    assert cli.main(["checkpoint", "list", str(run)]) == 1
    assert table(capsys)[2][-1] == "DAMAGED: state.json is missing"


def test_those_set_aside_and_those_without_a_manifest_are_told_apart(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run / "checkpoints"
    (folder / "epoch-000006").rename(folder / "damaged-epoch-000006")
    (folder / "epoch-000002/manifest.json").unlink()
    write_json(folder / "epoch-000002/state.json", {"epoch": 2})
    assert cli.main(["checkpoint", "verify", str(run)]) == 0, "the run goes on from a whole one"
    rows = table(capsys)
    assert (
        rows[0][-1] == "sizes are right; of an earlier version, which wrote no hashes" and rows[2][-1] == "set aside as damaged"
    )


def test_a_run_without_checkpoints_and_what_is_no_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(run / "checkpoints")
    assert cli.main(["checkpoint", "list", str(run)]) == 0 and "has no checkpoint" in capsys.readouterr().out
    assert cli.main(["checkpoint", "list", str(run / "nowhere")]) == 2
    assert "is no run directory (run.json is missing)" in capsys.readouterr().err
