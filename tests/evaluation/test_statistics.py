"""The statistics against straight formulas, and the interval against the coverage it claims."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from prdp_fast.evaluation import statistics
from prdp_fast.evaluation.features import pixel_features
from prdp_fast.evaluation.statistics import (
    bootstrap,
    diversity,
    mean,
    mean_and_error,
    paired_difference,
    paired_mean_and_error,
    prompt_means,
    ratio,
    win_rate,
)


def scores(prompts: int = 7, images: int = 5, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    base = generator.normal(size=(prompts, images))
    return base, base + generator.normal(0.3, 1.0, size=base.shape)


@pytest.mark.parametrize("difference", [False, True])
def test_the_interval_covers_the_truth_as_often_as_it_says(difference):
    """400 data sets of 40 prompts; the binomial standard error is 1.1%, and percentile intervals are a little short at 40."""
    generator = np.random.default_rng(1)
    hits = 0
    for trial in range(400):
        base = generator.exponential(1.0, size=(40, 1))  # a skewed prompt effect that pairing takes out
        if difference:
            found = paired_difference(base, base + generator.normal(0.5, 1.0, size=base.shape), seed=trial)
            hits += found.low <= 0.5 <= found.high
        else:
            found = mean(base[:, 0], seed=trial)
            hits += found.low <= 1.0 <= found.high
    assert 0.89 <= hits / 400 <= 0.98


def test_the_interval_is_that_of_resampled_prompts():
    """One drawn by hand, with another generator: the ends agree to the error of 10,000 resamples."""
    values = scores(prompts=30)[0][:, 0]
    generator = np.random.default_rng(5)
    drawn = np.array([values[generator.integers(0, 30, 30)].mean() for _ in range(20_000)])
    found = mean(values, seed=0)
    spread = drawn.std()
    assert found.low == pytest.approx(np.quantile(drawn, 0.025), abs=0.1 * spread)
    assert found.high == pytest.approx(np.quantile(drawn, 0.975), abs=0.1 * spread)
    assert found.mean == pytest.approx(values.sum() / 30, rel=1e-14)
    assert found.stderr == pytest.approx(math.sqrt(((values - values.mean()) ** 2).sum() / 29 / 30), rel=1e-12)
    assert found.n == 30


def test_resamples_are_uniform_and_a_function_of_their_arguments():
    drawn = statistics.resamples(10, seed=3)
    assert drawn.shape == (statistics.RESAMPLES, 10) and drawn.min() == 0 and drawn.max() == 9
    share = np.bincount(drawn.ravel()) / drawn.size
    assert abs(share - 0.1).max() < 5 * math.sqrt(0.09 / drawn.size)
    assert np.array_equal(drawn, statistics.resamples(10, seed=3))
    assert not np.array_equal(drawn, statistics.resamples(10, seed=4))
    assert not np.array_equal(drawn[:, :9], statistics.resamples(9, seed=3))


def test_chunks_change_nothing(monkeypatch):
    values = scores()[0][:, 0]
    whole = mean(values, seed=2)
    monkeypatch.setattr(statistics, "CHUNK", 1)
    assert mean(values, seed=2) == whole


def test_images_are_averaged_before_prompts():
    """A prompt with fewer scored images weighs as much as the others."""
    values = np.array([[1.0, 1.0, 1.0], [4.0, math.nan, math.inf]])
    assert prompt_means(values).tolist() == [1.0, 4.0]
    assert mean(prompt_means(values), seed=0).mean == 2.5
    assert math.isnan(prompt_means(np.full((1, 2), math.nan))[0])


def test_the_difference_is_paired():
    base, finetuned = scores()
    found = paired_difference(base, finetuned, seed=0)
    each = [sum(finetuned[p]) / 5 - sum(base[p]) / 5 for p in range(7)]
    assert found.mean == pytest.approx(sum(each) / 7, rel=1e-12)
    # Shared by both models, a prompt's own level is no uncertainty of the difference.
    level = 100 * np.arange(7.0)[:, None]
    shifted = paired_difference(base + level, finetuned + level, seed=0)
    assert shifted == pytest.approx(found, abs=1e-10)
    assert mean(prompt_means(base + level), seed=0).stderr > 50


def test_a_difference_is_over_images_that_both_have():
    """A prompt's level differs from image to image: one that only one model has would be taken for a difference."""
    base = np.array([[0.0, 10.0, 20.0], [1.0, 2.0, 3.0]])
    finetuned = base + 1.0
    finetuned[0, 2], base[1, 0] = np.nan, np.inf
    found = paired_difference(base, finetuned, seed=0)
    assert (found.mean, found.n) == (1.0, 2)


def test_win_rate_counts_pairs_and_halves_ties():
    base, finetuned = scores()
    finetuned[0, 0], finetuned[1, 2] = base[0, 0], base[1, 2]
    wins = 0.0
    for p, i in itertools.product(range(7), range(5)):
        wins += 1.0 if finetuned[p, i] > base[p, i] else 0.5 if finetuned[p, i] == base[p, i] else 0.0
    found = win_rate(base, finetuned, seed=0)
    assert found.mean == pytest.approx(wins / 35, rel=1e-12)
    assert win_rate(finetuned, base, seed=0).mean == pytest.approx(1 - found.mean, rel=1e-12)
    equal = win_rate(base, base, seed=0)
    assert (equal.mean, equal.low, equal.high, equal.stderr) == (0.5, 0.5, 0.5, 0.0)


def test_a_pair_without_a_score_is_no_pair():
    base, finetuned = np.array([[0.0, 0.0], [0.0, 0.0]]), np.array([[1.0, math.nan], [-1.0, -1.0]])
    assert win_rate(base, finetuned, seed=0).mean == 0.5
    finetuned[1] = math.nan
    lone = win_rate(base, finetuned, seed=0)
    assert (lone.mean, lone.n) == (1.0, 1) and math.isnan(lone.low)
    none = paired_difference(base, np.full((2, 2), math.nan), seed=0)
    assert none.n == 0 and math.isnan(none.mean)


def test_diversity_is_the_mean_distance_of_pairs():
    features = np.random.default_rng(0).normal(size=(3, 4, 6))
    expected = []
    for part in features:
        pairs = [math.dist(part[i], part[j]) for i in range(4) for j in range(i + 1, 4)]
        assert len(pairs) == 6
        expected.append(sum(pairs) / 6)
    assert diversity(features) == pytest.approx(expected, rel=1e-12)
    assert np.isnan(diversity(features[:, :1])).all()
    assert diversity(np.repeat(features[:, :1], 4, axis=1)).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("shape", [(32, 32), (20, 12)])
def test_pixel_features_are_adaptive_average_pooling(shape):
    images = torch.randint(0, 256, (3, 3, *shape), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    expected = torch.nn.functional.adaptive_avg_pool2d(images.double() / 255, 8).flatten(1) / math.sqrt(192)
    assert pixel_features(images.numpy()) == pytest.approx(expected.numpy(), abs=1e-12)
    black_and_white = np.stack([np.zeros((3, *shape), np.uint8), np.full((3, *shape), 255, np.uint8)])
    assert diversity(pixel_features(black_and_white)[None])[0] == pytest.approx(1.0, rel=1e-12)


def test_a_ratio_is_of_means():
    generator = np.random.default_rng(0)
    bottom = generator.uniform(0.1, 2.0, size=50)
    top = 0.8 * bottom
    found = ratio(top, bottom, seed=0)
    assert found[:4] == pytest.approx((0.8, 0.0, 0.8, 0.8), abs=1e-12)
    noisy = ratio(top + generator.normal(0, 0.2, 50), bottom, seed=0)
    assert noisy.low < noisy.mean < noisy.high
    assert math.isnan(ratio(np.zeros(3), np.zeros(3), seed=0).mean)


def test_a_prompt_that_is_missing_in_one_is_left_out_of_both():
    found = bootstrap(lambda a, b: (a - b).mean(-1), np.array([1.0, math.nan, 3.0]), np.array([0.0, 9.0, math.nan]), seed=0)
    assert (found.mean, found.n) == (1.0, 1)


def test_training_s_own_figures_are_the_straight_formulas():
    values = [0.25, 0.5, 1.0, -0.75]
    spread = math.sqrt(sum((value - 0.25) ** 2 for value in values) / 3)
    assert mean_and_error(torch.tensor(values)) == {"mean": 0.25, "stderr": pytest.approx(spread / 2, rel=1e-12), "n": 4}
    assert mean_and_error([3.0]) == {"mean": 3.0, "stderr": 0.0, "n": 1}
    found = mean(np.array(values), seed=0)
    assert (found.mean, found.stderr) == (0.25, mean_and_error(values)["stderr"]), "training and `prdp evaluate` agree"


def test_training_s_difference_is_after_minus_before_prompt_by_prompt():
    before, after = torch.tensor([1.0, 10.0, 100.0]), torch.tensor([1.5, 10.75, 101.0])
    found = paired_mean_and_error(before, after)
    assert found == {"mean": 0.75, "stderr": pytest.approx(0.25 / math.sqrt(3), rel=1e-12), "n": 3}


def test_a_prompt_without_a_score_is_left_out_of_training_s_figures():
    assert mean_and_error([1.0, math.nan, 2.0, math.inf]) == {"mean": 1.5, "stderr": pytest.approx(0.5, rel=1e-12), "n": 2}
    assert paired_mean_and_error([1.0, math.nan, 5.0], [2.0, 3.0, math.nan]) == {"mean": 1.0, "stderr": 0.0, "n": 1}
    nothing = mean_and_error([math.nan])
    assert nothing["n"] == 0 and math.isnan(nothing["mean"]) and math.isnan(nothing["stderr"])
