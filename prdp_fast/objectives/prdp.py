"""Proximal Reward Difference Prediction (arXiv:2402.08714, Algorithm 1 and Appendix G)."""

from __future__ import annotations

import math
from typing import Literal

import torch

from prdp_fast.objectives.base import FLOAT32_MAX, ObjectiveInput, ObjectiveOutput
from prdp_kernels import philox_normal, prdp_loss_and_grad

Pairs = Literal["all", "best_worst", "random"]
PAIR_STREAM = 2**31 + 3  # third counter word of the draw of random pairs, beyond every step of a rollout


class PrdpObjective:
    """Regress differences of log-ratios onto differences of rewards, clipped per step.

    kl_weight (beta) and clip_range (epsilon) are calibrated to mean log-probs, as in the paper. With summed log-probs of D
    elements, epsilon and beta scale by D and 1/D.

    Its ablations: clip_range None is the loss without clipping; `pairs` takes some of a prompt's pairs only; with `last_epoch`
    log-ratios are to the policy at the start of the epoch and not to a reference.
    """

    name = "prdp"

    def __init__(
        self, kl_weight: float, clip_range: float | None, backend: str = "auto", *, pairs: Pairs = "all", last_epoch: bool = False
    ) -> None:
        self.kl_weight, self.clip_range, self.backend = kl_weight, math.inf if clip_range is None else clip_range, backend
        self.pairs, self.needs_reference = pairs, not last_epoch

    def __call__(self, batch: ObjectiveInput) -> ObjectiveOutput:
        ref = batch.ref_log_probs if self.needs_reference else batch.old_log_probs
        assert ref is not None
        log_probs, old, rewards, restore = batch.log_probs, batch.old_log_probs, batch.rewards, None
        if self.pairs == "best_worst":
            rewards = best_and_worst(rewards)
        elif self.pairs == "random":
            assert batch.seeds is not None
            order, restore = random_pairs(batch.seeds)
            log_probs, old, ref, rewards = (paired(one, order) for one in (log_probs, old, ref, rewards))
        loss, weights, stats = prdp_loss_and_grad(
            log_probs, old, ref, rewards, clip_range=self.clip_range, kl_weight=self.kl_weight, backend=self.backend
        )
        if restore is not None:
            groups, images, _ = batch.log_probs.shape
            whole = weights.new_zeros(batch.log_probs.shape)  # of an odd number of images one is in no pair
            whole[:, : images // 2 * 2] = weights.view(groups, images // 2 * 2, -1)
            weights = whole.gather(1, restore[:, :, None].expand_as(whole))
        if self.pairs != "all":  # images that were left out of every pair are not lost
            stats = stats | {"dropped_images": (~batch.rewards.isfinite()).sum()}
        return ObjectiveOutput(loss, weights, stats)

    def outside_clip(self, log_ratio: torch.Tensor) -> torch.Tensor | None:
        return log_ratio.abs() > self.clip_range

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
        if not self.needs_reference:
            return 0.0  # with old = log_prob the log-ratio is exactly 0, whatever the log-probs are
        assert batch.ref_log_probs is not None
        ratio = (batch.log_probs - batch.ref_log_probs).mean(-1)
        rewards = batch.rewards.masked_fill(~batch.rewards.isfinite(), math.nan)  # which is in no pair
        residual = (ratio[:, :, None] - ratio[:, None, :]) - (rewards[:, :, None] - rewards[:, None, :]) / self.kl_weight
        residual = residual[rewards[:, :, None] > rewards[:, None, :]]
        if not len(residual):
            return 0.0
        size = residual.square().mean().sqrt().item()
        return 4 * drift / max(size, torch.finfo(torch.float32).tiny) if math.isfinite(size) else math.inf


def best_and_worst(rewards: torch.Tensor) -> torch.Tensor:
    """(G, B) rewards, NaN but for the highest and the lowest of each prompt, which leaves that pair alone."""
    finite = rewards.isfinite()
    best = torch.where(finite, rewards, -math.inf).argmax(1, keepdim=True)
    worst = torch.where(finite, rewards, math.inf).argmin(1, keepdim=True)
    image = torch.arange(rewards.shape[1], device=rewards.device)
    return rewards.masked_fill((image != best) & (image != worst), math.nan)


def random_pairs(seeds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A random order of each prompt's images, whose neighbours 2k and 2k + 1 are the pairs, and its inverse; (G, B) int64 each.

    It follows from the trajectories' noise keys (G, B) alone: the same whatever the ranks, and again on resuming.
    """
    draws = philox_normal(seeds.flatten().cpu(), (1,), step=PAIR_STREAM, backend="torch").view(seeds.shape)
    order = draws.argsort(dim=1, stable=True).to(seeds.device)
    return order, order.argsort(dim=1)


def paired(values: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """(G, B, ...) in that order, as groups of two: (G * (B // 2), 2, ...)."""
    groups, images = order.shape
    index = order.view(groups, images, *[1] * (values.ndim - 2)).expand_as(values)
    return values.gather(1, index)[:, : images // 2 * 2].reshape(groups * (images // 2), 2, *values.shape[2:])
