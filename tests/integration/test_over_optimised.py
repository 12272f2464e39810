"""A run whose trained reward rises while a held-out one falls ends by itself where the recipe says so, with the best kept."""

from __future__ import annotations

import json
from pathlib import Path

import launching
import pytest

REWARDS = """
import itertools

risen, fallen = itertools.count(), itertools.count()


def rising(images, prompts):
    return images.float().mean((1, 2, 3)) / 2550 + next(risen)


def falling(images, prompts):
    return images.float().mean((1, 2, 3)) / 2550 - next(fallen)
"""


@pytest.mark.parametrize("what", ["warn", "stop"])
def test_the_run_goes_on_or_ends(tmp_path: Path, what: str) -> None:
    (tmp_path / "rewards.py").write_text(REWARDS)
    rising, falling = (
        f"{{name: python, options: {{function: '{tmp_path}/rewards.py:{name}'}}}}" for name in ("rising", "falling")
    )
    run = tmp_path / "run"
    words = [
        "schedule.epochs=3", "schedule.updates_per_epoch=1", "schedule.prompts_per_epoch=2", "schedule.images_per_prompt=4",
        f"rewards=[{rising}]", f"evaluation.rewards=[{falling}]", "evaluation.prompts=4", "evaluation.every=1",
        f"evaluation.on_over_optimised={what}", "checkpoint.keep_best=evaluation/seen/held/python", "checkpoint.every=10",
        "checkpoint.keep=1",
    ]  # fmt: skip
    done = launching.run(
        launching.TRAIN, "--recipe", "smoke", "--config", "zero0.json", "--output", run,
        *(word for setting in words for word in ("--set", setting)),
    )  # fmt: skip
    said = (run / "messages.txt").read_text()
    assert "python, held out, has fallen by" in said, done
    summary = json.loads((run / "summary.json").read_text())
    assert summary["epochs"] == (1 if what == "stop" else 3)
    assert ("evaluation.on_over_optimised: stopping after 1 of 3 epochs" in said) == (what == "stop")
    assert (run / "model").is_dir() and (run / "checkpoints" / "epoch-000001").is_dir()
