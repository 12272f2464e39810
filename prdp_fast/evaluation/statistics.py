"""Two models on the same prompts and the same noise, in numbers: means, paired differences, win rates, diversity.

Pure functions of arrays; they compute in float64. The unit is the prompt: the images of one prompt are averaged first, then the
prompts. What is uncertain is which prompts were drawn. `mean_and_error` and `paired_mean_and_error` give what training reports of
itself. The others add an interval, a percentile bootstrap over prompts, for `prdp evaluate`.

Source: PRDP (arXiv:2402.08714) section 5, whose tables are means over 64 samples a prompt, then over prompts; Efron and
Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

LEVEL = 0.95
RESAMPLES = 10_000
CHUNK = 2**20  # indices drawn at once: 8 MB, however many prompts there are

Statistic = Callable[..., np.ndarray]


class Estimate(NamedTuple):
    """A number, its standard error over prompts and its interval. NaN where one prompt tells nothing of the others."""

    mean: float
    stderr: float
    low: float
    high: float
    n: int  # prompts


def prompt_means(scores: Any) -> np.ndarray:
    """(P,) float64 mean over the images of a prompt; NaN if none of them has a score.

    Args: scores: (P, B) array or CPU tensor, not finite where an image has no score.
    """
    values = np.asarray(scores).astype(np.float64)
    values[~np.isfinite(values)] = np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # "mean of empty slice"
        return np.nanmean(values, axis=1)


def resamples(count: int, seed: int, rows: int = RESAMPLES) -> np.ndarray:
    """(rows, count) int64: draws with replacement of `count` prompts, a function of the arguments alone.

    From raw bits, because only the bit stream of a numpy generator is promised to stay the same from version to version.
    """
    bits = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(count,))).random_raw(rows * count)
    return ((bits >> np.uint64(11)) * 2.0**-53 * count).astype(np.int64).reshape(rows, count)


def bootstrap(statistic: Statistic, *values: np.ndarray, seed: int, level: float = LEVEL) -> Estimate:
    """A statistic of prompts with its bootstrap interval.

    Args:
        statistic: of one or more (..., P) arrays, over the last axis.
        values: (P,) each, entry i of all of them of prompt i; a prompt that is NaN in one is left out.
        seed: of the resamples; equal seeds and prompts are resampled alike, whatever the values.
    """
    kept = np.isfinite(np.stack(values)).all(0)
    finite = [np.asarray(value, dtype=np.float64)[kept] for value in values]
    count = int(kept.sum())
    if count == 0:
        return Estimate(math.nan, math.nan, math.nan, math.nan, 0)
    centre = float(statistic(*finite))
    if count == 1:
        return Estimate(centre, math.nan, math.nan, math.nan, 1)
    drawn = resamples(count, seed)
    rows = max(1, CHUNK // count)
    found = np.concatenate(
        [statistic(*(value[drawn[start : start + rows]] for value in finite)) for start in range(0, len(drawn), rows)]
    )
    # A ratio has no value where a resample's denominator is 0.
    found = found[np.isfinite(found)]
    if not len(found):
        return Estimate(centre, math.nan, math.nan, math.nan, count)
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(centre, float(found.std()), float(low), float(high), count)


def mean_and_error(values: Any) -> dict[str, float]:
    """Mean of the finite ones of (P,) values of prompts, its standard error std / sqrt(n), and their number n, as JSON.

    The error of a single value is 0. Without a finite value mean and error are NaN.
    """
    array = np.asarray(values, dtype=np.float64)
    finite = array[np.isfinite(array)]
    count = len(finite)
    if count == 0:
        return {"mean": math.nan, "stderr": math.nan, "n": 0}
    error = float(finite.std(ddof=1)) / math.sqrt(count) if count > 1 else 0.0
    return {"mean": float(finite.mean()), "stderr": error, "n": count}


def paired_mean_and_error(before: Any, after: Any) -> dict[str, float]:
    """`mean_and_error` of after - before, (P,) values each, prompt by prompt. A prompt that lacks a value is left out."""
    return mean_and_error(np.asarray(after) - np.asarray(before))


def over_optimised(evaluation: Mapping[str, Any], errors: float = 2.0) -> list[str]:
    """A line for every prompt set on which the trained reward has risen and one that was held out has fallen.

    Args:
        evaluation: of a summary: before, after, difference and held by prompt set.
        errors: how many of its own standard errors a difference has to be away from 0.
    """
    lines = []
    for name, sets in evaluation.items():
        trained = sets["difference"]
        if not trained["mean"] > errors * trained["stderr"]:
            continue
        for reward, held in sets.get("held", {}).items():
            difference = held["difference"]
            if difference["mean"] < -errors * difference["stderr"]:
                lines.append(
                    f"warning: on {name} the trained reward has risen by {trained['mean']:.3g} ± {trained['stderr']:.2g}, and "
                    f"{reward}, held out, has fallen by {-difference['mean']:.3g} ± {difference['stderr']:.2g}: the reward may "
                    "be over-optimised; raise objective.kl_weight, or take an earlier checkpoint"
                )
    return lines


def mean(values: np.ndarray, *, seed: int) -> Estimate:
    """The mean of (P,) values. Its standard error is that of `mean_and_error`, not the bootstrap's; NaN of a single value."""
    estimate = bootstrap(lambda part: part.mean(-1), values, seed=seed)
    return estimate._replace(stderr=mean_and_error(values)["stderr"] if estimate.n > 1 else math.nan)


def paired_difference(base: np.ndarray, finetuned: np.ndarray, *, seed: int) -> Estimate:
    """finetuned - base of (P, B) scores, prompt mean by prompt mean. An image that lacks either score is left out of both."""
    both = np.isfinite(base) & np.isfinite(finetuned)
    base, finetuned = np.where(both, base, np.nan), np.where(both, finetuned, np.nan)
    return mean(prompt_means(finetuned) - prompt_means(base), seed=seed)


def compare(before: np.ndarray, after: np.ndarray | None, *, seed: int) -> dict[str, dict[str, Any]]:
    """Before, after and difference of (P, B) scores, as JSON with intervals; the last two are empty without an after.

    Means and standard errors are those that training reports of the same scores.
    """
    found: dict[str, dict[str, Any]] = {"before": mean(prompt_means(before), seed=seed)._asdict(), "after": {}, "difference": {}}
    if after is not None:
        found["after"] = mean(prompt_means(after), seed=seed)._asdict()
        found["difference"] = paired_difference(np.asarray(before), np.asarray(after), seed=seed)._asdict()
    return found


def win_rate(base: np.ndarray, finetuned: np.ndarray, *, seed: int) -> Estimate:
    """How often the finetuned model's image is the better one of a pair that shares prompt and noise; a tie is half a win.

    Args: base, finetuned: (P, B). A pair that lacks a score is left out.
    """
    wins = np.where(finetuned > base, 1.0, np.where(finetuned == base, 0.5, 0.0))
    return mean(prompt_means(np.where(np.isfinite(base) & np.isfinite(finetuned), wins, np.nan)), seed=seed)


def ratio(numerator: np.ndarray, denominator: np.ndarray, *, seed: int) -> Estimate:
    """mean(numerator) / mean(denominator) of (P,) values, both of the same resampled prompts."""

    def of_means(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.divide(top.mean(-1), bottom.mean(-1))

    return bootstrap(of_means, numerator, denominator, seed=seed)


def diversity(features: np.ndarray) -> np.ndarray:
    """(P,) mean Euclidean distance over all pairs of a prompt's images; NaN for a single image.

    Args: features: (P, B, F).
    """
    count = features.shape[1]
    if count < 2:
        return np.full(len(features), math.nan)
    first, second = np.triu_indices(count, k=1)
    # Prompt by prompt: all pairs of all prompts would be B times the features.
    return np.array([np.linalg.norm(part[first] - part[second], axis=-1).mean() for part in features])
