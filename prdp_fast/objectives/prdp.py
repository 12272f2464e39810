"""Proximal Reward Difference Prediction (arXiv:2402.08714, Algorithm 1 and Appendix G)."""

from __future__ import annotations

import math

import torch

from prdp_fast.objectives.base import FLOAT32_MAX, ObjectiveInput, ObjectiveOutput
from prdp_kernels import prdp_loss_and_grad


class PrdpObjective:
    """Regress differences of log-ratios onto differences of rewards, clipped per step.

    kl_weight (beta) and clip_range (epsilon) are calibrated to mean log-probs, as in the paper. With summed log-probs of D
    elements, epsilon and beta scale by D and 1/D.
    """

    name = "prdp"
    needs_reference = True

    def __init__(self, kl_weight: float, clip_range: float, backend: str = "auto") -> None:
        self.kl_weight, self.clip_range, self.backend = kl_weight, clip_range, backend

    def __call__(self, batch: ObjectiveInput) -> ObjectiveOutput:
        assert batch.ref_log_probs is not None
        loss, weights, stats = prdp_loss_and_grad(
            batch.log_probs, batch.old_log_probs, batch.ref_log_probs, batch.rewards,
            clip_range=self.clip_range, kl_weight=self.kl_weight, backend=self.backend,
        )  # fmt: skip
        return ObjectiveOutput(loss, weights, stats)

    def too_large(self, spread: float, largest: float, images: int) -> str | None:
        """The loss is the square of a log-ratio's distance from (difference of rewards) / kl_weight."""
        target = math.inf if spread / FLOAT32_MAX > self.kl_weight else spread / self.kl_weight
        if target < math.sqrt(FLOAT32_MAX):
            return None
        return (
            f"with objective.kl_weight {self.kl_weight:g} the target of the loss is {target:.1e}"
            if math.isfinite(target)
            else f"with objective.kl_weight {self.kl_weight:g} the target of the loss is beyond {FLOAT32_MAX:.1e}"
        ) + "; its square has to be below 3.4e+38; raise objective.kl_weight"

    def weight_error(self, batch: ObjectiveInput, drift: float) -> float:
        """The log-probs enter the weights through d - dr/beta alone, and d, a difference of means over the steps of four
        log-probs, is wrong by at most 4 drift. Compared with the root mean square of d - dr/beta over the pairs; infinite if
        that is not finite, for then nothing is known."""
        assert batch.ref_log_probs is not None
        ratio = (batch.log_probs - batch.ref_log_probs).mean(-1)
        rewards = batch.rewards.masked_fill(~batch.rewards.isfinite(), math.nan)  # which is in no pair
        residual = (ratio[:, :, None] - ratio[:, None, :]) - (rewards[:, :, None] - rewards[:, None, :]) / self.kl_weight
        residual = residual[rewards[:, :, None] > rewards[:, None, :]]
        if not len(residual):
            return 0.0
        size = residual.square().mean().sqrt().item()
        return 4 * drift / max(size, torch.finfo(torch.float32).tiny) if math.isfinite(size) else math.inf
