"""Passes of a denoiser over the stored steps of an epoch's trajectories, in micro-batches of (trajectory, timestep) rows.

`log_prob_pass` and `reference_pass` need no gradients; `gradient_pass` backpropagates sum(weights * log_prob), whose gradient is
that of the whole loss once the weights dL/dlog_prob are known. Memory does not grow with the number of steps: no autograd graph
is longer than one micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from prdp_fast.core.records import Trajectories
from prdp_fast.sampling.draws import REFERENCE_STREAM
from prdp_fast.sampling.policy import Policy
from prdp_fast.sampling.rows import RowCounts, micro_batches, strata, stratified


@dataclass(frozen=True)
class Reference:
    """The frozen model's log-probs of an epoch, as the objective wants them."""

    log_probs: torch.Tensor  # (N, S) float32
    error: float | None = None  # nats, two standard errors of a trajectory's mean log-ratio, the largest; None: of every step
    denoiser_rows: int = 0


def _empty_rows(trajectories: Trajectories) -> torch.Tensor:
    """(N * S,) NaN: what a pass leaves out stays visible."""
    latents = trajectories.latents
    return torch.full((trajectories.log_probs.numel(),), math.nan, dtype=latents.dtype, device=latents.device)


@torch.no_grad()
def log_prob_pass(
    policy: Policy,
    denoiser: nn.Module,
    trajectories: Trajectories,
    micro_batch: int,
    chosen: torch.Tensor | None = None,
    counts: RowCounts | None = None,
) -> torch.Tensor:
    """(N, S) log-probs of the stored steps under `denoiser`, without gradients, in the batch geometry of the gradient pass.

    Args:
        chosen: (N, m) which of the S to evaluate; the others are NaN.
        counts: as in `micro_batches`.
    """
    flat = _empty_rows(trajectories)
    for part in micro_batches(policy, trajectories, micro_batch, chosen, counts):
        log_prob = policy.log_prob(
            denoiser, part.latents, part.prev_latents, part.steps, part.embeddings, guided=part.guided
        )  # fmt: skip
        flat[part.rows[: part.count]] = log_prob[: part.count]
    return flat.view(trajectories.log_probs.shape)


def gradient_pass(
    policy: Policy,
    denoiser: nn.Module,
    trajectories: Trajectories,
    weights: torch.Tensor,
    micro_batch: int,
    backward: Callable[..., None],
    loss_scale: float = 1.0,
    chosen: torch.Tensor | None = None,
    counts: RowCounts | None = None,
) -> torch.Tensor:
    """Backpropagate sum(weights * log_prob).

    Args:
        weights: (N, S), dL/dlog_prob, constants.
        backward: called once a micro-batch with its scalar, and last=True for the final one.
        loss_scale: what `backward` multiplies the scalar by.
        chosen: (N, m) which of the S to backpropagate through; None for all.
        counts: as in `micro_batches`.
    Returns: (N, S) the log-probs, detached; NaN where not chosen.
    """
    flat, flat_weights = _empty_rows(trajectories), weights.reshape(-1)
    parts = micro_batches(policy, trajectories, micro_batch, chosen, counts)
    part = next(parts, None)
    while part is not None:
        row_weights = flat_weights[part.rows]
        row_weights[part.count :] = 0  # rows that only fill up
        loss, log_prob = policy.weighted_log_prob(
            denoiser, part.latents, part.prev_latents, part.steps, part.embeddings, guided=part.guided, weights=row_weights,
            loss_scale=loss_scale,
        )  # fmt: skip
        flat[part.rows[: part.count]] = log_prob[: part.count]
        part = next(parts, None)
        backward(loss, last=part is None)
    return flat.view(trajectories.log_probs.shape)


def reference_pass(
    policy: Policy,
    reference: nn.Module,
    trajectories: Trajectories,
    micro_batch: int,
    timesteps: int | None = None,
    step_weights: torch.Tensor | None = None,
) -> Reference:
    """Log-probs of the stored steps under the frozen model.

    Args:
        timesteps: evaluate this many steps of each trajectory, one of each stratum. The loss needs the mean log-ratio over the
            steps alone, which the subset estimates without bias; every step then carries that mean. For K = 1 only.
        step_weights: (N, S) of mean 1, by which the steps count in that mean; None: all alike.
    """
    sampled = trajectories.log_probs
    total = sampled.shape[1]
    if timesteps is None or timesteps >= total:
        log_probs = log_prob_pass(policy, reference, trajectories, micro_batch)
        return Reference(log_probs, denoiser_rows=policy.evaluations(trajectories.steps))
    chosen = stratified(trajectories.seeds, total, timesteps, REFERENCE_STREAM)
    on_device = chosen.to(sampled.device)
    evaluated = log_prob_pass(policy, reference, trajectories, micro_batch, chosen).gather(1, on_device)
    log_ratio = sampled.gather(1, on_device) - evaluated
    if step_weights is not None:
        log_ratio = log_ratio * step_weights.gather(1, chosen).to(log_ratio.device)
    borders = strata(total, timesteps)
    sizes = (borders[1:] - borders[:-1]).to(log_ratio)
    mean = (sizes * log_ratio).sum(1) / total
    # One draw a stratum says nothing of the spread inside it; the spread over all of them is no smaller on average. What is
    # drawn from a stratum of one step has no error.
    drawn = sizes.square().where(sizes > 1, 0.0).sum().sqrt() / total
    error = 2 * float((log_ratio.std(1) * drawn).nan_to_num().max())  # NaN of an image that was lost
    return Reference(sampled - mean[:, None], error, policy.evaluations(trajectories.steps.gather(1, chosen)))
