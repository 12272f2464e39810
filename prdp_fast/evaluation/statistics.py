"""Two models on the same prompts and the same noise, in numbers: means, paired differences, win rates, diversity.

Pure functions on numpy arrays in float64. The unit is the prompt: the images of one prompt are averaged first, then the prompts,
and what is uncertain is which prompts were drawn. Intervals are percentile bootstraps over prompts.

Source: PRDP (arXiv:2402.08714) section 5, whose tables are means over 64 samples a prompt, then over prompts; Efron and
Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
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


def prompt_means(scores: np.ndarray) -> np.ndarray:
    """(P,) mean over the images of a prompt. scores: (P, B), not finite where an image has none; NaN if no image has one."""
    values = np.where(np.isfinite(scores), scores, np.nan).astype(np.float64)
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
    """Mean, standard error and number of (P,) values of prompts; JSON. The error of a single one is 0."""
    array = np.asarray(values, dtype=np.float64)
    count = len(array)
    error = float(array.std(ddof=1)) / math.sqrt(count) if count > 1 else 0.0
    return {"mean": float(array.mean()), "stderr": error, "n": count}


def mean(values: np.ndarray, *, seed: int) -> Estimate:
    """The mean of (P,) values; its standard error is the usual one, std / sqrt(P)."""
    estimate = bootstrap(lambda part: part.mean(-1), values, seed=seed)
    finite = values[np.isfinite(values)]
    return estimate._replace(stderr=mean_and_error(finite)["stderr"] if len(finite) > 1 else math.nan)


def paired_difference(base: np.ndarray, finetuned: np.ndarray, *, seed: int) -> Estimate:
    """finetuned - base of (P, B) scores, prompt mean by prompt mean."""
    return mean(prompt_means(finetuned) - prompt_means(base), seed=seed)


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


def pixel_features(images: np.ndarray, size: int = 8) -> np.ndarray:
    """What a picture looks like from afar: colours averaged over a grid.

    Args:
        images: (N, 3, H, W) uint8.
        size: cells a side; cell i covers pixels floor(i H / size) to ceil((i + 1) H / size), as adaptive average pooling does.
    Returns: (N, 3 * size * size) float64, each in [0, 1], divided by sqrt(3 * size * size): the distance of two pictures is the
        root mean square difference of their cells, from 0 to 1 (black against white).
    """
    height, width = images.shape[2:]
    rows = _pooling(height, size)
    columns = _pooling(width, size)
    cells = np.einsum("ih,nchw,jw->ncij", rows, images.astype(np.float64) / 255, columns, optimize=True)
    return cells.reshape(len(images), -1) / math.sqrt(3 * size * size)


def _pooling(length: int, cells: int) -> np.ndarray:
    """(cells, length) float64: row i averages the pixels of cell i."""
    table = np.zeros((cells, length))
    for cell in range(cells):
        first, last = cell * length // cells, -(-(cell + 1) * length // cells)
        table[cell, first:last] = 1 / (last - first)
    return table


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
