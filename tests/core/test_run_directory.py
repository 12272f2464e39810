"""Whose run a directory holds: what is compared, what is said, and what of a damaged one is made again."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from prdp_fast.core import digest
from prdp_fast.core.digest import file_digest
from prdp_fast.core.errors import UserError
from prdp_fast.core.paths import check_output
from prdp_fast.core.run_directory import brief, claim, finished_epochs, read_acceleration
from prdp_fast.train import choose_output

JOB = {
    "recipe": {"schedule": {"epochs": 3, "images_per_prompt": 16}, "seed": 0}, "prompts": "aaaa",
    "deepspeed": {"gradient_accumulation_steps": 8}, "world_size": 2,
    "content": {"model.pretrained": "bbbb", "rewards.python": "cccc"}, "versions": {"torch": "1", "python": "3"},
}  # fmt: skip


def job(**changes: object) -> dict:
    return json.loads(json.dumps(JOB)) | changes


def snapshot(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def refused(directory: Path, new: dict) -> str:
    before = snapshot(directory)
    with pytest.raises(UserError) as raised:
        claim(directory, new, "auto")
    assert snapshot(directory) == before
    return str(raised.value).removeprefix(f"--output {directory}")


def test_a_run_is_spread_otherwise_and_the_record_tells_so(tmp_path: Path) -> None:
    offload = {"device": "cpu", "pin_memory": True}
    zero = {"stage": 3, "offload_optimizer": offload}
    claim(tmp_path, job(deepspeed={"gradient_accumulation_steps": 8, "zero_optimization": {"stage": 2}}), "auto")
    new = job(world_size=1, deepspeed={"gradient_accumulation_steps": 16, "zero_optimization": zero})
    assert claim(tmp_path, new, "auto") == [
        "continuing on 1 rank instead of 2, at ZeRO stage 3 instead of 2, with offload_optimizer.device cpu instead of none, "
        "with offload_optimizer.pin_memory true instead of none: equal to rounding, not to the bit"
    ]
    assert json.loads((tmp_path / "run.json").read_text()) == new and claim(tmp_path, new, "auto") == []
    assert claim(tmp_path, new | {"world_size": 2}, "auto") == [
        "continuing on 2 ranks instead of 1: equal to rounding, not to the bit"
    ]


def test_other_portions_are_told(tmp_path: Path) -> None:
    claim(tmp_path, job(recipe={"schedule": {"micro_batch": 4}, "sampler": {"rollout_batch": 8}}), "auto")
    assert claim(tmp_path, job(recipe={"schedule": {"micro_batch": "auto"}, "sampler": {"rollout_batch": 8}}), "auto") == [
        "continuing with schedule.micro_batch auto instead of 4: equal to rounding, not to the bit"
    ]


@pytest.mark.parametrize(
    ("was", "now", "said"),
    [
        ({"bf16": {"enabled": False}}, {"bf16": {"enabled": True}}, "in float32, now bfloat16"),
        ({"bf16": {"enabled": True}}, {"fp16": {"enabled": True}}, "in bfloat16, now float16"),
        ({"fp16": {"enabled": True}}, {"bf16": {"enabled": False}}, "in float16, now float32"),
    ],
)
def test_the_precision_stays(tmp_path: Path, was: dict, now: dict, said: str) -> None:
    """Though it is one rank more, too."""
    claim(tmp_path, job(deepspeed=was), "auto")
    name = {"f": '"bf16": {"enabled": false}', "b": '"bf16": {"enabled": true}'}.get(said[3], "")
    name = '"fp16": {"enabled": true}' if said.startswith("in float16") else name
    assert refused(tmp_path, job(deepspeed=now, world_size=3)) == (
        f": this run computes {said}, which is more than rounding of what it has; write {name} into --config, or choose another "
        "directory"
    )


def test_the_recipe_comes_before_what_follows_from_it(tmp_path: Path) -> None:
    claim(tmp_path, job(), "auto")
    other = job(
        recipe={"schedule": {"epochs": 3, "images_per_prompt": 8}, "seed": 0}, deepspeed={"gradient_accumulation_steps": 16}
    )
    assert "recipe.schedule.images_per_prompt was 16, now 8" in refused(tmp_path, other | {"prompts": "x"})


@pytest.mark.parametrize("name", ["model.pretrained", "rewards.python", "prompts.source"])
def test_what_was_exchanged_under_its_path_is_named(tmp_path: Path, name: str) -> None:
    claim(tmp_path, job(), "auto")
    new = job(prompts="dddd") if name == "prompts.source" else job(content=JOB["content"] | {name: "dddd"})
    line = refused(tmp_path, new)
    assert f"the content of {name} is not what the run started with" in line and "now dddd" in line


def test_a_run_of_an_earlier_version_goes_on_and_is_known_from_then_on(tmp_path: Path) -> None:
    old = job()
    del old["content"], old["versions"], old["recipe"]["seed"]
    (tmp_path / "run.json").write_text(json.dumps(old))
    assert claim(tmp_path, job(), "auto", complete=lambda one: one | {"recipe": one["recipe"] | {"seed": 0}}) == []
    assert json.loads((tmp_path / "run.json").read_text()) == JOB
    assert "rewards.python" in refused(tmp_path, job(content=JOB["content"] | {"rewards.python": "dddd"}))


def test_versions_are_told_and_kept_and_refuse_nothing(tmp_path: Path) -> None:
    assert claim(tmp_path, job(), "auto") == [] and claim(tmp_path, job(), "auto") == []
    (line,) = claim(tmp_path, job(versions={"torch": "2", "python": "3", "peft": "1"}), "auto")
    assert line.endswith("peft none > 1, torch 1 > 2")
    assert claim(tmp_path, job(versions={"torch": "2", "python": "3", "peft": "1"}), "auto") == []
    assert json.loads((tmp_path / "run.json").read_text())["earlier_versions"] == [JOB["versions"]]


DAMAGED = ["", "{", "[]", "null", "{}", '{"recipe": 3}', "[" * 50_000, "\ud800".encode("utf-8", "surrogatepass")]


@pytest.mark.parametrize("text", DAMAGED, ids=range(len(DAMAGED)))
@pytest.mark.parametrize("begun", [False, True])
def test_a_damaged_record_is_made_again_only_where_nothing_is_computed(tmp_path: Path, text, begun: bool) -> None:
    (tmp_path / "run.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    if begun:
        (tmp_path / "checkpoints" / "epoch-000001").mkdir(parents=True)
        line = refused(tmp_path, job())
        assert f"{tmp_path / 'run.json'} is damaged" in line and "put it back from a copy" in line
        return
    (note,) = claim(tmp_path, job(), "auto")
    assert "run.json was damaged" in note and json.loads((tmp_path / "run.json").read_text()) == JOB


@pytest.mark.parametrize("name", ["metrics.jsonl", "summary.json", "acceleration.json", "evaluation_after.pt"])
def test_a_directory_where_a_file_belongs_is_found_at_the_start(tmp_path: Path, name: str) -> None:
    claim(tmp_path, job(), "auto")
    (tmp_path / name).mkdir()
    assert f"{tmp_path / name} is a directory" in refused(tmp_path, job())


@pytest.mark.parametrize("name", ["checkpoints", "samples", "model", "tensorboard", "trackers", "ranks"])
@pytest.mark.parametrize("link", [False, True])
def test_a_file_or_a_broken_link_where_a_directory_belongs(tmp_path: Path, name: str, link: bool) -> None:
    claim(tmp_path, job(), "auto")
    (tmp_path / name).symlink_to("/no/such/place") if link else (tmp_path / name).write_text("x")
    assert f"{tmp_path / name} is no directory" in refused(tmp_path, job())


def bad_outputs(folder: Path) -> dict[str, Path]:
    (folder / "file").write_text("x")
    (folder / "link").symlink_to(folder / "nowhere" / "at all")
    (folder / "loop").symlink_to(folder / "loop")
    return {
        "a file": folder / "file", "below a file": folder / "file" / "run", "a broken link": folder / "link",
        "below a broken link": folder / "link" / "run", "a loop": folder / "loop" / "run", "too long": folder / ("x" * 300),
        "too deep": folder.joinpath(*["x" * 200] * 30), "no file system": Path("/proc/prdp/run"), "null": folder / "a\0b",
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["a file", "below a file", "a broken link", "below a broken link", "a loop", "too long",
                                  "too deep", "no file system", "null"])  # fmt: skip
def test_an_output_that_cannot_be_made(tmp_path: Path, kind: str) -> None:
    with pytest.raises(UserError, match=r"--output .* cannot be used: ") as raised:
        claim(bad_outputs(tmp_path)[kind], job(), "auto")
    assert len(str(raised.value)) < 800


def test_an_output_that_may_not_be_written(tmp_path: Path, monkeypatch) -> None:
    """Tests run as root, whom permissions do not stop."""
    monkeypatch.setattr(os, "access", lambda *arguments: False)
    with pytest.raises(UserError, match=f"{tmp_path} cannot be written; name a directory that can be written"):
        check_output("--output", tmp_path / "a" / "b")


def test_how_far_a_run_came(tmp_path: Path) -> None:
    for text, epochs in (('{"epochs": 3}', 3), ("", None), ("[]", None), ('{"epochs": "3"}', None), ("{}", None)):
        (tmp_path / "summary.json").write_text(text)
        assert finished_epochs(tmp_path) == epochs
    assert finished_epochs(tmp_path / "none") is None


def test_a_run_that_came_to_its_time_limit_is_the_one_that_goes_on(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = SimpleNamespace(resume="auto", output=None, recipe="tiny")
    record = {"recipe": {"seed": 0, "schedule": {"epochs": 3}}}
    first = choose_output(arguments, record)
    first.mkdir(parents=True)
    for summary in (None, '{"epochs": 2}', "", "{"):
        if summary is not None:
            (first / "summary.json").write_text(summary)
        assert choose_output(arguments, record) == first
    assert choose_output(SimpleNamespace(resume="never", output=None, recipe="tiny"), record).name == f"{first.name}-2"
    (first / "summary.json").write_text('{"epochs": 3}')
    assert choose_output(arguments, record).name == f"{first.name}-2"


def test_a_damaged_record_of_choices_is_no_choice(tmp_path: Path) -> None:
    path = tmp_path / "acceleration.json"
    assert read_acceleration(tmp_path) == ({}, False)
    for text in ("", "{", "[]", "null", '{"attention": "sdpa"}', '{"attention": {"value": 3}}', '{"attention": {}}'):
        path.write_text(text)
        assert read_acceleration(tmp_path) == ({}, True), text
    path.write_text('{"attention": {"value": "sdpa", "reason": "as set"}}')
    assert read_acceleration(tmp_path)[0]["attention"]["value"] == "sdpa"


def test_long_values_are_cut() -> None:
    assert len(brief("x" * 10_000)) < 130 and brief(3) == "3"


def test_a_large_file_is_read_once_and_again_when_it_is_exchanged(tmp_path: Path, monkeypatch) -> None:
    """Also by one of the same size and time of modification."""
    monkeypatch.setenv("PRDP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(digest, "READ_ONCE", 4)
    path, reads = tmp_path / "weights", []
    read = digest._read
    monkeypatch.setattr(digest, "_read", lambda one: reads.append(one) or read(one))
    path.write_bytes(b"0" * 64)
    first, times = file_digest(path), path.stat()
    assert file_digest(path) == first and len(reads) == 1
    other = tmp_path / "other"
    other.write_bytes(b"1" * 64)
    os.utime(other, ns=(times.st_atime_ns, times.st_mtime_ns))
    other.replace(path)
    assert file_digest(path) != first and len(reads) == 2
    (tmp_path / "cache" / "digests.json").write_text("[")
    assert file_digest(path) != first, "a damaged cache is none"
