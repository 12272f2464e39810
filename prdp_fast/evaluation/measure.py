"""The numbers of one prompt set, from the blocks of all its prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from prdp_fast.evaluation.blocks import BASE, FINETUNED, Block
from prdp_fast.evaluation.statistics import mean, paired_difference, prompt_means, ratio, win_rate


def measure_set(
    prompts: Sequence[str], blocks: Mapping[str, Sequence[Block]], trained: Mapping[str, str], seed: int
) -> dict[str, Any]:
    """Everything about one prompt set.

    Args:
        prompts: P texts.
        blocks: of each role, in the order of the prompts.
        trained: for each reward whether it was trained on, in words; other scores of the blocks are details.
        seed: of the bootstrap.
    Returns: prompts, rewards, details and diversity, as JSON. An estimate is mean, stderr, low, high and n; NaN if unknown.
    """
    result: dict[str, Any] = {"prompts": list(prompts), "rewards": {}, "details": {}}
    for name in next(iter(blocks.values()))[0].scores:
        scores = {role: as_array([block.scores[name] for block in parts]) for role, parts in blocks.items()}
        entry = mean_of_each({role: prompt_means(values) for role, values in scores.items()}, seed)
        if BASE in scores:
            base, finetuned = scores[BASE], scores[FINETUNED]
            entry["difference"] = paired_difference(base, finetuned, seed=seed)._asdict()
            entry["win_rate"] = win_rate(base, finetuned, seed=seed)._asdict()
        entry["unscored"] = {role: int((~np.isfinite(values)).sum()) for role, values in scores.items()}
        entry["scores"] = {role: values.tolist() for role, values in scores.items()}
        if name in trained:
            entry = {"trained": trained[name]} | entry
        result["rewards" if name in trained else "details"][name] = entry
    spread = {role: as_array([block.diversity for block in parts]) for role, parts in blocks.items()}
    result["diversity"] = mean_of_each(spread, seed)
    if BASE in spread:
        result["diversity"]["ratio"] = ratio(spread[FINETUNED], spread[BASE], seed=seed)._asdict()
    result["diversity"]["prompts"] = {role: values.tolist() for role, values in spread.items()}
    return result


def as_array(parts: Sequence[torch.Tensor]) -> np.ndarray:
    """float64, one row a prompt."""
    return torch.cat(list(parts)).double().numpy()


def mean_of_each(values: Mapping[str, np.ndarray], seed: int) -> dict[str, Any]:
    """Each role's mean of (P,) values."""
    return {role: mean(part, seed=seed)._asdict() for role, part in values.items()}
