"""Everything that is read from outside, and how it is read. A reader returns, or raises what its user is told in one line."""

from __future__ import annotations

import base64
import copy
import gzip
import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from fuzz.inputs import VALUES, changed, edited
from hypothesis import strategies as st
from PIL import Image

from prdp_fast.config.deepspeed import resolve_config
from prdp_fast.config.load import CONFIGS, find_recipe, load_recipe
from prdp_fast.core import checkpoint_files
from prdp_fast.core.errors import UserError
from prdp_fast.core.records import Prompt
from prdp_fast.core.run_directory import METRICS, RUN, check
from prdp_fast.prompts.shards import INDEX, build_text_shards, write_index, write_shards
from prdp_fast.prompts.stream import PromptSet
from prdp_fast.reporting.curves import read_metrics
from prdp_fast.rewards.base import Reward, RewardOutput
from prdp_fast.rewards.http import HttpReward
from prdp_fast.rewards.server import Refused, decode_and_answer
from prdp_fast.studies.declaration import load_study
from prdp_fast.training.telemetry import keep_epochs_before

TOLD = (UserError, Refused)  # what a user, or a client, gets as one line


class Target(NamedTuple):
    name: str
    inputs: st.SearchStrategy[Any]
    read: Callable[[Any, Path], object]  # the input, and an empty directory


def as_json(tree: Any) -> bytes:
    """Also what is no strict JSON, as other programs write it. A lone surrogate goes out as its escape."""
    return json.dumps(tree).encode()


def as_yaml(tree: Any) -> bytes:
    return yaml.safe_dump(tree).encode("utf-8", "surrogatepass")


# Configuration.

RECIPE = yaml.safe_load(find_recipe("smoke").read_text())
DEEPSPEED = [json.loads((CONFIGS / name).read_text()) for name in ("zero2.json", "zero3_offload.json")]
STUDY = yaml.safe_load((CONFIGS / "studies" / "clipping.yaml").read_text())


def recipe(content: bytes, directory: Path) -> None:
    path = directory / "recipe.yaml"
    path.write_bytes(content)
    load_recipe(str(path))


def override(words: list[str], _: Path) -> None:
    load_recipe("smoke", words)


def deepspeed(content: bytes, directory: Path) -> None:
    path = directory / "config.json"
    path.write_bytes(content)
    resolve_config(str(path), load_recipe("smoke"), world_size=2, stochastic_steps=4, cuda=False)


def study(content: bytes, directory: Path) -> None:
    path = directory / "study.yaml"
    path.write_bytes(content)
    load_study(str(path))


# Prompts.

PROMPTS = [Prompt(number, f"a {colour} square", {"kind": number}) for number, colour in enumerate(("red", "blue", "green"))]


def prompt_files(tmp: Path) -> tuple[dict[str, Any], bytes]:
    """An index and its shard."""
    write_index(tmp, {"train": write_shards(PROMPTS, tmp, "train")}, "1-test")
    index = json.loads((tmp / INDEX).read_text())
    return index, (tmp / index["sets"]["train"]["shards"][0]["file"]).read_bytes()


def read_prompts(directory: Path) -> None:
    for name in ("train", "seen"):
        try:
            list(PromptSet.open(directory, name))
        except UserError:
            if name == "train":
                raise


def index(tree: Any, directory: Path, shard: bytes, file: str) -> None:
    (directory / file).write_bytes(shard)
    (directory / INDEX).write_bytes(as_json(tree))
    read_prompts(directory)


def shard(content: bytes, directory: Path, tree: Any) -> None:
    """The index has the digest of the damaged bytes, as that of somebody who means harm would."""
    entry = tree["sets"]["train"]["shards"][0]
    entry |= {"bytes": max(1, len(content)), "sha256": hashlib.sha256(content).hexdigest()}
    (directory / entry["file"]).write_bytes(content)
    (directory / INDEX).write_bytes(as_json(tree))
    read_prompts(directory)


def text_file(content: bytes, directory: Path) -> None:
    path = directory / "prompts.txt"
    path.write_bytes(content)
    built = directory / "built"
    try:
        build_text_shards(path, built)
    except UserError:
        assert not (built / INDEX).exists(), "an index stands beside nothing"
        raise
    list(PromptSet.open(built, "train"))


# Run directories.

JOB = {"recipe": load_recipe("smoke").model_dump(mode="json"), "deepspeed": {"zero_optimization": {"stage": 2}}, "world_size": 2}
ROWS = b"".join(as_json({"schema": 1, "epoch": epoch, "reward": 0.5, "loss": None}) + b"\n" for epoch in range(4))


def run_record(tree: Any, directory: Path) -> None:
    (directory / RUN).write_bytes(as_json(tree))
    (directory / METRICS).write_bytes(ROWS)
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    try:
        check(directory, JOB, "auto", lambda old: old)
    finally:
        assert {path.name: path.read_bytes() for path in directory.iterdir()} == before, "a refused directory was touched"


def metrics(content: bytes, directory: Path) -> None:
    path = directory / METRICS
    path.write_bytes(content)
    read_metrics(path)
    keep_epochs_before(path, 3)
    assert all(row["epoch"] < 3 for row in read_metrics(path))


def checkpoint(tmp: Path) -> dict[str, bytes]:
    (tmp / checkpoint_files.STATE).write_text(json.dumps({"epoch": 3, checkpoint_files.PROVEN: True}))
    (tmp / "weights.safetensors").write_bytes(b"weights" * 100)
    files = {path.name: checkpoint_files.measure(path) for path in tmp.iterdir()}
    checkpoint_files.write_manifest(tmp, files, kept=False)
    return {path.name: path.read_bytes() for path in tmp.iterdir()}


def manifest(tree: Any, directory: Path, files: dict[str, bytes], *, forged: bool) -> None:
    """It is whole or has a fault in words. A forged one has a right digest of itself."""
    for name, content in files.items():
        (directory / name).write_bytes(content)
    if forged and isinstance(tree, dict):
        content = {name: value for name, value in tree.items() if name != checkpoint_files.HASH}
        tree = content | {checkpoint_files.HASH: checkpoint_files._digest(content)}
    (directory / checkpoint_files.MANIFEST).write_bytes(as_json(tree))
    found, fault = checkpoint_files.look(directory)
    fault = fault or checkpoint_files.content_fault(directory, sorted(found.items()))
    assert fault is None or (fault and "\n" not in fault), repr(fault)
    if fault is None:
        assert set(files) - {checkpoint_files.MANIFEST} == set(found), "a checkpoint is whole without a file"


# Rewards over HTTP.


class Bright(Reward):
    name = "bright"

    def score(self, images: Any, prompts: Any, metadata: Any) -> RewardOutput:
        return RewardOutput(images.float().mean((1, 2, 3)))


def png() -> str:
    stream = io.BytesIO()
    Image.new("RGB", (4, 4), (200, 30, 40)).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


REQUEST = {"images": [png(), png()], "prompts": ["a", "b"], "metadata": [{}, {"k": 1}]}
ANSWER = {"scores": [0.5, None], "details": {"fill": [1.0, 2.0]}}


def request(body: bytes, _: Path) -> None:
    answer = decode_and_answer(Bright(), body, 8, torch.device("cpu"))
    assert len(answer["scores"]) == len(json.loads(body)["images"])


def image(data: bytes, _: Path) -> None:
    request(as_json(REQUEST | {"images": [png(), base64.b64encode(data).decode()]}), _)


def response(content: bytes, _: Path) -> None:
    reward = HttpReward(url="http://127.0.0.1:9")
    reward._post = lambda body, until: content  # type: ignore[method-assign]
    output = reward.score(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), ["a", "b"], [{}, {}])
    assert output.scores.shape == (2,) and all(values.shape == (2,) for values in output.details.values())


def targets(tmp: Path) -> list[Target]:
    """Args: tmp: for the files that the inputs start from."""
    prompts, saved = tmp / "prompts", tmp / "checkpoint"
    prompts.mkdir()
    saved.mkdir()
    tree, tar = prompt_files(prompts)
    file = tree["sets"]["train"]["shards"][0]["file"]
    files = checkpoint(saved)
    proof = json.loads(files[checkpoint_files.MANIFEST])
    keys = st.sampled_from(["seed", "objective.kl_weight", "rewards.0.weight", "schedule.epochs", "x", "rewards", "rewards.9.x"])
    words = st.lists(st.builds("{}={}".format, keys, VALUES.map(str)) | st.text(max_size=20), min_size=1, max_size=2)
    return [
        Target("recipe", changed(RECIPE).map(as_yaml), recipe),
        Target("recipe, bytes", edited(as_yaml(RECIPE)), recipe),
        Target("--set", words, override),
        Target("DeepSpeed JSON", st.one_of(*map(changed, DEEPSPEED)).map(as_json), deepspeed),
        Target("DeepSpeed JSON, bytes", edited(as_json(DEEPSPEED[1])), deepspeed),
        Target("study", changed(STUDY).map(as_yaml), study),
        Target("shard index", changed(tree), lambda value, directory: index(value, directory, tar, file)),
        Target("shard", edited(tar), lambda value, directory: shard(value, directory, copy.deepcopy(tree))),
        Target(
            "shard, unpacked", edited(gzip.decompress(tar)), lambda value, directory: shard(value, directory, copy.deepcopy(tree))
        ),
        Target("text file of prompts", edited("a red square\nein Gr\u00fcn\n".encode()) | st.binary(max_size=64), text_file),
        Target("run.json", changed(JOB), run_record),
        Target("metrics.jsonl", edited(ROWS), metrics),
        Target("manifest", changed(proof), lambda value, directory: manifest(value, directory, files, forged=False)),
        Target("manifest, forged", changed(proof), lambda value, directory: manifest(value, directory, files, forged=True)),
        Target("reward request", changed(REQUEST).map(as_json), request),
        Target("reward request, bytes", edited(as_json(REQUEST)), request),
        Target("image of a request", edited(base64.b64decode(png())), image),
        Target("reward answer", changed(ANSWER).map(as_json), response),
        Target("reward answer, bytes", edited(as_json(ANSWER)), response),
    ]
