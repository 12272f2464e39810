"""Denoising Diffusion Policy Optimization, importance-sampling form (DDPO-IS, arXiv:2305.13301, eq. 4): PPO with one clipped
importance ratio per denoising step."""

from __future__ import annotations

from typing import Literal

import torch

from prdp_fast.objectives.base import ObjectiveInput, ObjectiveOutput
from prdp_fast.objectives.policy_gradient import STD_FLOOR, centred_rewards, outside_clip, overflow, penalised_surrogate


class DdpoObjective:
    name = "ddpo"
    needs_reference = False

    def __init__(
        self, clip_range: float, normalization: Literal["per_prompt", "global", "running"], advantage_clip: float
    ) -> None:
        self.clip_range, self.normalization, self.advantage_clip = clip_range, normalization, advantage_clip

    def advantages(self, batch: ObjectiveInput) -> torch.Tensor:
        """(G, B) float32: normalised rewards, clipped; 0 for an image whose reward is not finite."""
        finite = batch.rewards.isfinite()
        rewards = torch.where(finite, batch.rewards, 0.0)
        match self.normalization:
            case "global":
                centred, std = rewards - batch.reward_mean, torch.full_like(rewards[:, :1], batch.reward_std) + STD_FLOOR
            case "running":
                assert batch.statistics is not None
                mean, std = batch.statistics.to(rewards).unsqueeze(2).unbind(1)
                centred = rewards - mean
            case _:
                centred, std = centred_rewards(batch.rewards)
                std = std + STD_FLOOR
        return torch.where(finite, (centred / std).clamp(-self.advantage_clip, self.advantage_clip), 0.0)

    def __call__(self, batch: ObjectiveInput) -> ObjectiveOutput:
        """loss = mean over images and steps of max(-A ratio, -A clip(ratio, 1 - eps, 1 + eps))."""
        return penalised_surrogate(batch, self.advantages(batch), self.clip_range)

    def outside_clip(self, log_ratio: torch.Tensor) -> torch.Tensor | None:
        return outside_clip(log_ratio, self.clip_range)

    def too_large(self, spread: float, largest: float, images: int) -> str | None:
        """Advantages are rewards over their standard deviation: a square, or a sum, that overflows makes them 0 or NaN."""
        squares = images * spread**2 if self.normalization == "per_prompt" else 0.0
        fault = overflow(squares, max(images * largest, 2 * largest))
        return fault and fault + ("; set objective.normalization global" if overflow(squares, 0.0) else "")

    def weight_error(self, batch: ObjectiveInput, drift: float) -> float:
        return 0.0  # with old = log_prob the ratio is exactly 1, whatever the log-probs are
