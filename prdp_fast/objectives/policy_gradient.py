"""The parts that DDPO, DPOK and GRPO are made of: advantages, PPO's clipped surrogate, and a KL divergence a step.

A denoising step is an action with a Gaussian density, and log-probs are means over the elements of a latent, as in DDPO's code.
"""

from __future__ import annotations

import torch

from prdp_fast.objectives.base import FLOAT32_MAX, ObjectiveInput, ObjectiveOutput

STD_FLOOR = 1e-8  # as in the authors' code of DDPO: a group of equal rewards gets advantage 0, not NaN


def centred_rewards(rewards: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rewards less their prompt's mean, and their prompt's population standard deviation. Those that are not finite are left out.

    Args: rewards: (G, B).
    Returns: (G, B), 0 for an image without a reward; (G, 1).
    """
    finite = rewards.isfinite()
    given = torch.where(finite, rewards, 0.0)
    count = finite.sum(-1, keepdim=True).clamp(min=1)
    centred = torch.where(finite, given - given.sum(-1, keepdim=True) / count, 0.0)
    return centred, (centred.square().sum(-1, keepdim=True) / count).sqrt()


def clipped_surrogate(
    batch: ObjectiveInput, advantages: torch.Tensor, clip_range: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """PPO's loss with one importance ratio a denoising step: mean over images and steps of max(-A ratio, -A clip(ratio)).

    Args: advantages: (G, B), 0 for an image without a reward.
    Returns: the loss; its gradient with respect to the log-probs, (G, B, S); the share of ratios outside 1 +- clip_range.
    Source: PPO (arXiv:1707.06347) eq. 7; DDPO (arXiv:2305.13301) eq. 4.
    """
    ratio = (batch.log_probs - batch.old_log_probs).exp()
    # An image without a reward may have no log-probs either: 0 times NaN would be NaN.
    ratio = torch.where(batch.rewards.isfinite()[:, :, None] | ratio.isfinite(), ratio, 1.0)
    plain = -advantages[:, :, None] * ratio
    clipped = -advantages[:, :, None] * ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = torch.maximum(plain, clipped).mean()
    # Where the clipped branch wins the ratio is outside the interval and its gradient is 0; d ratio / d log_prob = ratio.
    weights = torch.where(plain >= clipped, plain, 0.0) / ratio.numel()
    return loss, weights, ((ratio - 1).abs() > clip_range).float().mean()


def outside_clip(log_ratio: torch.Tensor, clip_range: float) -> torch.Tensor:
    """Whether the ratio is outside 1 +- clip_range."""
    return (log_ratio.exp() - 1).abs() > clip_range


def kl_to_reference(batch: ObjectiveInput) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(policy || reference) of a step in nats an element, mean over images and steps, estimated from log-probs.

    With r the log-ratio of a whole step, E[r^2 / 2] is the KL divergence to second order, and E[r grad log p] is its gradient
    exactly, for steps that the policy sampled. Log-probs are means over D elements, so r = D lr, and KL / D is D lr^2 / 2.

    Returns: the mean; its gradient with respect to the log-probs, (G, B, S). Images without a reward have no part in them.
    Source: DPOK (arXiv:2305.16381) eq. 8 for the term; Schulman, "Approximating KL divergence" (k2), for the estimator.
    """
    assert batch.ref_log_probs is not None
    kept = batch.rewards.isfinite()[:, :, None]
    lr = torch.where(kept, batch.log_probs - batch.ref_log_probs, 0.0)
    return (batch.elements * lr.square() / 2).mean(), batch.elements * lr / lr.numel()


def penalised_surrogate(
    batch: ObjectiveInput, advantages: torch.Tensor, clip_range: float, kl_weight: float = 0.0
) -> ObjectiveOutput:
    """`clipped_surrogate` plus kl_weight times `kl_to_reference`, which is left out at weight 0. Arguments as of these."""
    loss, weights, clip_fraction = clipped_surrogate(batch, advantages, clip_range)
    metrics = {
        "clip_fraction": clip_fraction,
        "mean_abs_advantage": advantages.abs().mean(),
        "dropped_images": (~batch.rewards.isfinite()).sum(),
    }
    if kl_weight:
        kl, slope = kl_to_reference(batch)
        loss, weights = loss + kl_weight * kl, weights + kl_weight * slope
        metrics["kl_penalty"] = kl_weight * kl
    return ObjectiveOutput(loss, weights, metrics)


def kl_weight_error(batch: ObjectiveInput, advantages: torch.Tensor, kl_weight: float, drift: float) -> float:
    """Relative error of the weights if log-probs are wrong by `drift`: at ratio 1 they enter through the KL term alone."""
    if not kl_weight:
        return 0.0
    _, slope = kl_to_reference(batch)
    weights = kl_weight * slope - advantages[:, :, None] / slope.numel()
    size = weights.square().mean().sqrt().item()
    error = kl_weight * batch.elements * drift / slope.numel()
    return error / size if size > 0 else (0.0 if error == 0 else float("inf"))


def overflow(squares: float, sums: float) -> str | None:
    """What float32 cannot hold of rewards and their squares; None if it holds both."""
    if max(squares, sums) < FLOAT32_MAX:
        return None
    return "float32 cannot hold the sum of their squares, so that every advantage would be 0 or NaN"
