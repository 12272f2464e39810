"""Numbers that go wrong in launched jobs of two ranks: every rank stops, with one line, and what was computed is kept.

A reward's file is imported by every rank before anything is built, so that faults are put in there.
"""

from __future__ import annotations

import json
from pathlib import Path

import launching
import pytest
from launching import TRAIN, Finished

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

SMALL = {
    "schedule.epochs": 9, "schedule.updates_per_epoch": 1, "schedule.prompts_per_epoch": 4, "schedule.images_per_prompt": 4,
    "sampler.num_inference_steps": 3, "evaluation.prompts": 0, "optimizer.learning_rate": 1e-4, "checkpoint.every": 50,
    "performance.attention": "sdpa", "performance.fuse_qkv": "off",
}  # fmt: skip
SCORE = """
import os
import torch
RANK = int(os.environ.get("RANK", "0"))
def score(images, prompts):
    return images.float().mean((1, 2, 3)) / 255
"""
# After `good` updates no gradient is finite.
NO_GRADIENT = """
from prdp_fast.training.engine import ZeroEngine
plain_backward = ZeroEngine.backward
def backward(self, loss, *, last):
    plain_backward(self, loss * float("nan") if self.updates >= {good} else loss, last=last)
ZeroEngine.backward = backward
"""
# Rank 1 loses an image of epochs 1, 3 and 4; both ranks' memory holds 3 trajectories; the ranks' rewards have other details.
LOST_IMAGES = """
from prdp_fast.rewards import RewardOutput
from prdp_fast.training import trainer
plain_rollout, plain_score = trainer.rollout, score
def rollout(*args, **options):
    if options["batch"] > 3:
        raise torch.OutOfMemoryError("CUDA out of memory")
    found = plain_rollout(*args, **options)
    if RANK == 1 and options["epoch"] in (1, 3, 4) and "MENDED" not in os.environ:
        found.latents[2, 2:] = float("nan")
        found.log_probs[2, 1:] = float("nan")
    return found
trainer.rollout = rollout
def score(images, prompts):
    details = {"words": torch.ones(len(images))} if RANK == 1 else {}
    return RewardOutput(plain_score(images, prompts), details)
"""


def start(run: Path, code: str, ranks: int = 2, env: dict[str, str] | None = None, **changes: object) -> Finished:
    file = run.parent / "reward.py"
    file.write_text(SCORE + code)
    values = SMALL | {"rewards": f"[{{name: python, options: {{function: '{file}:score'}}}}]"}
    values |= {name.replace("__", "."): value for name, value in changes.items()}
    return launching.start(
        TRAIN, "--config", "zero2.json", "--recipe", "smoke", "--output", run, *launching.settings(values), ranks=ranks, env=env
    ).wait(200)  # fmt: skip


def refusal(finished: Finished) -> str:
    """Its one line."""
    assert finished.returncode == 2 and "Traceback" not in finished.text, finished.text[-4000:]
    (line,) = [line for line in finished.text.splitlines() if "error: " in line]
    return line


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_updates_that_are_skipped_in_a_row_stop_every_rank_with_the_last_good_state(tmp_path: Path) -> None:
    run = tmp_path / "run"
    line = refusal(start(run, NO_GRADIENT.format(good=2), schedule__max_skipped_updates=3))
    assert "epoch 4: 3 updates in a row had a non-finite gradient and were skipped (loss scale 0.0" in line
    assert "objective.kl_weight" in line and f"5 finished epochs are saved in {run}" in line
    assert checkpoints(run) == ["epoch-000005"] and not (run / "model").exists() and not (run / "summary.json").exists()
    assert [row["skipped_updates"] for row in rows(run)] == [0, 0, 1, 1, 1]
    state = json.loads((run / "checkpoints/epoch-000005/state.json").read_text())
    assert state["skipped_in_row"] == 3


def test_a_run_without_a_single_update_exports_nothing(tmp_path: Path) -> None:
    run = tmp_path / "run"
    line = refusal(start(run, NO_GRADIENT.format(good=0), schedule__epochs=2))
    assert "no update was applied in 2 epochs: nothing was learnt, and nothing is exported; every one of them was skipped" in line
    assert checkpoints(run) == ["epoch-000002"] and not (run / "model").exists() and not (run / "summary.json").exists()


def test_images_that_are_lost_are_counted_and_stop_the_run_time_after_time(tmp_path: Path) -> None:
    run = tmp_path / "run"
    finished = start(run, LOST_IMAGES, schedule__max_nonfinite_epochs=2, schedule__epochs=6)
    line = refusal(finished)
    assert "epoch 4, rollout: the latents of 1 of 16 images are not finite; every weight of the unet is finite" in line
    assert f"4 finished epochs are saved in {run}" in line and checkpoints(run) == ["epoch-000004"]
    assert [row["nonfinite_images"] for row in rows(run)] == [0, 1, 0, 1]
    assert all(value is not None for row in rows(run) for value in row.values()), "NaN went on to a metric"
    assert all(row["drift"] < 1e-4 and row["skipped_updates"] == 0 and row["grad_norm"] > 0 for row in rows(run))
    # The ranks' rewards have other details, and their metrics are one row all the same.
    assert all(row["reward/python/words"] == 1.0 for row in rows(run))
    assert finished.text.count("epoch 1, rollout: the latents of 1 of 16 images are not finite: they have no reward") == 1
    # The memory that the rollout lacked.
    assert finished.text.count("out of memory in the rollout with a batch of 8: going on with 4") == 1
    assert finished.text.count("out of memory in the rollout with a batch of 4: going on with 2") == 1
    state = json.loads((run / "checkpoints/epoch-000004/state.json").read_text())
    assert state["batches"] == {"rollout": 2} and state["nonfinite_in_row"] == 1

    # Mended, the same run goes on, with a smaller micro-batch as an error about memory would have advised.
    finished = start(
        run, LOST_IMAGES, env={"MENDED": "1"}, schedule__max_nonfinite_epochs=2, schedule__epochs=6, schedule__micro_batch=5,
        performance__activation_checkpointing=True, sampler__rollout_batch=3,
    )  # fmt: skip
    assert finished.returncode == 0, finished.text[-4000:]
    assert "out of memory" not in finished.text
    state = json.loads((run / "checkpoints/epoch-000006/state.json").read_text())
    assert state["micro_batch"] == 5 and state["batches"] == {} and state["nonfinite_in_row"] == 0


def test_a_first_epoch_with_an_image_that_is_not_finite_ends_at_once(tmp_path: Path) -> None:
    run = tmp_path / "run"
    line = refusal(start(run, LOST_IMAGES.replace("(1, 3, 4)", "(0,)")))
    assert "epoch 0, rollout: the latents of 1 of 16 images are not finite" in line
    assert checkpoints(run) == [] and rows(run) == []
