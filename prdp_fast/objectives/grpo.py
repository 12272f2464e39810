"""Group Relative Policy Optimization on denoising steps, as Flow-GRPO (arXiv:2505.05470, eqs. 4, 5) has it for text-to-image
models; the method is DeepSeekMath's (arXiv:2402.03300)."""

from __future__ import annotations

import torch

from prdp_fast.objectives.base import ObjectiveInput, ObjectiveOutput
from prdp_fast.objectives.policy_gradient import centred_rewards, kl_weight_error, outside_clip, overflow, penalised_surrogate

STD_FLOOR = 1e-4  # as in Flow-GRPO's code


class GrpoObjective:
    """Group-normalised advantages, a clipped ratio a step, and kl_weight times the KL divergence from the reference a step.

    Flow-GRPO takes the divergence from the two means; here it is estimated from log-probs, with the same expected gradient.
    """

    name = "grpo"

    def __init__(self, clip_range: float, kl_weight: float, advantage_clip: float) -> None:
        self.clip_range, self.kl_weight, self.advantage_clip = clip_range, kl_weight, advantage_clip
        self.needs_reference = kl_weight > 0

    def advantages(self, batch: ObjectiveInput) -> torch.Tensor:
        """(G, B) float32: (reward - mean of the prompt) / deviation of the prompt, clipped; 0 for an image without a reward."""
        centred, std = centred_rewards(batch.rewards)
        return (centred / (std + STD_FLOOR)).clamp(-self.advantage_clip, self.advantage_clip)

    def __call__(self, batch: ObjectiveInput) -> ObjectiveOutput:
        return penalised_surrogate(batch, self.advantages(batch), self.clip_range, self.kl_weight)

    def outside_clip(self, log_ratio: torch.Tensor) -> torch.Tensor | None:
        return outside_clip(log_ratio, self.clip_range)

    def too_large(self, spread: float, largest: float, images: int) -> str | None:
        return overflow(images * spread**2, max(images * largest, 2 * largest))

    def weight_error(self, batch: ObjectiveInput, drift: float) -> float:
        return kl_weight_error(batch, self.advantages(batch), self.kl_weight, drift)
