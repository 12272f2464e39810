"""A KL-regularised policy gradient in the style of DPOK (arXiv:2305.16381, Algorithm 1, eq. 8)."""

from __future__ import annotations

import torch

from prdp_fast.objectives.base import FLOAT32_MAX, ObjectiveInput, ObjectiveOutput
from prdp_fast.objectives.policy_gradient import centred_rewards, kl_weight_error, outside_clip, overflow, penalised_surrogate


class DpokObjective:
    """reward_weight (alpha) times the clipped policy gradient of rewards, plus kl_weight (beta) times the KL divergence a step.

    DPOK subtracts a learnt value of the prompt from its rewards, which needs few prompts; here it is the mean over the prompt's
    images, which is one too. Rewards keep their scale.
    """

    name = "dpok"

    def __init__(self, reward_weight: float, kl_weight: float, clip_range: float) -> None:
        self.reward_weight, self.kl_weight, self.clip_range = reward_weight, kl_weight, clip_range
        self.needs_reference = kl_weight > 0

    def advantages(self, batch: ObjectiveInput) -> torch.Tensor:
        """(G, B) float32: reward_weight times the rewards less the mean of their prompt; 0 for an image without a reward."""
        return self.reward_weight * centred_rewards(batch.rewards)[0]

    def __call__(self, batch: ObjectiveInput) -> ObjectiveOutput:
        return penalised_surrogate(batch, self.advantages(batch), self.clip_range, self.kl_weight)

    def outside_clip(self, log_ratio: torch.Tensor) -> torch.Tensor | None:
        return outside_clip(log_ratio, self.clip_range)

    def too_large(self, spread: float, largest: float, images: int) -> str | None:
        fault = overflow(images * spread**2, max(images * largest, 2 * largest))
        if fault is None and self.reward_weight * spread >= FLOAT32_MAX:
            fault = f"objective.reward_weight {self.reward_weight:g} times that is beyond {FLOAT32_MAX:.1e}; lower it"
        return fault

    def weight_error(self, batch: ObjectiveInput, drift: float) -> float:
        return kl_weight_error(batch, self.advantages(batch), self.kl_weight, drift)
