"""Denoising Diffusion Policy Optimization, importance-sampling form (DDPO-IS, arXiv:2305.13301, eq. 4): PPO with one clipped
importance ratio per denoising step."""

from __future__ import annotations

from typing import Literal

import torch

from prdp_fast.objectives.base import FLOAT32_MAX, ObjectiveInput, ObjectiveOutput

STD_FLOOR = 1e-8  # as in the authors' code: a group of equal rewards gets advantage 0, not NaN


class DdpoObjective:
    name = "ddpo"
    needs_reference = False

    def __init__(self, clip_range: float, normalization: Literal["per_prompt", "global"], advantage_clip: float) -> None:
        self.clip_range, self.normalization, self.advantage_clip = clip_range, normalization, advantage_clip

    def advantages(self, batch: ObjectiveInput) -> torch.Tensor:
        """(G, B) float32: normalised rewards, clipped; 0 for an image whose reward is not finite."""
        finite = batch.rewards.isfinite()
        rewards = torch.where(finite, batch.rewards, 0.0)
        if self.normalization == "global":
            centred = rewards - batch.reward_mean
            std = torch.full_like(rewards[:, :1], batch.reward_std)
        else:
            count = finite.sum(-1, keepdim=True).clamp(min=1)
            centred = rewards - rewards.sum(-1, keepdim=True) / count
            std = (torch.where(finite, centred, 0.0).square().sum(-1, keepdim=True) / count).sqrt()
        advantages = (centred / (std + STD_FLOOR)).clamp(-self.advantage_clip, self.advantage_clip)
        return torch.where(finite, advantages, 0.0)

    def __call__(self, batch: ObjectiveInput) -> ObjectiveOutput:
        """loss = mean over images and steps of max(-A ratio, -A clip(ratio, 1 - eps, 1 + eps))."""
        advantages = self.advantages(batch)[:, :, None]
        ratio = (batch.log_probs - batch.old_log_probs).exp()
        # An image without a reward may have no log-probs either: 0 times NaN would be NaN.
        ratio = torch.where(batch.rewards.isfinite()[:, :, None] | ratio.isfinite(), ratio, 1.0)
        plain = -advantages * ratio
        clipped = -advantages * ratio.clamp(1 - self.clip_range, 1 + self.clip_range)
        loss = torch.maximum(plain, clipped).mean()
        # Where the clipped branch wins the ratio is outside the interval and its gradient is 0; d ratio / d log_prob = ratio.
        weights = torch.where(plain >= clipped, plain, 0.0) / ratio.numel()
        metrics = {
            "clip_fraction": ((ratio - 1).abs() > self.clip_range).float().mean(),
            "mean_abs_advantage": advantages.abs().mean(),
            "dropped_images": (~batch.rewards.isfinite()).sum(),
        }
        return ObjectiveOutput(loss, weights, metrics)

    def too_large(self, spread: float, largest: float, images: int) -> str | None:
        """Advantages are rewards over their standard deviation: a square, or a sum, that overflows makes them 0 or NaN."""
        squares = images * spread**2 if self.normalization == "per_prompt" else 0.0
        if max(squares, images * largest, 2 * largest) < FLOAT32_MAX:
            return None
        mend = "; set objective.normalization global" if squares >= FLOAT32_MAX else ""
        return f"float32 cannot hold the sum of their squares, so that every advantage would be 0 or NaN{mend}"

    def weight_error(self, batch: ObjectiveInput, drift: float) -> float:
        return 0.0  # with old = log_prob the ratio is exactly 1, whatever the log-probs are
