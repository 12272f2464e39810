"""REBEL: regressing relative rewards (arXiv:2404.16767, eq. 1 and Algorithm 1)."""

from __future__ import annotations

import math

import torch

from prdp_fast.objectives.base import FLOAT32_MAX, ObjectiveInput, ObjectiveOutput


class RebelObjective:
    """Regress differences of log-ratios to the last epoch's policy onto differences of rewards.

        loss = mean over prompts and pairs of ((R_i - R_j) / eta - (r_i - r_j))^2,  R = sum over steps and elements of log-ratios

    Published with two samples a prompt: set schedule.images_per_prompt to 2. With more, every pair counts. PRDP differs in its
    reference (the base model), its clipping, and means where REBEL has sums.
    """

    name = "rebel"
    needs_reference = False

    def __init__(self, eta: float) -> None:
        self.eta = eta

    def __call__(self, batch: ObjectiveInput) -> ObjectiveOutput:
        groups, _, steps = batch.log_probs.shape
        kept = batch.rewards.isfinite()
        lr = torch.where(kept[:, :, None], (batch.log_probs - batch.old_log_probs).double(), 0.0)
        rewards = torch.where(kept, batch.rewards.double(), 0.0)
        error = torch.where(kept, batch.elements * lr.sum(-1) / self.eta - rewards, 0.0)  # of an image; pairs have differences
        count = kept.sum(-1, keepdim=True)
        pairs = (count * (count - 1) / 2).clamp(min=1)
        # Of n numbers, the sum over pairs of squared differences is n times that of squared distances from their mean.
        centred = torch.where(kept, error - error.sum(-1, keepdim=True) / count.clamp(min=1), 0.0)
        loss = (count * centred.square() / pairs).sum() / groups
        slope = 2 * count * centred / pairs * batch.elements / self.eta / groups
        weights = slope[:, :, None].expand(-1, -1, steps).to(batch.log_probs.dtype).contiguous()
        metrics = {
            "dropped_images": (~kept).sum(),
            "mean_log_ratio": lr.mean(),
        }
        return ObjectiveOutput(loss.to(batch.log_probs.dtype), weights, metrics)

    def outside_clip(self, log_ratio: torch.Tensor) -> torch.Tensor | None:
        return None

    def too_large(self, spread: float, largest: float, images: int) -> str | None:
        if spread < math.sqrt(FLOAT32_MAX):
            return None
        return f"its square has to be below {FLOAT32_MAX:.1e}"

    def weight_error(self, batch: ObjectiveInput, drift: float) -> float:
        return 0.0  # with old = log_prob the log-ratio is exactly 0, whatever the log-probs are
