"""What an epoch's numbers are looked at for, before anything is learnt from them. Every rank calls these and hears the same."""

from __future__ import annotations

import math

import torch

from prdp_fast.core import distributed
from prdp_fast.core.records import Scores
from prdp_fast.objectives import Objective
from prdp_fast.rewards import WeightedRewards


def first_of_ranks(message: str | None) -> str | None:
    """The message of the first rank that has one."""
    return next((found for found in distributed.gather_objects(message) if found), None)


def reward_fault(objective: Objective, rewards: WeightedRewards, scores: Scores, images_per_prompt: int) -> str | None:
    """Why nothing could be learnt from an epoch's rewards over all ranks, and what to do; None if something can.

    Float32 holds neither a loss beyond 3e38 nor a standard deviation whose square is: the gradient would be infinite, or 0.
    """
    finite = scores.total.isfinite()
    total = scores.total.double()
    highest = total.masked_fill(~finite, -math.inf).view(-1, images_per_prompt).amax(1)
    lowest = total.masked_fill(~finite, math.inf).view(-1, images_per_prompt).amin(1)
    spread = float((highest - lowest).clamp(min=0).max()) if len(total) else 0.0
    largest = float(total[finite].abs().max()) if finite.any() else 0.0
    parts = [part[part.isfinite()].abs() for part in scores.parts.values()]
    own = [float(part.max()) if len(part) else 0.0 for part in parts]
    any_finite, spread, largest, *of_parts = distributed.all_reduce([float(finite.any()), spread, largest, *own], "max")

    shares = [abs(weight) * size for weight, size in zip(rewards.weights, of_parts, strict=True)]
    number = max(range(len(shares)), key=shares.__getitem__)
    reward = f"reward {list(scores.parts)[number]!r} (of up to {of_parts[number]:.1e}, weight {rewards.weights[number]:g})"
    mend = f"rewards.{number}.weight, or set rewards.{number}.normalise running"
    if not any_finite:
        return f"no image has a total reward that float32 can hold: {reward}; if it is too large, lower {mend}"
    fault = objective.too_large(spread, largest, images_per_prompt)
    return fault and f"rewards of one prompt differ by up to {spread:.1e}, {reward}: {fault}, or lower {mend}"


def skipping_cause(dtype: torch.dtype) -> str:
    """What may be the matter where no gradient is finite."""
    if dtype == torch.float16:
        return "float16 may be too narrow for this model: use a --config with bf16, or with neither bf16 nor fp16"
    return (
        "a weight or activation of the model is out of range, or the rewards are too large for objective.kl_weight (see "
        "mean_abs_target in metrics.jsonl): lower optimizer.learning_rate or the rewards' weights"
    )
