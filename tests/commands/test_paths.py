"""Paths that cannot be read or written, in every command: one line with the path, and status 2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prdp_fast import cli, train
from prdp_fast.evaluation.blocks import Block, BlockName, EvaluationDirectory
from prdp_fast.prompts.shards import ensure_animal_shards

FAST = ["--recipe", "smoke", "--dry-run"]
LONG = "x" * 300


def refused(capsys, *words: str | Path) -> str:
    assert cli.main([str(word) for word in words]) == 2
    streams = capsys.readouterr()
    (line,) = streams.err.splitlines()
    assert line.startswith("error: ") and len(line) < 900
    return line


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    return tmp_path


@pytest.mark.parametrize("output", ["file", "file/run", "link", "link/run", LONG, f"a/{LONG}/b"])
def test_outputs_of_every_command(place: Path, capsys, output: str) -> None:
    before = sorted(place.rglob("*"))
    (place / "prompts.txt").write_text("a cat\na dog\na bird\na fish\n")
    at = place / output
    lines = [] if "link" in output else [refused(capsys, "train", *FAST, "--output", at)]  # which makes what a link leads to
    lines += [
        refused(capsys, "evaluate", "tiny", "--prompts", "animals:unseen_eval", "--rewards", "jpeg_size", "--output", at),
        refused(capsys, "shards", "build", "--source", "txt", "--input", place / "prompts.txt", "--eval", "0", "--output", at),
        refused(capsys, "embed", at, "--model", "tiny"),
        refused(capsys, "report", at),
    ]
    assert all(output[:20] in line for line in lines), lines
    (place / "prompts.txt").unlink()
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize(
    "words", [["--recipe", LONG], ["--config", LONG], ["--resume", LONG], ["--recipe", "/"], ["--config", "/"]]
)
def test_inputs_of_training(capsys, words: list[str]) -> None:
    option = words[0].removeprefix("--")
    assert option in refused(capsys, "train", *FAST, *words) or words[1] == LONG
    assert train.main([*FAST, *words]) == 2 and len(capsys.readouterr().err.splitlines()) == 1


def test_a_place_that_only_refuses_when_it_is_tried(capsys) -> None:
    """Under /proc nothing can be made, not even by root."""
    line = refused(
        capsys, "evaluate", "tiny", "--prompts", "animals:unseen_eval", "--rewards", "jpeg_size", "--output", "/proc/prdp/e"
    )
    assert "--output /proc/prdp/e" in line and "No such file or directory" in line


def finished(directory: Path, summary: str) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "run.json").write_text("{}")
    (directory / "summary.json").write_text(summary)
    (directory / "metrics.jsonl").write_text('[]\nnull\n{"epoch": 0, "reward": 0.5}\n{"epoch": 1, "rew' + "[" * 50_000)
    return directory


@pytest.mark.parametrize(
    "summary",
    ["", "{", "[]", "3", '{"evaluation": [1]}', '{"evaluation": {"seen": 3}}', '{"evaluation": {"seen": {}}}',
     '{"evaluation": {"seen": {"before": {}, "after": {}, "difference": {"mean": "x"}}}}',
     '{"wall_s": "x", "evaluation": {"a": 1}}'],
)  # fmt: skip
def test_report_of_a_damaged_summary(tmp_path: Path, capsys, summary: str) -> None:
    line = refused(capsys, "report", finished(tmp_path / "run", summary))
    assert "summary.json" in line and "resume the run to write it again" in line


def test_report_where_its_picture_cannot_be_written(tmp_path: Path, capsys) -> None:
    run = finished(tmp_path / "run", "{}")
    (run / "curves.png").mkdir()
    assert "it is a directory" in refused(capsys, "report", run)
    (run / "curves.png").rmdir()
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").mkdir()
    assert "metrics.jsonl" in refused(capsys, "report", run)
    (run / "metrics.jsonl").rmdir()
    assert cli.main(["report", str(finished(run, "{}"))]) == 0, "torn and foreign lines are skipped"


@pytest.mark.parametrize("text", ["", "[]", "{", "\udcff"])
def test_an_evaluation_whose_settings_are_damaged(tmp_path: Path, capsys, text: str) -> None:
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "settings.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    words = ["evaluate", "tiny", "--prompts", "animals:unseen_eval", "--rewards", "jpeg_size", "--output", tmp_path / "e"]
    line = refused(capsys, *words)
    assert "settings.json is damaged" in line and "--restart" in line


def test_damaged_blocks_of_an_evaluation_are_computed_again(tmp_path: Path) -> None:
    import torch

    directory = EvaluationDirectory(tmp_path)
    names = [BlockName("model", 0, number) for number in range(5)]
    block = Block({"a": torch.ones(2, 1)}, torch.ones(2), torch.zeros(2, 3, 4, 4, dtype=torch.uint8))
    for name in names[:4]:
        directory.save(name, block)
    paths = [directory.block_path(name) for name in names]
    paths[0].write_bytes(b"")
    paths[1].write_bytes(paths[1].read_bytes()[:-200])
    torch.save({"other": 1}, paths[2])
    assert directory.discard_damaged(names) == paths[:3]
    assert directory.missing(names) == [*names[:3], names[4]] and directory.discard_damaged(names) == []


@pytest.mark.parametrize("record", ["", "[]", '{"recipe": 3}', '{"recipe": {}}', "null"])
def test_evaluating_a_run_whose_record_is_damaged(tmp_path: Path, capsys, record: str) -> None:
    (tmp_path / "run.json").write_text(record)
    line = refused(capsys, "evaluate", tmp_path)
    assert "run.json is no record of a run" in line and str(tmp_path / "model") in line


def test_evaluating_a_directory_that_is_something_else(tmp_path: Path, capsys) -> None:
    (tmp_path / "run.json").mkdir()
    assert "is neither a run (run.json) nor a diffusers pipeline" in refused(capsys, "evaluate", tmp_path)
    assert "--prompts is missing" in refused(capsys, "evaluate", "tiny")


def test_a_directory_where_a_file_is_expected_and_the_reverse(place: Path, capsys) -> None:
    """In every command, named in one line."""
    folder, file = place / "folder.txt", place / "file"
    folder.mkdir()
    (place / "prompts.txt").write_text("a cat\na dog\n")
    build = ["shards", "build", "--eval", "0", "--output", place / "set"]
    scored = ["--rewards", "jpeg_size", "--output", place / "e"]
    lines = [
        refused(capsys, "train", "--dry-run", "--recipe", folder),
        refused(capsys, "train", *FAST, "--config", folder),
        refused(capsys, "train", *FAST, "--resume", file),
        *(refused(capsys, command, "--recipe", "smoke", "--set", f"model.pretrained={file}") for command in ("train", "compile")),
        *(refused(capsys, "train", *FAST, "--set", f"prompts.source={path}") for path in (folder, file)),
        *(refused(capsys, "evaluate", "tiny", "--prompts", path, *scored) for path in (folder, file)),
        refused(capsys, "evaluate", "tiny", "--prompts", "animals:unseen_eval", "--base", file, *scored),
        *(refused(capsys, "embed", path, "--model", "tiny") for path in (folder, file)),
        *(refused(capsys, "report", path) for path in (folder, file)),
        *(refused(capsys, "shards", command, path) for command in ("info", "verify") for path in (folder, file)),
        *(refused(capsys, *build, "--source", source, "--input", folder) for source in ("txt", "csv", "jsonl", "parquet")),
        refused(capsys, *build, "--source", "hpdv2", "--input", file),
        refused(capsys, "serve-reward", "python", "--option", f"function={folder}:score"),
    ]
    assert all("folder.txt" in line or "file" in line for line in lines), lines


@pytest.mark.parametrize("option", ["--seed=9223372036854775808", "--guidance=nan", "--eta=inf", "--steps=1001", "--samples=0"])
def test_numbers_that_no_evaluation_has(tmp_path: Path, capsys, option: str) -> None:
    words = ["evaluate", "tiny", "--prompts", "animals:unseen_eval", "--rewards", "jpeg_size", "--output", tmp_path / "e"]
    refused(capsys, *words, option)
    assert not (tmp_path / "e").exists()


def test_a_reward_option_that_is_no_yaml(tmp_path: Path, capsys) -> None:
    words = ["evaluate", "tiny", "--prompts", "animals:unseen_eval", "--output", tmp_path / "e"]
    for value in ("!!int ''", "2020-13-45", "{[a]: 1}"):
        assert "is not valid YAML" in refused(capsys, *words, "--rewards", f"jpeg_size:quality={value}")


def test_a_prompt_directory_that_cannot_take_embeddings(tmp_path: Path, capsys, monkeypatch) -> None:
    from prdp_fast.core import paths

    monkeypatch.setattr(paths.os, "access", lambda *arguments: False)
    assert "cannot be written" in refused(capsys, "embed", ensure_animal_shards().parent, "--model", "tiny")


def test_the_record_of_a_run_that_was_evaluated_with_any_precision() -> None:
    from prdp_fast.evaluation.plan import run_dtype

    for record in ({}, {"deepspeed": None}, {"deepspeed": []}, {"deepspeed": {"bf16": True}}, {"deepspeed": {"fp16": None}}):
        assert run_dtype(json.loads(json.dumps(record))) == "float32"
    assert run_dtype({"deepspeed": {"bf16": {"enabled": True}}}) == "bfloat16"
