"""Reward-weighted regression: maximum likelihood of the sampled steps, weighted by a softmax of the rewards.

Source: Peters and Schaal, "Reinforcement learning by reward-weighted regression" (2007); for diffusion models RWR of DDPO
(arXiv:2305.13301, section 4.1), whose likelihood is the denoising bound. Here it is that of the trajectory's own steps.
"""

from __future__ import annotations

import torch

from prdp_fast.objectives.base import FLOAT32_MAX, ObjectiveInput, ObjectiveOutput


class RwrObjective:
    """loss = mean over prompts of - sum over images of softmax(reward / temperature) mean_t log_prob."""

    name = "rwr"
    needs_reference = False

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature

    def image_weights(self, rewards: torch.Tensor) -> torch.Tensor:
        """(G, B): the softmax of each prompt; 0 for an image without a reward."""
        finite = rewards.isfinite()
        scaled = torch.where(finite, rewards / self.temperature, -torch.inf)
        return torch.where(finite.any(-1, keepdim=True), scaled.softmax(-1), 0.0).nan_to_num(0.0)

    def __call__(self, batch: ObjectiveInput) -> ObjectiveOutput:
        groups, _, steps = batch.log_probs.shape
        shares = self.image_weights(batch.rewards)
        weights = (-shares / (groups * steps))[:, :, None].expand_as(batch.log_probs)
        loss = torch.where(weights != 0, weights * batch.log_probs, 0.0).sum()  # what is left out may be NaN
        metrics = {
            "largest_share": shares.amax(-1).mean(),
            "dropped_images": (~batch.rewards.isfinite()).sum(),
        }
        return ObjectiveOutput(loss, weights.contiguous(), metrics)

    def outside_clip(self, log_ratio: torch.Tensor) -> torch.Tensor | None:
        return None

    def too_large(self, spread: float, largest: float, images: int) -> str | None:
        if largest / self.temperature < FLOAT32_MAX:
            return None
        return f"divided by objective.temperature {self.temperature:g} that is beyond {FLOAT32_MAX:.1e}; raise it"

    def weight_error(self, batch: ObjectiveInput, drift: float) -> float:
        return 0.0  # the weights are of the rewards alone
