"""Objectives in whole jobs: who samples, what log-ratios are taken to, and what a resumed run remembers."""

from __future__ import annotations

import json
from pathlib import Path

import launching
import pytest
from launching import TRAIN

SMALL = {
    "sampler": "{num_inference_steps: 2, guidance_scale: null}", "evaluation.prompts": 0, "checkpoint.every": 1,
    "schedule": "{epochs: 2, updates_per_epoch: 1, prompts_per_epoch: 2, images_per_prompt: 3, micro_batch: 12}",
    "optimizer.learning_rate": 1e-3,
}  # fmt: skip


def train(output: Path, settings: dict[str, object], *, ranks: int | None = None, config: str = "zero0.json") -> list[dict]:
    """A job of two epochs; its metrics, a row each."""
    words = launching.settings(SMALL | settings)
    launching.run(TRAIN, "--config", config, "--recipe", "smoke", "--output", output, *words, ranks=ranks)
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_offline_trajectories_are_those_of_the_reference(tmp_path: Path) -> None:
    """What is sampled in the second epoch does not depend on what the first one taught; online it does."""
    still = {"optimizer.learning_rate": 1e-30}
    offline = "{name: prdp, kl_weight: 3e-5, clip_range: 1e-3, trajectories: reference}"
    base = train(tmp_path / "base", still)
    taught = train(tmp_path / "offline", {"objective": offline})
    online = train(tmp_path / "online", {})
    assert taught[1]["reward"] == base[1]["reward"] != online[1]["reward"]
    # The policy's own log-probs are by pass (1), never the sampler's: they agree, and have moved away from the reference.
    assert taught[1]["free_first_pass"] == 0.0 and taught[1]["drift"] < 1e-5 and taught[1]["first_ratio_error"] < 1e-5
    assert taught[1]["kl_to_reference"] < -1e-4, "samples of the reference are likelier under it"
    counts = [json.loads((tmp_path / name / "summary.json").read_text())["unet_forwards"] for name in ("offline", "online")]
    assert counts[0]["update"] - counts[1]["update"] == 2 * 6, "one more pass an epoch; of 2 steps the last is deterministic"


def test_the_moving_average_as_a_reference(tmp_path: Path) -> None:
    """An average that forgets at once is the policy itself; a slow one lies between it and the base."""
    objective = "{name: prdp, kl_weight: 3e-5, clip_range: 1e-3, reference: moving_average}"
    quick = train(tmp_path / "quick", {"objective": objective, "model.ema_decay": 1e-9}, ranks=2, config="zero2.json")
    slow = train(tmp_path / "slow", {"objective": objective, "model.ema_decay": 0.9})
    base = train(tmp_path / "base", {})
    assert abs(quick[1]["kl_to_reference"]) < 1e-6
    assert 1e-5 < abs(slow[1]["kl_to_reference"]) < abs(base[1]["kl_to_reference"])


@pytest.mark.parametrize("objective", ["{name: grpo}", "{name: dpok}", "{name: rwr}", "{name: rebel}"])
def test_every_rival_trains(tmp_path: Path, objective: str) -> None:
    rows = train(tmp_path / "run", {"objective": objective, "schedule.updates_per_epoch": 2})
    assert [row["epoch"] for row in rows] == [0, 1] and all(row["grad_norm"] > 0 for row in rows)
    assert ("kl_to_reference" in rows[1]) == ("grpo" in objective or "dpok" in objective)


def test_running_statistics_are_resumed_and_shared_by_ranks(tmp_path: Path) -> None:
    """The same prompts come every epoch, so that the second one's advantages depend on the first one's rewards."""
    job = {
        "objective": "{name: ddpo, normalization: running, running_buffer: 8, running_min_count: 4}", "prompts.limit": 2,
    }  # fmt: skip
    whole = train(tmp_path / "whole", job)
    train(tmp_path / "parts", job | {"schedule.epochs": 1})
    resumed = train(tmp_path / "parts", job)
    two_ranks = train(tmp_path / "ranks", job, ranks=2)
    other = train(tmp_path / "other", job | {"objective": "{name: ddpo, normalization: per_prompt}"})
    measured = ("reward", "loss", "grad_norm", "mean_abs_advantage")
    for name in measured:
        assert resumed[1][name] == whole[1][name], name
        assert two_ranks[1][name] == pytest.approx(whole[1][name], rel=1e-3, abs=1e-6), name
    assert other[1]["mean_abs_advantage"] != pytest.approx(whole[1]["mean_abs_advantage"], rel=1e-3)
    state = json.loads((tmp_path / "ranks" / "checkpoints" / "epoch-000002" / "state.json").read_text())
    assert sorted(map(len, state["prompt_rewards"].values())) == [6, 6]


def test_a_held_out_reward_in_a_whole_job(tmp_path: Path) -> None:
    """Beside the trained one at every evaluation; training itself does not notice it."""
    held = {
        "evaluation": "{prompts: 4, every: 1, rewards: [{name: jpeg_size}]}", "schedule.epochs": 1,
    }  # fmt: skip
    settings = {name: value for name, value in SMALL.items() if not name.startswith("evaluation")} | held
    launching.run(
        TRAIN, "--config", "zero0.json", "--recipe", "smoke", "--output", tmp_path / "run", *launching.settings(settings), ranks=2
    )
    plain = train(tmp_path / "plain", {"schedule.epochs": 1})
    (row,) = (json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert row["loss"] == pytest.approx(plain[0]["loss"], rel=1e-3) and "reward/jpeg_size" not in row
    for sets in json.loads((tmp_path / "run" / "summary.json").read_text())["evaluation"].values():
        assert sets["held"]["jpeg_size"]["before"]["n"] == 4 and sets["held"]["jpeg_size"]["after"]["mean"] < 0
    assert "jpeg_size (held out)" in (tmp_path / "run" / "model" / "README.md").read_text()
