"""A KL-regularised policy gradient in the style of DPOK (arXiv:2305.16381, Algorithm 1, eq. 8)."""

from __future__ import annotations

import torch

from prdp_fast.objectives.base import FLOAT32_MAX, ObjectiveInput, ObjectiveOutput
from prdp_fast.objectives.policy_gradient import (
    centred_rewards,
    clipped_surrogate,
    kl_to_reference,
    kl_weight_error,
    outside_clip,
    overflow,
)


class DpokObjective:
    """reward_weight (alpha) times the clipped policy gradient of rewards, plus kl_weight (beta) times the KL divergence a step.

    DPOK subtracts a learnt value of the prompt from its rewards, which needs few prompts; here it is the mean over the prompt's
    images, which is one too. Rewards keep their scale.
    """

    name = "dpok"

    def __init__(self, reward_weight: float, kl_weight: float, clip_range: float) -> None:
        self.reward_weight, self.kl_weight, self.clip_range = reward_weight, kl_weight, clip_range
        self.needs_reference = kl_weight > 0

    def __call__(self, batch: ObjectiveInput) -> ObjectiveOutput:
        advantages = self.reward_weight * centred_rewards(batch.rewards)[0]
        loss, weights, clip_fraction = clipped_surrogate(batch, advantages, self.clip_range)
        metrics = {
            "clip_fraction": clip_fraction,
            "mean_abs_advantage": advantages.abs().mean(),
            "dropped_images": (~batch.rewards.isfinite()).sum(),
        }
        if self.needs_reference:
            kl, slope = kl_to_reference(batch)
            loss, weights = loss + self.kl_weight * kl, weights + self.kl_weight * slope
            metrics["kl_penalty"] = self.kl_weight * kl
        return ObjectiveOutput(loss, weights, metrics)

    def outside_clip(self, log_ratio: torch.Tensor) -> torch.Tensor | None:
        return outside_clip(log_ratio, self.clip_range)

    def too_large(self, spread: float, largest: float, images: int) -> str | None:
        fault = overflow(images * spread**2, max(images * largest, 2 * largest))
        if fault is None and self.reward_weight * spread >= FLOAT32_MAX:
            fault = f"objective.reward_weight {self.reward_weight:g} times that is beyond {FLOAT32_MAX:.1e}; lower it"
        return fault

    def weight_error(self, batch: ObjectiveInput, drift: float) -> float:
        return kl_weight_error(batch, self.reward_weight * centred_rewards(batch.rewards)[0], self.kl_weight, drift)
