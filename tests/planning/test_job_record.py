"""What identifies a job is what its files hold, wherever they lie and whatever they are called."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from prdp_fast.config.load import load_recipe
from prdp_fast.core.errors import UserError
from prdp_fast.planning.job import Job, complete_record
from prdp_fast.prompts.directory import LocalDirectory
from prdp_fast.world import TINY

REWARD = "def score(images, prompts): return images.float().mean((1, 2, 3))\n"


@pytest.fixture
def files(tmp_path: Path) -> Path:
    shutil.copytree(TINY, tmp_path / "model")
    (tmp_path / "reward.py").write_text(REWARD)
    (tmp_path / "prompts.txt").write_text("".join(f"prompt {number}\n" for number in range(8)))
    return tmp_path


def prepared(files: Path, *overrides: str) -> Job:
    reward = f"{{name: python, options: {{function: '{files / 'reward.py'}:score'}}}}"
    settings = load_recipe("smoke", [
        f"model.pretrained={files / 'model'}", f"rewards=[{reward}]",
        f"prompts={{source: {files / 'prompts.txt'}, seen: train, unseen: train}}", "evaluation.prompts=4", *overrides,
    ])  # fmt: skip
    return Job.prepare(settings, "zero2.json", world_size=1, cuda=False)


def flip(path: Path) -> None:
    """One bit of a file, which keeps its size and its time."""
    times, content = path.stat(), bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_the_same_files_are_the_same_job(files: Path) -> None:
    record = prepared(files).full_record()
    assert record == prepared(files).full_record() and json.loads(json.dumps(record)) == record
    assert set(record["content"]) == {"model.pretrained", "prompts.seen", "prompts.unseen", "rewards.python"}
    assert {"python", "torch", "diffusers", "deepspeed"} <= set(record["versions"])
    assert prepared(files).record() == {key: record[key] for key in ("recipe", "prompts", "deepspeed", "world_size")}, (
        "by which a run directory is found again: it must not change with a version"
    )


@pytest.mark.parametrize("name", ["unet/config.json", "unet/*.safetensors", "vae/*.safetensors", "text_encoder/*.safetensors",
                                  "tokenizer/tokenizer.json", "model_index.json"])  # fmt: skip
def test_a_file_of_the_model_that_was_exchanged(files: Path, name: str) -> None:
    before = prepared(files)
    content = before.content()
    (path,) = (files / "model").glob(name)
    flip(path)
    changed = before.content() if name != "model_index.json" else None
    if changed is None:
        path.write_text(json.dumps(json.loads((TINY / name).read_text()), indent=7))
        changed = before.content()
    assert {key for key in content if content[key] != changed[key]} == {"model.pretrained"}


def test_files_beside_the_model_that_are_not_read(files: Path) -> None:
    content = prepared(files).content()
    (files / "model" / "model.ckpt").write_bytes(b"x")
    (files / "model" / "README.md").write_text("changed")
    (files / "model" / "unet" / ".DS_Store").write_bytes(b"x")
    assert prepared(files).content() == content


def test_a_reward_s_code_and_the_prompts(files: Path) -> None:
    content = prepared(files).content()
    (files / "reward.py").write_text(REWARD.replace("mean", "amax"))
    assert {key for key, value in prepared(files).content().items() if content[key] != value} == {"rewards.python"}
    record = prepared(files).full_record()
    (files / "prompts.txt").write_text("".join(f"other {number}\n" for number in range(8)))
    changed = prepared(files).full_record()
    assert record["prompts"] != changed["prompts"] and record["content"]["prompts.seen"] != changed["content"]["prompts.seen"]


def test_a_reward_s_module_and_weights(files: Path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(files)
    (files / "scoring_of_mine.py").write_text(REWARD)
    reward = ["rewards=[{name: python, options: {function: 'scoring_of_mine:score', arguments: {}}}]"]
    content = prepared(files, *reward).content()
    flip(files / "scoring_of_mine.py")
    assert prepared(files).content()["model.pretrained"] == content["model.pretrained"]
    from prdp_fast.core.digest import files_digest
    from prdp_fast.planning.job import reward_files

    (files / "head.pth").write_bytes(b"12345")
    options = {"weights": str(files / "head.pth"), "model": str(files / "model"), "batch": 3, "arguments": {"log": str(files)}}
    named = dict(reward_files(options))
    assert named["weights"] == files / "head.pth" and "model/unet/config.json" in named
    assert not any(name.startswith("arguments") for name in named), "what a reward writes is no part of it"
    first = files_digest(named.items())
    flip(files / "head.pth")
    assert files_digest(named.items()) != first
    assert reward_files({"function": "scoring_of_mine:score"}) == [("function", files / "scoring_of_mine.py")]
    assert reward_files({"model": "owner/name", "weights": None, "processor": ""}) == []


def test_a_file_that_cannot_be_read_is_a_line(files: Path) -> None:
    job = prepared(files)
    path = next((files / "model" / "unet").glob("*.safetensors"))
    os.chmod(path, 0)
    if os.access(path, os.R_OK):  # as root
        job.train_prompts.directory = LocalDirectory(files)
        job.settings.prompts.__dict__["stored_embeddings"] = True
    with pytest.raises(UserError, match=r"the files of the job cannot be read: .*: .*; check the paths"):
        job.content()


def test_recipes_of_earlier_versions_get_the_defaults_of_new_keys() -> None:
    new = {"recipe": load_recipe("smoke").model_dump(mode="json")}
    old = json.loads(json.dumps(new))
    del old["recipe"]["performance"], old["recipe"]["checkpoint"]["keep"]
    assert complete_record(old) == new
    broken = {"recipe": {"what": 1}}
    assert complete_record(broken) == broken
