"""Numbers of an epoch's updates by the sampler's step: how far ratios went, how many were clipped, how far the reference is."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch


def by_step(values: torch.Tensor, steps: torch.Tensor) -> Iterator[tuple[int, np.ndarray]]:
    """The values of each step that are not NaN. On the CPU both: nothing here waits for a device."""
    flat, numbers = values.double().numpy().ravel(), steps.numpy().ravel()
    for step in np.unique(numbers):
        own = flat[numbers == step]
        yield int(step), own[~np.isnan(own)]


@dataclass
class StepNumbers:
    """By metric's name. `peaks` are to be reduced over ranks by their largest, `means` by (sum, count)."""

    peaks: dict[str, float] = field(default_factory=dict)
    means: dict[str, tuple[float, float]] = field(default_factory=dict)

    def add_peaks(self, name: str, values: torch.Tensor, steps: torch.Tensor) -> None:
        """The largest of (N, S) values of each step; none of a step whose values are all NaN. On the CPU, as `steps`."""
        for step, own in by_step(values, steps):
            if len(own):
                self.peaks[f"{name}/step_{step:03d}"] = float(own.max())

    def add_means(self, name: str, values: torch.Tensor, steps: torch.Tensor) -> None:
        """Sum and count of (N, S) values of each step that are not NaN. On the CPU, as `steps`."""
        for step, own in by_step(values, steps):
            self.means[f"{name}/step_{step:03d}"] = (float(own.sum()), float(len(own)))


class RatioWatch:
    """What log-ratios to the start of the epoch come to in its updates. Stays on the device; read once, when they are over."""

    def __init__(self) -> None:
        self.updates = 0
        self._largest: torch.Tensor | None = None  # (N, S)
        self._clipped: torch.Tensor | None = None  # (N, S), in how many updates

    def add(self, log_ratio: torch.Tensor | None, clipped: torch.Tensor | None) -> None:
        """
        Args:
            log_ratio: (N, S) of an update that is about to be taken, None in the first one, where it is 0.
            clipped: (N, S) bool; None if nothing is.
        """
        self.updates += 1
        if log_ratio is None:
            return
        size = log_ratio.abs()
        self._largest = size if self._largest is None else torch.fmax(self._largest, size)
        if clipped is not None:
            self._clipped = clipped.to(size) if self._clipped is None else self._clipped + clipped

    def read(self, numbers: StepNumbers, steps: torch.Tensor, kept: torch.Tensor) -> None:
        """Waits for the device. Args: kept: (N,) bool, images with a reward."""
        if self._largest is None:  # of a single update: the ratio is 1, and nothing is clipped
            return
        numbers.add_peaks("ratio", self._largest.cpu(), steps)
        if self._clipped is not None:
            shares = (self._clipped.cpu() / self.updates).masked_fill(~kept.cpu()[:, None], math.nan)
            numbers.add_means("clip_fraction", shares, steps)
