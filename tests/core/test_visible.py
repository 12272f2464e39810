"""What files and servers of others say commands no terminal, whichever line repeats it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from prdp_fast import train
from prdp_fast.commands import checkpoint as checkpoint_command
from prdp_fast.commands import shards as shards_command
from prdp_fast.core import checkpoint_files, environment, ranks, stops
from prdp_fast.core.errors import OneRankError, RewardError, UserError
from prdp_fast.core.files import write_json
from prdp_fast.core.paths import fault
from prdp_fast.core.records import Prompt
from prdp_fast.core.run_directory import claim
from prdp_fast.core.visible import visible
from prdp_fast.prompts.shards import write_index, write_shards
from prdp_fast.reporting.tables import Table, print_summary

HOSTILE = "\x1b]0;title\x07\x1b[31mred\x9b0m\u202egnirts\x08"
SHOWN = r"\x1b]0;title\x07\x1b[31mred\x9b0m\u202egnirts\x08"


def harmless(text: str) -> bool:
    return SHOWN in text and all(character.isprintable() or character == "\n" for character in text)


def test_escapes_are_shown_and_other_writing_stays() -> None:
    assert visible(HOSTILE) == SHOWN
    for text in ("ein Bär, 一只猫", "नमस्ते", "مرحبا", "👨‍👩‍👧", "a\u0308"):
        assert visible(text) == text
    assert visible("a\nb\tc") == r"a\nb\tc" and visible("a\nb", lines=True) == "a\nb"
    assert visible("x" * 10, most=4) == "xxxx..."


@pytest.mark.parametrize("kind", [UserError, OneRankError, RewardError])
def test_an_error_for_the_user(kind: type[UserError]) -> None:
    assert str(kind(f"a\n  {HOSTILE}\nb")) == f"a {SHOWN} b"


def test_lines_of_a_job_and_paths(capsys: pytest.CaptureFixture[str]) -> None:
    environment.say(f"checkpoint {HOSTILE}")
    stops.say(f"error: {HOSTILE}")
    assert harmless(capsys.readouterr().err)
    assert harmless(fault(FileNotFoundError(2, "No such file", f"/data/{HOSTILE}")))


def test_notes_on_a_run_that_is_somebody_else_s(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They come from its run.json."""
    record = {"recipe": {"schedule": {"micro_batch": 4}}, "versions": {"torch": "2"}}
    claim(tmp_path, record | {"versions": {"torch": HOSTILE}}, "auto")
    job: Any = SimpleNamespace(full_record=lambda: record, world_size=1, train_prompts=SimpleNamespace(fingerprint=""))
    try:
        train.claim_for_all(tmp_path, job, "auto")
    finally:
        ranks.forget()
    shown = capsys.readouterr().out
    assert harmless(shown) and "versions have changed" in shown


def test_prompts_and_names_of_a_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entry = write_shards([Prompt(0, HOSTILE, {})], tmp_path, "train")
    write_index(tmp_path, {"train": entry}, HOSTILE)
    assert shards_command.run(argparse.Namespace(action="info", directory=tmp_path)) == 0
    assert harmless(capsys.readouterr().out)
    index = json.loads((tmp_path / "index.json").read_text())
    index["sets"]["train"]["shards"][0]["sha256"] = HOSTILE
    (tmp_path / "index.json").write_text(json.dumps(index))
    shards_command.run(argparse.Namespace(action="verify", directory=tmp_path))
    shown = capsys.readouterr().out
    assert all(character.isprintable() or character == "\n" for character in shown)
    report = {"rows": 1, "kept": 0, "dropped": {"control": 1}, "examples": {"control": [HOSTILE]}}
    shards_command._print_source("rows", report)
    assert harmless(capsys.readouterr().out)


def test_files_of_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    newest = tmp_path / "checkpoints/epoch-000001"
    newest.mkdir(parents=True)
    write_json(tmp_path / "run.json", {})
    write_json(newest / "state.json", {"epoch": 1, "manifest": True})
    checkpoint_files.write_manifest(newest, {"state.json": checkpoint_files.measure(newest / "state.json")}, kept=False)
    (newest / HOSTILE).touch()
    assert checkpoint_command.run(argparse.Namespace(action="list", run=tmp_path)) == 1
    assert harmless(capsys.readouterr().out)


def test_tables_in_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(width=300)
    console.print(Table((HOSTILE, "n"), ((HOSTILE, HOSTILE),)).terminal(HOSTILE))
    shown = capsys.readouterr().out
    assert harmless(shown) and shown.count("red") == 4
    measured = {"mean": 1.0, "stderr": 0.1, "n": 3, "unscored": 1}
    sets = {HOSTILE: {"before": measured, "after": measured, "difference": measured}}
    print_summary({"evaluation": sets, "unet_forwards": {HOSTILE: 3}}, console)
    assert harmless(capsys.readouterr().out)
