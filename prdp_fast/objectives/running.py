"""Running statistics of each prompt's rewards, by which DDPO as published makes advantages (arXiv:2305.13301, section 4.3).

They need prompts that come again: on a set of 100K prompts nearly every prompt is seen for the first time, and the statistics of
the whole epoch take their place.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

STD_FLOOR = 1e-6  # as in the authors' code

Kept = dict[str, list[float]]  # the newest finite rewards of a prompt, by its number in the set; JSON


def update_statistics(
    kept: Kept,
    prompts: list[int],
    rewards: torch.Tensor,
    *,
    buffer: int,
    min_count: int,
    gather: Callable[[Any], list[Any]],
) -> torch.Tensor:
    """Count an epoch's rewards, and say by what its advantages are made. Every rank calls this.

    Args:
        kept: the same on every rank, and changed alike: a prompt may come to another rank next time.
        prompts: G numbers of this rank's prompts.
        rewards: (G, B); those that are not finite are left out.
        buffer: the newest rewards of a prompt that count.
        min_count: with fewer of them, mean and deviation are of all ranks' rewards of this epoch.
        gather: `distributed.gather_objects`.
    Returns: (G, 2) float32 on the CPU, mean and population standard deviation (plus 1e-6) of each of this rank's prompts.
    """
    rows = zip(prompts, rewards.tolist(), strict=True)
    drawn = [(index, [value for value in row if math.isfinite(value)]) for index, row in rows]
    everyone = [pair for of_rank in gather(drawn) for pair in of_rank]
    for index, values in everyone:
        kept[str(index)] = [*kept.get(str(index), []), *values][-buffer:]
    epoch = moments([value for _, values in everyone for value in values])
    own = (kept[str(index)] for index in prompts)
    found = [moments(values) if len(values) >= min_count else epoch for values in own]
    return torch.tensor(found, dtype=torch.float32).view(-1, 2)


def moments(values: list[float]) -> tuple[float, float]:
    """Mean and population standard deviation, the latter plus 1e-6; (0, 1e-6) of nothing."""
    if not values:
        return 0.0, STD_FLOOR
    mean = math.fsum(values) / len(values)
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values)) + STD_FLOOR
