"""The command itself, as a user runs it: launch, kill, resume, export."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import launching
import pytest
import torch
from launching import TRAIN, deepspeed_command
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

SMALL = [
    "--recipe", "smoke", "--config", "zero2.json", "--set", "schedule.epochs=5", "--set", "evaluation.prompts=48",
    "--set", "sampler.num_inference_steps=3", "--set", "checkpoint.keep=2",
    # What `auto` measures at start could come out otherwise in another run, which would then round differently.
    "--set", "performance.attention=sdpa", "--set", "performance.fuse_qkv=off",
]  # fmt: skip


def train(output: Path, *arguments: str) -> str:
    """What it printed."""
    return launching.run(TRAIN, *SMALL, "--output", output, *arguments).stdout


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model/unet/diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory) -> tuple[Path, str]:
    """An uninterrupted run, and what it printed."""
    output = tmp_path_factory.mktemp("whole") / "run"
    return output, train(output)


def test_a_run_leaves_what_it_promises(whole_run: tuple[Path, str]) -> None:
    run, printed = whole_run
    assert printed.rstrip().splitlines()[-1] == str(run)
    summary = json.loads((run / "summary.json").read_text())
    for split in ("seen", "unseen"):
        for moment in ("before", "after"):
            assert {"mean", "stderr", "n", "strict"} <= summary["evaluation"][split][moment].keys()
            assert summary["evaluation"][split][moment]["n"] == 48
    images = 5 * 4 * 4
    assert summary["epochs"] == 5 and summary["images"] == images and summary["wall_s"] > 0
    # 3 steps, 2 of them stochastic with DDPM; guidance doubles; the first epoch's reference is the policy itself; K = 2: two
    # gradient passes and one pass (1).
    forwards = {"rollout": images * 3 * 2, "reference": (images - 16) * 2 * 2, "update": images * 2 * 2 * 3}
    assert summary["unet_forwards"] == forwards
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == list(range(5))
    assert all(line["drift"] < 1e-4 for line in lines)
    assert list((run / "tensorboard").glob("events*"))
    assert {path.name for path in (run / "samples").glob("*.png")} >= {"before.png", "after.png", "before_after.png"}
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["epoch-000004", "epoch-000005"]


def test_the_triton_kernels_train_like_the_references(tmp_path: Path) -> None:
    """A run through every kernel, in Triton's interpreter, has the metrics of the run without."""
    rows = {}
    for kernels in ("torch", "triton"):
        run = tmp_path / kernels
        small = ["schedule.epochs=2", "evaluation.prompts=0", f"kernels={kernels}"]
        words = [word for setting in small for word in ("--set", setting)]
        command = [sys.executable, str(TRAIN), *SMALL, "--output", str(run), *words]
        interpret = str(int(kernels == "triton"))  # read when Triton is imported: a process of its own
        subprocess.run(command, check=True, capture_output=True, timeout=400, env=os.environ | {"TRITON_INTERPRET": interpret})
        rows[kernels] = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for reference, kernel in zip(rows["torch"], rows["triton"], strict=True):
        for name in ("reward", "log_prob", "loss", "grad_norm", "mean_abs_target", "clip_fraction", "pair_accuracy", "pairs"):
            # float32 rounding, through two updates of AdamW, whose first steps are as long for small gradients as for large ones
            assert kernel[name] == pytest.approx(reference[name], rel=1e-3, abs=2e-5), f"epoch {kernel['epoch']}: {name}"
        assert kernel["drift"] < 1e-4


@pytest.mark.parametrize("moment", ["random", "while a checkpoint is written"])
def test_a_killed_run_resumes_bit_for_bit(whole_run: tuple[Path, str], tmp_path: Path, moment: str) -> None:
    run = tmp_path / "run"
    job = launching.start(TRAIN, *SMALL, "--output", run)
    checkpoints = run / "checkpoints"
    deadline = time.monotonic() + 300
    if moment == "random":
        while not list(checkpoints.glob("epoch-*")):
            assert job.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(random.uniform(0, 4))
    else:
        while not (list(checkpoints.glob(".*.partial")) and list(checkpoints.glob("epoch-*"))):
            assert job.poll() is None and time.monotonic() < deadline
            time.sleep(0.0005)
    job.kill()
    whole = [path for path in checkpoints.glob("epoch-*") if (path / "state.json").exists()]
    assert whole, "no usable checkpoint was left"
    train(run, "--resume", "auto")
    expected = weights(whole_run[0])
    for name, tensor in weights(run).items():
        assert torch.equal(tensor, expected[name]), f"{name} differs by {(tensor - expected[name]).abs().max():.1e}"
    resumed, uninterrupted = (json.loads((path / "summary.json").read_text()) for path in (run, whole_run[0]))
    assert resumed["evaluation"] == uninterrupted["evaluation"]
    assert resumed["unet_forwards"] == uninterrupted["unet_forwards"]
    epochs = [json.loads(line)["epoch"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert epochs == list(range(5))


def test_a_lost_evaluation_of_the_reference_is_that_of_the_reference_again(whole_run: tuple[Path, str], tmp_path: Path) -> None:
    """Not of the trained weights, which are what a resumed run has at hand."""
    run = tmp_path / "run"
    shutil.copytree(whole_run[0], run, ignore=shutil.ignore_patterns("model", "summary.json", "evaluation_*"))
    (run / "evaluation_before.pt").write_bytes((whole_run[0] / "evaluation_before.pt").read_bytes()[:1000])  # and damaged
    assert "evaluation_before.pt is missing or damaged" in train(run)
    found, expected = (json.loads((path / "summary.json").read_text())["evaluation"] for path in (run, whole_run[0]))
    assert expected["unseen"]["before"]["mean"] != expected["unseen"]["after"]["mean"]
    for split in ("seen", "unseen"):
        assert found[split]["before"]["mean"] == pytest.approx(expected[split]["before"]["mean"], abs=1e-6)
        assert found[split]["after"] == expected[split]["after"]


FRESH = """
import json, sys, torch
from diffusers import StableDiffusionPipeline
pipe = StableDiffusionPipeline.from_pretrained(sys.argv[1], dtype=torch.float32)
pipe.set_progress_bar_config(disable=True)
assert not any(name.startswith("prdp") for name in sys.modules)
images = pipe(json.loads(sys.argv[2]), num_inference_steps=3, guidance_scale=2.0, output_type="np",
              generator=torch.Generator().manual_seed(0)).images
torch.save(torch.from_numpy((images * 255).round().astype("uint8")).permute(0, 3, 1, 2), sys.argv[3])
"""


def test_the_export_opens_in_a_fresh_process_and_scores_the_reported_reward(whole_run: tuple[Path, str], tmp_path: Path) -> None:
    from prdp_fast.world.reader import read_images

    run, _ = whole_run
    evaluation = torch.load(run / "evaluation_after.pt", weights_only=True)["unseen"]
    command = [sys.executable, "-c", FRESH, str(run / "model"), json.dumps(evaluation["prompts"]), str(tmp_path / "images.pt")]
    subprocess.run(command, check=True, cwd=tmp_path, timeout=300, env={**os.environ, "PYTHONPATH": ""})
    scores = read_images(torch.load(tmp_path / "images.pt", weights_only=True), evaluation["prompts"]).scores
    reported = json.loads((run / "summary.json").read_text())["evaluation"]["unseen"]["after"]
    difference = scores - evaluation["rewards"]  # same prompts, other noise
    assert abs(difference.mean()) < 4 * difference.std() / len(difference) ** 0.5
    assert abs(scores.mean() - reported["mean"]) < 4 * reported["stderr"]


def test_the_deepspeed_command_by_absolute_path_from_another_directory(tmp_path: Path) -> None:
    command = deepspeed_command(
        TRAIN, "--config", "zero2.json", "--recipe", "tiny_ddpo",
        "--set", "schedule.epochs=1", "--set", "evaluation.prompts=4", "--set", "sampler.num_inference_steps=2",
        "--set", "schedule.prompts_per_epoch=2", "--set", "schedule.images_per_prompt=2",
    )  # fmt: skip
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    (run,) = (tmp_path / "runs").iterdir()
    assert (run / "model" / "model_index.json").is_file()
    assert str(run) in result.stdout


def test_a_refusal_under_the_launcher_is_one_line_and_a_status(tmp_path: Path) -> None:
    arguments = ["--config", "zero2.json", "--recipe", "smoke", "--set", "schedule.prompts_per_epoch=3"]
    command = deepspeed_command(TRAIN, *arguments, ranks=2)
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode != 0
    printed = result.stdout + result.stderr
    assert printed.count("error: schedule.prompts_per_epoch is 3, not divisible by 2 ranks") == 1
    assert "Traceback" not in printed
    assert not (tmp_path / "runs").exists()
