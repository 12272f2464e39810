"""Metrics of an epoch over ranks that have different names of them."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from prdp_fast.core import distributed
from prdp_fast.core.records import Scores
from prdp_fast.core.run_directory import claim, first_difference
from prdp_fast.training.metrics import epoch_metrics
from prdp_fast.training.state import TrainState
from prdp_fast.training.update import Experience, UpdateReport


def on_ranks(monkeypatch, runs: list[Callable[[], dict]]) -> list[dict]:
    """Each of them in a thread, with collectives that want lists of one length, as true ones do."""
    barrier, given, found = threading.Barrier(len(runs), timeout=20), {}, {}
    own = threading.local()

    def exchange(value):
        given[own.rank] = value
        barrier.wait()
        values = [given[rank] for rank in range(len(runs))]
        barrier.wait()
        return values

    def all_reduce(values: list[float], op: str) -> list[float]:
        lists = exchange(values)
        assert len({len(one) for one in lists}) == 1, f"collectives of different sizes: {[len(one) for one in lists]}"
        return [sum(column) if op == "sum" else max(column) for column in zip(*lists, strict=True)]

    monkeypatch.setattr(distributed, "gather_objects", exchange)
    monkeypatch.setattr(distributed, "all_reduce", all_reduce)

    def rank(number: int) -> None:
        own.rank = number
        try:
            found[number] = runs[number]()
        except BaseException:
            barrier.abort()
            raise

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(len(runs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == len(runs)
    return [found[number] for number in range(len(runs))]


def epoch(total: list[float], details: dict[str, list[float]], metrics: dict[str, float]) -> Callable[[], dict]:
    tensors = {name: torch.tensor(values) for name, values in details.items()}
    scores = Scores(torch.tensor(total), {"a": torch.tensor(total)}, tensors)
    return lambda: epoch_metrics(
        Experience(SimpleNamespace(prompts=[]), scores, None, nonfinite_images=1), UpdateReport(metrics=metrics)
    )  # type: ignore[arg-type]


def test_names_that_only_some_ranks_have_are_means_over_those(monkeypatch) -> None:
    ranks = on_ranks(
        monkeypatch,
        [
            epoch([1.0, 2.0], {}, {"loss": 1.0}),
            epoch(
                [3.0, math.nan], {"a/words": [4.0, 8.0], "a/never": [math.nan] * 2}, {"loss": 2.0, "reference_weight_error": 0.5}
            ),
            epoch([3.0, 3.0], {"a/words": [6.0, math.nan]}, {"reference_weight_error": 0.1, "loss": 6.0}),
        ],
    )
    assert [repr(one) for one in ranks] == [repr(ranks[0])] * 3
    row = ranks[0]
    assert row["reward"] == row["reward/a"] == pytest.approx(12 / 5) and row["reward/a/words"] == 6.0
    assert row["loss"] == 3.0 and row["reference_weight_error"] == pytest.approx(0.3) and row["nonfinite_images"] == 1.0
    assert math.isnan(row["reward/a/never"]), "no score is no 0"


def test_batches_that_were_found_follow_a_recipe_that_changes() -> None:
    state = TrainState(micro_batch=4, batches={"rollout": 2, "reference": 1})
    first = {"micro_batch": 16, "reference": 16, "rollout": 64}
    state.follow(first)  # the checkpoint of an earlier version says nothing of what was asked
    assert state.micro_batch == 4 and state.batches == {"rollout": 2, "reference": 1}
    again = TrainState()
    again.load_state_dict(json.loads(json.dumps(state.state_dict())))
    again.follow(first)
    assert again.micro_batch == 4 and again.batches == {"rollout": 2, "reference": 1}
    again.follow(first | {"rollout": 8})
    assert again.micro_batch == 4 and again.batches == {"reference": 1}
    again.follow(first | {"rollout": 8, "micro_batch": "auto", "reference": "auto"})
    assert again.micro_batch is None and again.batches == {}
    spread = TrainState(micro_batch=4, batches={"rollout": 2, "reference": 1}, asked=first | {"spread": [2, 2, ["none", "none"]]})
    spread.follow(first | {"spread": [2, 2, ["none", "none"]]})
    assert spread.micro_batch == 4 and spread.batches == {"rollout": 2, "reference": 1}
    spread.follow(first | {"spread": [1, 2, ["none", "none"]]})
    assert spread.micro_batch is None and spread.batches == {}


def test_a_state_of_an_earlier_version_is_read() -> None:
    old = TrainState(epoch=3).state_dict()
    for name in ("batches", "asked", "skipped_in_row", "nonfinite_in_row"):
        del old[name]
    state = TrainState()
    state.load_state_dict(old)
    assert state.epoch == 3 and state.skipped_in_row == 0
    del old["epoch"]
    with pytest.raises(KeyError, match="epoch"):
        state.load_state_dict(old)


def test_what_memory_decides_may_change_on_resume(tmp_path) -> None:
    job = {
        "recipe": {
            "schedule": {"micro_batch": 16, "updates_per_epoch": 1}, "sampler": {"rollout_batch": 64},
            "performance": {"activation_checkpointing": False},
        },
        "deepspeed": {"train_micro_batch_size_per_gpu": 16, "gradient_accumulation_steps": 3, "zero_optimization": {"stage": 2}},
        "world_size": 1,
    }  # fmt: skip
    other = json.loads(json.dumps(job))
    other["recipe"]["schedule"]["micro_batch"] = "auto"
    other["recipe"]["sampler"]["rollout_batch"] = 8
    other["recipe"]["performance"]["activation_checkpointing"] = True
    other["deepspeed"] |= {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 48}
    assert first_difference(job, other) is None
    claim(tmp_path / "run", job, "auto")
    claim(tmp_path / "run", other, "auto")
    assert json.loads((tmp_path / "run/run.json").read_text()) == other
    other["deepspeed"]["zero_optimization"] = {"stage": 3}
    assert first_difference(job, other) is None
    other["deepspeed"]["zero_optimization"]["zero_quantized_weights"] = True
    assert first_difference(job, other) == "deepspeed.zero_optimization.zero_quantized_weights was None, now True"
