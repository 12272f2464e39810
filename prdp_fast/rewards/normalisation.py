"""The spread of a reward's scores over all ranks, by which the score may be divided before it is weighted.

Rewards come in units of their own: kilobytes, shares, logits. Divided by their standard deviations they count by their weights.
Means stay: objectives see differences alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

# A spread below this part of the mean is the rounding of float32 scores that are equal; dividing by it would train on noise.
ROUNDING = 1e-6

Reduce = Callable[[list[float]], list[float]]  # sums over ranks, float64


class Moments(NamedTuple):
    """Of the finite scores seen so far, over all ranks, in float64."""

    images: float = 0.0
    mean: float = 0.0
    squares: float = 0.0  # sum of squared distances from the mean

    def merged(self, other: Moments) -> Moments:
        """Moments of both sets together. Source: Chan, Golub, LeVeque 1979, the update of Welford's method for whole sets."""
        images = self.images + other.images
        if not images:
            return Moments()
        distance = other.mean - self.mean
        return Moments(
            images,
            self.mean + distance * other.images / images,
            self.squares + other.squares + distance**2 * self.images * other.images / images,
        )

    @property
    def scale(self) -> float:
        """The (population) standard deviation; 1 where all scores are equal or there are none."""
        deviation = math.sqrt(self.squares / self.images) if self.images else 0.0
        return deviation if deviation > ROUNDING * abs(self.mean) else 1.0


def moments_over_ranks(parts: list[torch.Tensor], reduce: Reduce) -> list[Moments]:
    """Moments of each tensor over all ranks. Every rank calls this with as many tensors, (N,) of any float dtype."""
    finite = [part[part.isfinite()].double() for part in parts]
    sums = reduce([value for part in finite for value in (float(len(part)), float(part.sum()))])
    counts, means = sums[::2], [total / max(count, 1.0) for count, total in zip(sums[::2], sums[1::2], strict=True)]
    # From the mean of all ranks: squares of the scores themselves would cancel where the mean is large.
    squares = reduce([float((part - mean).square().sum()) for part, mean in zip(finite, means, strict=True)])
    return [Moments(*of) for of in zip(counts, means, squares, strict=True)]
