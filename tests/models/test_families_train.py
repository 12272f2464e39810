"""Each family through the deepspeed command: train, resume, export, open in a fresh process; SDXL on two ranks as on one."""

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
from diffusers import DiffusionPipeline, UNet2DConditionModel
from launching import TRAIN
from safetensors.torch import load_file
from tiny_pipelines import FAMILIES, build

pytestmark = pytest.mark.slow

EPOCHS, STEPS, PROMPTS, IMAGES = 2, 3, 2, 2
SETTINGS = [
    "rewards=[{name: jpeg_size}]", f"schedule.epochs={EPOCHS}", "schedule.updates_per_epoch=1",
    f"schedule.prompts_per_epoch={PROMPTS}", f"schedule.images_per_prompt={IMAGES}", "evaluation.prompts=2",
    f"sampler.num_inference_steps={STEPS}", "optimizer.learning_rate=1e-3", "checkpoint.keep=2",
    "performance.attention=sdpa", "performance.fuse_qkv=off", "performance.compile=off",
]  # fmt: skip


def train(model: Path, output: Path, *arguments: str, ranks: int) -> Path:
    words = [word for setting in [*SETTINGS, f"model.pretrained={model}"] for word in ("--set", setting)]
    launching.run(
        TRAIN, "--recipe", "smoke", "--config", "zero2.json", "--output", output, *words, *arguments, ranks=ranks,
        cwd=output.parent,
    )  # fmt: skip
    return output


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pipelines")
    return {family: build(family, root / family) for family in FAMILIES}


@pytest.fixture(scope="module")
def runs(models: dict[str, Path], tmp_path_factory) -> dict[str, Path]:
    """A run of each family on one rank."""
    root = tmp_path_factory.mktemp("runs")
    return {family: train(models[family], root / family, ranks=1) for family in FAMILIES}


def weights(directory: Path, component: str = "unet") -> dict[str, torch.Tensor]:
    (file,) = (directory / component).glob("*.safetensors")
    return load_file(file)


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_trains_the_unet_and_nothing_else(runs: dict[str, Path], models: dict[str, Path], family: str) -> None:
    run, rows = runs[family], metrics(runs[family])
    assert [row["epoch"] for row in rows] == list(range(EPOCHS))
    for row in rows:
        assert all(math.isfinite(row[name]) for name in ("reward", "loss", "log_prob", "grad_norm"))
        assert row["grad_norm"] > 0 and row["skipped_updates"] == 0 and row["drift"] < 1e-4
    assert rows[0]["kl_to_reference"] == 0 and rows[1]["kl_to_reference"] != 0
    before, after = weights(models[family]), weights(run / "model")
    assert before.keys() == after.keys()
    # AdamW's first steps move every weight that has a gradient by about the learning rate.
    still = [name for name in before if torch.equal(before[name], after[name])]
    assert not still, still
    components = {"vae", "text_encoder"} | ({"text_encoder_2"} if family == "sdxl" else set())
    for component in components:
        before, after = weights(models[family], component), weights(run / "model", component)
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


FRESH = """
import sys, torch
from diffusers import DiffusionPipeline
for directory, result in zip(sys.argv[1::2], sys.argv[2::2]):
    pipe = DiffusionPipeline.from_pretrained(directory, dtype=torch.float32)
    assert not any(name.startswith("prdp") for name in sys.modules)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(["a red circle", "two blue squares"], num_inference_steps=3, guidance_scale=2.0, output_type="pt",
                  generator=torch.Generator().manual_seed(0)).images
    torch.save([type(pipe).__name__, images], result)
"""


def test_the_exports_open_in_a_fresh_process(runs: dict[str, Path], models: dict[str, Path], tmp_path: Path) -> None:
    """and paint what the original pipeline paints with the trained weights."""
    files = {family: tmp_path / f"{family}.pt" for family in FAMILIES}
    arguments = [str(path) for family in FAMILIES for path in (runs[family] / "model", files[family])]
    subprocess.run(
        [sys.executable, "-c", FRESH, *arguments], check=True, cwd=tmp_path, timeout=200, env={**os.environ, "PYTHONPATH": ""}
    )
    for family, file in files.items():
        name, images = torch.load(file, weights_only=True)
        pipe = DiffusionPipeline.from_pretrained(models[family], dtype=torch.float32)
        assert name == type(pipe).__name__
        pipe.set_progress_bar_config(disable=True)
        pipe.scheduler = DiffusionPipeline.from_pretrained(runs[family] / "model").scheduler
        before = paint(pipe)
        pipe.unet = UNet2DConditionModel.from_pretrained(runs[family] / "model", subfolder="unet").eval()
        assert torch.equal(images, paint(pipe))
        assert (images - before).abs().max() > 1 / 255


def paint(pipe: DiffusionPipeline) -> torch.Tensor:
    return pipe(
        ["a red circle", "two blue squares"], num_inference_steps=3, guidance_scale=2.0, output_type="pt",
        generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip


@pytest.mark.distributed
def test_sdxl_on_two_ranks_and_resumed(runs: dict[str, Path], models: dict[str, Path], tmp_path: Path) -> None:
    """Two ranks train as one does, and what is resumed after the first epoch ends in the same bits."""
    run = train(models["sdxl"], tmp_path / "two", ranks=2)
    for row, alone in zip(metrics(run), metrics(runs["sdxl"]), strict=True):
        for name in ("reward", "log_prob", "loss", "grad_norm"):
            assert row[name] == pytest.approx(alone[name], rel=2e-3, abs=1e-6), f"epoch {row['epoch']}: {name}"
    whole = weights(run / "model")
    for path in [*run.glob("checkpoints/epoch-000002"), run / "model"]:
        shutil.rmtree(path)
    (run / "summary.json").unlink()
    train(models["sdxl"], run, "--resume", "auto", ranks=2)
    resumed = weights(run / "model")
    assert resumed.keys() == whole.keys() and all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert [row["epoch"] for row in metrics(run)] == list(range(EPOCHS))
