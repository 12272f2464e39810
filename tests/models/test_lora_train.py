"""LoRA through the deepspeed command at ZeRO-2, for every family: train, resume, export, open in a fresh process."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import launching
import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard
from launching import TRAIN
from safetensors.torch import load_file
from tiny_pipelines import FAMILIES, build

from prdp_fast import cli
from prdp_fast.acceleration.probe import distance
from prdp_fast.models import lora

pytestmark = pytest.mark.slow

EPOCHS = 2
SETTINGS = [
    "model.lora={rank: 2, alpha: 3}", "rewards=[{name: jpeg_size}]", f"schedule.epochs={EPOCHS}", "schedule.updates_per_epoch=1",
    "schedule.prompts_per_epoch=2", "schedule.images_per_prompt=2", "evaluation.prompts=2", "sampler.num_inference_steps=3",
    "optimizer.learning_rate=1e-2", "optimizer.eps=1e-4", "checkpoint.keep=2", "performance.attention=sdpa",
    "performance.compile=off",
]  # fmt: skip


def train(model: Path, output: Path, *arguments: str, ranks: int = 1, more: tuple[str, ...] = ()) -> str:
    words = [word for setting in [*SETTINGS, f"model.pretrained={model}", *more] for word in ("--set", setting)]
    result = launching.run(
        TRAIN, "--recipe", "smoke", "--config", "zero2.json", "--output", output, *words, *arguments, ranks=ranks,
        cwd=output.parent,
    )  # fmt: skip
    return result.stdout


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pipelines")
    return {family: build(family, root / family) for family in FAMILIES}


@pytest.fixture(scope="module")
def runs(models: dict[str, Path], tmp_path_factory) -> dict[str, tuple[Path, str]]:
    """A run of each family on one rank, and what it printed. SD 2's is averaged and is to be pushed, with no network there."""
    root = tmp_path_factory.mktemp("runs")
    more = {"sd2": ("model.ema_decay=0.5", "model.push_to_hub=me/tuned")}
    return {
        family: (root / family, train(models[family], root / family, more=more.get(family, ()))) for family in FAMILIES
    }  # fmt: skip


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / lora.WEIGHTS)


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_trains_the_adapter(runs: dict[str, tuple[Path, str]], family: str) -> None:
    run, printed = runs[family]
    rows = metrics(run)
    assert [row["epoch"] for row in rows] == list(range(EPOCHS))
    for row in rows:
        assert all(math.isfinite(row[name]) for name in ("reward", "loss", "log_prob", "grad_norm"))
        assert row["grad_norm"] > 0 and row["skipped_updates"] == 0 and row["drift"] < 1e-4
    assert rows[0]["kl_to_reference"] == 0 and rows[1]["kl_to_reference"] != 0
    trained = weights(run)
    # Zero before the first update. At the lowest level of SD's four there is one token, to which query and key are nothing.
    moved = {name for name, value in trained.items() if ".lora_B." in name and (value != 0).any()}
    assert moved >= {name for name in trained if ".to_v.lora_B." in name or ".to_out.0.lora_B." in name}
    assert any(".to_q.lora_B." in name for name in moved) and any(".to_k.lora_B." in name for name in moved)
    acceleration = json.loads((run / "acceleration.json").read_text())
    assert acceleration["fuse_qkv"]["value"] == "off" and "reference weights" not in printed
    # A checkpoint and the result are of the adapter's size, not the model's.
    size = sum(value.numel() * 4 for value in trained.values())
    states = list(run.glob("checkpoints/epoch-*/zero/*model_states.pt"))
    assert len(states) == 2
    for state in states:
        module = torch.load(state, weights_only=False)["module"]
        assert sum(value.numel() * 4 for value in module.values()) == size and all("lora_" in name for name in module)
    card = ModelCard.load(run / "model" / "README.md")
    assert "lora" in card.data.tags and "| seen | 2 |" in card.text and (run / "model" / "before_after.png").is_file()


def test_a_failed_push_costs_a_line(runs: dict[str, tuple[Path, str]]) -> None:
    run, printed = runs["sd2"]
    assert f"by hand: hf upload me/tuned {run / 'model'}" in printed and (run / "summary.json").is_file()


FRESH = """
import sys, torch
from diffusers import DDIMScheduler, DiffusionPipeline
for base, adapter, result in zip(sys.argv[1::3], sys.argv[2::3], sys.argv[3::3]):
    pipe = DiffusionPipeline.from_pretrained(base, dtype=torch.float32)
    pipe.scheduler = DDIMScheduler.from_pretrained(adapter, subfolder="scheduler")
    pipe.load_lora_weights(adapter)
    assert not any(name.startswith("prdp") for name in sys.modules)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(["a red circle", "two blue squares"], num_inference_steps=3, guidance_scale=2.0, output_type="pt",
                  generator=torch.Generator().manual_seed(0)).images
    torch.save(images, result)
"""


def test_the_adapters_open_in_a_fresh_process(runs: dict[str, tuple[Path, str]], models: dict[str, Path], tmp_path: Path) -> None:
    """and paint what their product paints, written into the base's weights by hand."""
    files = {family: tmp_path / f"{family}.pt" for family in FAMILIES}
    arguments = [str(path) for family in FAMILIES for path in (models[family], runs[family][0] / "model", files[family])]
    subprocess.run(
        [sys.executable, "-c", FRESH, *arguments], check=True, cwd=tmp_path, timeout=200, env={**os.environ, "PYTHONPATH": ""}
    )
    for family, file in files.items():
        pipe = DiffusionPipeline.from_pretrained(models[family], dtype=torch.float32)
        pipe.set_progress_bar_config(disable=True)
        run = runs[family][0]
        pipe.scheduler = type_of_scheduler(run).from_pretrained(run / "model", subfolder="scheduler")
        before = paint(pipe)
        adapter = weights(run)
        with torch.no_grad():
            for name in [name for name in adapter if ".lora_A." in name]:
                layer = pipe.unet.get_submodule(name.removeprefix("unet.").split(".lora_A.")[0])
                layer.weight += adapter[name.replace(".lora_A.", ".lora_B.")] @ adapter[name]  # its B has alpha / rank in it
        after = paint(pipe)
        torch.testing.assert_close(torch.load(file, weights_only=True), after, rtol=0, atol=1e-4)
        assert (after - before).abs().max() > 1e-3


def type_of_scheduler(run: Path):
    import diffusers

    config = json.loads((run / "model" / "scheduler" / "scheduler_config.json").read_text())
    return getattr(diffusers, config["_class_name"])


def paint(pipe: DiffusionPipeline) -> torch.Tensor:
    return pipe(
        ["a red circle", "two blue squares"], num_inference_steps=3, guidance_scale=2.0, output_type="pt",
        generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip


@pytest.mark.distributed
def test_on_two_ranks_and_resumed(runs: dict[str, tuple[Path, str]], models: dict[str, Path], tmp_path: Path) -> None:
    """Two ranks train and average as one does, and what is resumed after the first epoch ends in the same bits."""
    run, more = tmp_path / "two", ("model.ema_decay=0.5",)
    train(models["sd2"], run, ranks=2, more=more)
    for row, alone in zip(metrics(run), metrics(runs["sd2"][0]), strict=True):
        for name in ("reward", "log_prob", "loss", "grad_norm"):
            assert row[name] == pytest.approx(alone[name], rel=2e-3, abs=1e-6), f"epoch {row['epoch']}: {name}"
    whole = weights(run)
    assert distance(list(whole.values()), [weights(runs["sd2"][0])[name] for name in whole]) < 1e-3
    for path in [*run.glob("checkpoints/epoch-000002"), run / "model"]:
        shutil.rmtree(path)
    (run / "summary.json").unlink()
    train(models["sd2"], run, "--resume", "auto", ranks=2, more=more)
    assert same(weights(run), whole)
    assert [row["epoch"] for row in metrics(run)] == list(range(EPOCHS))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_adapter_is_taken_out_of_a_checkpoint(runs: dict[str, tuple[Path, str]], family: str, tmp_path: Path) -> None:
    """No job, no weights of the base: what the run exported, to the byte."""
    run, _ = runs[family]
    assert cli.main(["checkpoint", "export", str(run), str(tmp_path / "made")]) == 0
    made = {path.relative_to(tmp_path / "made"): path.read_bytes() for path in (tmp_path / "made").rglob("*") if path.is_file()}
    assert {str(path) for path in made} >= {lora.WEIGHTS, lora.PEFT, lora.KOHYA, "README.md"}
    assert all((run / "model" / path).read_bytes() == data for path, data in made.items() if path.name != "README.md")
