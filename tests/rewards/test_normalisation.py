"""Parts of a weighted sum divided by their standard deviations: over ranks, over epochs, over a restart."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import launching
import numpy as np
import pytest
import torch
from launching import TRAIN
from safetensors.torch import load_file

from prdp_fast.config.load import load_recipe
from prdp_fast.core.errors import UserError
from prdp_fast.core.records import Scores
from prdp_fast.rewards import Reward, RewardOutput, WeightedRewards
from prdp_fast.rewards.normalisation import Moments, moments_over_ranks

IMAGES = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)


def alone(values: list[float]) -> list[float]:
    return values


def on_ranks(count: int, run: Callable[[int, Callable[[list[float]], list[float]]], object]) -> list:
    """run(rank, reduce) on threads that meet in `reduce`."""
    barrier, given, results = threading.Barrier(count), [[]] * count, [None] * count

    def one(rank: int) -> None:
        def reduce(values: list[float]) -> list[float]:
            given[rank] = values
            barrier.wait(10)
            total = [math.fsum(each) for each in zip(*given, strict=True)]
            barrier.wait(10)
            return total

        results[rank] = run(rank, reduce)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def draws(seed: int, size: int, mean: float = 0.0, spread: float = 1.0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(mean, spread, size)).float()


@pytest.mark.parametrize(("mean", "spread"), [(0.0, 1.0), (-3.0, 40.0), (1e4, 0.5)])
def test_moments_of_sets_are_those_of_their_union(mean, spread):
    sets = [draws(seed, size, mean, spread) for seed, size in enumerate((1, 7, 64, 3))]
    merged = Moments()
    for part in sets:
        merged = merged.merged(*moments_over_ranks([part], alone))
    union = torch.cat(sets).double().numpy()
    assert merged.images == 75
    assert merged.mean == pytest.approx(union.mean(), rel=1e-12) and merged.scale == pytest.approx(union.std(), rel=1e-9)


def test_ranks_agree_and_count_every_finite_score():
    shares = [draws(0, 5, 2.0), torch.tensor([math.nan, 3.0, math.inf, -1.0]), torch.tensor([math.nan])]
    results = on_ranks(3, lambda rank, reduce: moments_over_ranks([shares[rank], 2 * shares[rank]], reduce))
    assert results[0] == results[1] == results[2]
    finite = np.concatenate([shares[0].numpy(), [3.0, -1.0]]).astype(np.float64)
    for moments, factor in zip(results[0], (1, 2), strict=True):
        assert moments.images == 7 and moments.mean == pytest.approx(factor * finite.mean(), rel=1e-12)
        assert moments.scale == pytest.approx(factor * finite.std(), rel=1e-12)


@pytest.mark.parametrize("values", [[0.1] * 5, [0.0], [math.nan] * 3, [], [1000.0, 1000.0 + 6e-5]])
def test_scores_without_a_spread_are_left_alone(values):
    (moments,) = moments_over_ranks([torch.tensor(values)], alone)
    assert Moments().merged(moments).scale == 1.0 == moments.scale


class Given(Reward):
    name = "given"

    def __init__(self, name: str) -> None:
        self.name = name  # type: ignore[misc]

    def score(self, images: torch.Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]]) -> RewardOutput:
        return RewardOutput(torch.tensor([entry[self.name] for entry in metadata]))


def rewards(*modes: str, weights: Sequence[float]) -> WeightedRewards:
    return WeightedRewards([Given(name) for name in "abc"[: len(modes)]], weights, modes)


def scored(given: WeightedRewards, **parts: torch.Tensor) -> Scores:
    metadata = [dict(zip(parts, values, strict=True)) for values in zip(*(part.tolist() for part in parts.values()), strict=True)]
    return given.score(IMAGES[: len(metadata)], ["a"] * len(metadata), metadata)


def test_each_part_is_divided_by_its_own_deviation():
    given = rewards("batch", "running", "none", weights=[2.0, -1.0, 0.5])
    a, b, c = draws(1, 4, 5.0, 100.0), draws(2, 4, 0.0, 0.01), draws(3, 4)
    raw = scored(given, a=a, b=b, c=c)
    scores, seen, divisors = given.normalised(raw, {}, alone)
    a64, b64 = a.double(), b.double()
    expected = 2 * a64 / a64.std(correction=0) - b64 / b64.std(correction=0) + 0.5 * c.double()
    torch.testing.assert_close(scores.total, expected.float(), rtol=1e-6, atol=0)
    assert set(divisors) == {"a", "b"} and set(seen) == {"b"}
    torch.testing.assert_close(raw.total, (2 * a64 - b64 + 0.5 * c.double()).float())  # what evaluations see
    assert all(torch.equal(scores.parts[name], part) for name, part in {"a": a, "b": b, "c": c}.items())


def test_running_remembers_and_batch_forgets():
    given = rewards("batch", "running", weights=[1.0, 1.0])
    seen: dict[str, list[float]] = {}
    epochs = [draws(seed, 4, spread=10.0**seed) for seed in range(3)]
    for number, values in enumerate(epochs):
        _, seen, divisors = given.normalised(scored(given, a=values, b=values), json.loads(json.dumps(seen)), alone)
        assert divisors["a"] == pytest.approx(float(values.double().std(correction=0)), rel=1e-12)
        assert divisors["b"] == pytest.approx(float(torch.cat(epochs[: number + 1]).double().std(correction=0)), rel=1e-12)


def test_an_image_without_a_score_stays_without():
    given = rewards("running", "none", weights=[1.0, 1.0])
    raw = scored(given, a=torch.tensor([1.0, math.nan, 3.0]), b=torch.ones(3))
    total = given.normalised(raw, {}, alone)[0].total
    assert total[[0, 2]].tolist() == [2.0, 4.0] and total[1].isnan()


def test_without_normalisation_nothing_changes_and_no_rank_waits():
    given = rewards("none", "none", weights=[1.0, 3.0])
    raw = scored(given, a=draws(1, 4), b=draws(2, 4))

    def never(values: list[float]) -> list[float]:
        raise AssertionError("reduced")

    assert given.normalised(raw, {}, never) == (raw, {}, {})


def test_an_unknown_mode_is_refused():
    with pytest.raises(UserError, match=r"rewards\.0\.normalise is 'std': input should be 'none', 'running' or 'batch'"):
        load_recipe("smoke", ["rewards.0.normalise=std"])


def trained(output: Path, epochs: int) -> list[dict[str, float]]:
    listed = "[{name: shapes_alignment, weight: 2, normalise: running}, {name: jpeg_size, normalise: running}]"
    settings = [
        f"rewards={listed}", f"schedule.epochs={epochs}", "schedule.updates_per_epoch=1", "schedule.prompts_per_epoch=2",
        "sampler.num_inference_steps=2", "evaluation.prompts=0", "performance.attention=sdpa", "performance.fuse_qkv=off",
    ]  # fmt: skip
    words = [word for setting in settings for word in ("--set", setting)]
    launching.run(TRAIN, "--recipe", "smoke", "--output", output, *words)
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_resumed_run_goes_on_with_the_same_deviations(tmp_path):
    whole, parts = trained(tmp_path / "whole", 3), trained(tmp_path / "parts", 2)
    parts = trained(tmp_path / "parts", 3)
    for row, other in zip(whole, parts, strict=True):
        for name in ("shapes_alignment", "jpeg_size"):
            assert row[f"reward_divisor/{name}"] == other[f"reward_divisor/{name}"] != 1.0
        divided = 2 * row["reward/shapes_alignment"] / row["reward_divisor/shapes_alignment"]
        divided += row["reward/jpeg_size"] / row["reward_divisor/jpeg_size"]
        assert row["reward"] == pytest.approx(divided, rel=1e-5)
    assert len({row["reward_divisor/jpeg_size"] for row in whole}) == 3
    first, second = (load_file(tmp_path / run / "model/unet/diffusion_pytorch_model.safetensors") for run in ("whole", "parts"))
    assert all(torch.equal(first[name], second[name]) for name in first)
