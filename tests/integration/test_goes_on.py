"""A chain of starts of one command in one directory, with what happens to such a directory in between."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import launching
from launching import TRAIN

from prdp_fast.config.load import load_recipe
from prdp_fast.training.state import TrainState
from prdp_fast.training.trainer import Trainer

REWARD = """
def score(images, prompts):
    scores = images.float().mean((1, 2, 3))
    scores[1] = float("nan")
    return scores
"""


def test_time_limited_starts_go_on_until_every_epoch_is_done(tmp_path: Path) -> None:
    """The reward leaves one image of each call unscored; small files are damaged between the starts; then the reward changes."""
    (tmp_path / "reward.py").write_text(REWARD)
    arguments = [
        "--recipe", "smoke", *launching.settings({
            "rewards": "[{name: python, options: {function: 'reward.py:score'}}]", "sampler.num_inference_steps": 2,
            "schedule": "{epochs: 3, prompts_per_epoch: 2, images_per_prompt: 3, micro_batch: 8}", "evaluation.prompts": 3,
            "schedule.time_limit_minutes": 1e-9,
        }),
    ]  # fmt: skip
    first = launching.run(TRAIN, *arguments, cwd=tmp_path)
    assert "stopping after 1 of 3 epochs; the same command goes on" in first.stdout
    run = Path(first.stdout.splitlines()[-1])
    (run / "acceleration.json").write_text("")
    (run / "summary.json").write_text("{")
    with (run / "metrics.jsonl").open("a") as file:
        file.write("[" * 50_000 + '\n{"epoch": 1, "rew')
    second = launching.run(TRAIN, *arguments, cwd=tmp_path)
    assert "continuing after epoch 1" in second.stdout and "acceleration.json was damaged: chosen anew" in second.stdout
    assert second.stdout.splitlines()[-1] == str(run) and [path.name for path in (tmp_path / "runs").iterdir()] == [run.name]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [0, 1] and all(row["unscored"] == 1 for row in rows)
    assert json.loads((run / "acceleration.json").read_text())["attention"]["value"]

    summary = json.loads((run / "summary.json").read_text())
    for sets in summary["evaluation"].values():
        assert [sets[moment]["unscored"] for moment in ("before", "after")] == [1, 1]
        assert [sets[part]["n"] for part in ("before", "after", "difference")] == [2, 2, 2]
        assert all(math.isfinite(sets[part]["mean"]) for part in ("before", "after", "difference"))
    assert "left out: seen 1 before and 1 after" in (run / "model" / "README.md").read_text()
    record = json.loads((run / "run.json").read_text())
    assert set(record["content"]) == {"model.pretrained", "prompts.seen", "prompts.unseen", "rewards.python"}

    (tmp_path / "reward.py").write_text(REWARD.replace("mean", "amax"))
    third = launching.start(TRAIN, *arguments, cwd=tmp_path).wait()
    assert third.returncode == 2 and "Traceback" not in third.text
    assert "the content of rewards.python is not what the run started with" in third.text


def test_the_time_limit_is_of_each_start(monkeypatch) -> None:
    """A run of an hour that goes on has the whole limit before it; what it took is still counted over all starts."""
    now = 1000.0
    monkeypatch.setattr("prdp_fast.training.state.time.monotonic", lambda: now)
    monkeypatch.setattr("prdp_fast.training.trainer.distributed.all_reduce", lambda values, op: values)
    state = TrainState(epoch=5, wall_s=3600.0)
    state.start_clock()
    messages: list[str] = []
    trainer = SimpleNamespace(
        job=SimpleNamespace(settings=load_recipe("smoke", ["schedule.time_limit_minutes=2", "schedule.epochs=9"])),
        telemetry=SimpleNamespace(first_epoch=4, message=messages.append), state=state, stopped_over_optimised=False,
    )  # fmt: skip
    now += 119
    assert not Trainer.finished(trainer) and state.summary()["wall_s"] == 3719
    now += 2
    assert Trainer.finished(trainer) and "stopping after 5 of 9 epochs; the same command goes on" in messages[0]
