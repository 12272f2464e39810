"""The PRDP loss (arXiv 2402.08714, Appendix G), once for autograd and once with its gradient in closed form.

Both compute in float64 whatever the inputs: a step has some 10^4 numbers, and the clip compares differences of 1e-6. Two
identities keep exact what can be exact, so that ties are ties and clipping works at any beta:

- clip(lr, old - eps, old + eps) = lr - excess, with excess = delta - clip(delta, -eps, eps) and delta = log_prob - old_log_prob.
- The larger of two squared errors is chosen without squaring: with u = d - dr/beta and shift = dc - d, (u + shift)^2 > u^2
  exactly when shift (2 u + shift) > 0. At beta 1e-5, u is near 1e5 and shift near 1e-6: squared (and in float32 even before),
  the branches would look equal and clipping would silently switch off. A tie takes the unclipped branch.
"""

from __future__ import annotations

import torch

from prdp_kernels.layout import result_dtype

STATS = (
    "pairs",
    "groups_without_pair",
    "dropped_images",
    "clip_fraction",
    "clipped_pairs",
    "mean_log_ratio",
    "pair_accuracy",
    "mean_abs_target",
)


def pairwise(x: torch.Tensor) -> torch.Tensor:
    """(G, B) -> (G, B, B): x_i - x_j."""
    return x.unsqueeze(2) - x.unsqueeze(1)


def prdp_loss(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    ref_log_probs: torch.Tensor,
    rewards: torch.Tensor,
    clip_range: float,
    kl_weight: float,
) -> torch.Tensor:
    kept = rewards.isfinite()
    # Removed images are replaced before any arithmetic: 0 * NaN would put NaN into the gradient of everything else.
    lp, old_lp, ref = (
        torch.where(kept.unsqueeze(2), x.double(), 0.0) for x in (log_probs, old_log_probs.detach(), ref_log_probs.detach())
    )
    reward = torch.where(kept, rewards.detach().double(), 0.0)

    lr, delta = lp - ref, lp - old_lp
    excess = delta - delta.clamp(-clip_range, clip_range)
    pair = (pairwise(reward) > 0) & kept.unsqueeze(2) & kept.unsqueeze(1)
    # Masked before squaring, not after, for the same reason: what is no pair must not reach the gradient.
    u = torch.where(pair, pairwise(lr.mean(2)) - pairwise(reward) / kl_weight, 0.0)
    shift = torch.where(pair, -pairwise(excess.mean(2)), 0.0)
    error = torch.where(shift * (2 * u + shift) <= 0, u.square(), (u + shift).square())  # NaN takes the branch that shows it
    group_loss = error.sum((1, 2)) / pair.sum((1, 2)).clamp(min=1)
    return group_loss.mean().to(result_dtype(log_probs, old_log_probs, ref_log_probs, rewards))


def prdp_loss_and_grad(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    ref_log_probs: torch.Tensor,
    rewards: torch.Tensor,
    clip_range: float,
    kl_weight: float,
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """The same loss; its gradient written out, no autograd.

    dloss/dlog_prob[i, t] = sum over j of  a_ij - a_ji  +  [step (i, t) not clipped] (b_ij - b_ji)
    a_ij, b_ij = 2 error_ij / (groups, pairs of the group, T), the error of pair (i, j) in its unclipped or clipped branch,
    and 0 in the other one.
    """
    dtype = result_dtype(log_probs, old_log_probs, ref_log_probs, rewards)
    groups, _, steps = log_probs.shape
    kept = rewards.isfinite()
    lp, old_lp, ref = (torch.where(kept.unsqueeze(2), x.double(), 0.0) for x in (log_probs, old_log_probs, ref_log_probs))
    reward = torch.where(kept, rewards.double(), 0.0)

    lr, delta = lp - ref, lp - old_lp
    inside = ~(delta.abs() > clip_range)  # this way round NaN is no clipped step, and stays visible in the gradient
    mean_lr, mean_excess = lr.mean(2), (delta - delta.clamp(-clip_range, clip_range)).mean(2)
    d, target, shift = pairwise(mean_lr), pairwise(reward) / kl_weight, -pairwise(mean_excess)
    u = d - target
    clipped = ~(shift * (2 * u + shift) <= 0)
    error = torch.where(clipped, u + shift, u)

    pair = (pairwise(reward) > 0) & kept.unsqueeze(2) & kept.unsqueeze(1)
    pairs = pair.sum((1, 2))
    weight = pair.double() / (groups * pairs.clamp(min=1)).reshape(-1, 1, 1)  # of a pair in the loss
    loss = torch.where(pair, weight * error.square(), 0.0).sum()

    slope = torch.where(pair, 2 * weight * error / steps, 0.0)
    unclipped_slope, clipped_slope = torch.where(clipped, 0.0, slope), torch.where(clipped, slope, 0.0)
    through_all = unclipped_slope.sum(2) - unclipped_slope.sum(1)
    through_inside = clipped_slope.sum(2) - clipped_slope.sum(1)
    grad = through_all.unsqueeze(2) + torch.where(inside, through_inside.unsqueeze(2), 0.0)

    total, images = pairs.sum(), kept.sum()

    def share(x: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
        return x.double().sum() / of.clamp(min=1)

    stats = (
        total,
        (pairs == 0).sum(),
        (~kept).sum(),
        share(~inside, of=images * steps),
        share(clipped & pair, of=total),
        share(mean_lr, of=images),
        share(torch.where(pair, 0.5 * (1 + d.sign()), 0.0), of=total),
        share(torch.where(pair, target, 0.0), of=total),
    )
    return loss.to(dtype), grad.to(dtype), {name: value.to(dtype) for name, value in zip(STATS, stats, strict=True)}
