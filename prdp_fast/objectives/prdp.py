"""Proximal Reward Difference Prediction (arXiv:2402.08714, Algorithm 1 and Appendix G)."""

from __future__ import annotations

import torch

from prdp_fast.objectives.base import ObjectiveInput, ObjectiveOutput
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

    def weight_error(self, batch: ObjectiveInput, drift: float) -> float:
        """The log-probs enter the weights through d - dr/beta alone, and d, a difference of means over the steps of four
        log-probs, is wrong by at most 4 drift. Compared with the root mean square of d - dr/beta over the pairs."""
        assert batch.ref_log_probs is not None
        ratio = (batch.log_probs - batch.ref_log_probs).mean(-1)
        residual = (ratio[:, :, None] - ratio[:, None, :]) - (
            batch.rewards[:, :, None] - batch.rewards[:, None, :]
        ) / self.kl_weight
        residual = residual[batch.rewards[:, :, None] > batch.rewards[:, None, :]]
        if not len(residual):
            return 0.0
        return 4 * drift / max(residual.square().mean().sqrt().item(), torch.finfo(torch.float32).tiny)
