"""The gradient pass: K updates from one epoch's trajectories, in micro-batches of (trajectory, timestep) rows.

    (1) log_prob of every row, without gradients
    (2) weights = dL/dlog_prob, in closed form, from the whole (B, S) matrix of each group
    (3) backpropagate sum(weights * log_prob), a micro-batch at a time

This is the exact gradient of the whole loss, and memory does not grow with the number of steps. No autograd graph is longer than
one micro-batch. With one update an epoch (K = 1), passes over a random subset of the steps keep its expectation.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

from prdp_fast.core.records import Scores, Trajectories
from prdp_fast.objectives import Objective, ObjectiveInput
from prdp_fast.planning.micro_batch import halve_on_oom
from prdp_fast.sampling.policy import Policy
from prdp_fast.sampling.rows import REFERENCE_STREAM, UPDATE_STREAM, micro_batches, strata, stratified

# Of the clip range: a drift beyond it is more than rounding, and is told.
LOUD_DRIFT = 0.1
# The rollout's log-probs serve as pass (1) of the first update while their error moves the weights by less than this share.
MAX_WEIGHT_ERROR = 1e-3


class TrainingEngine(Protocol):
    """What an update needs of `zero.ZeroEngine`."""

    scale: float  # of the loss, chosen by `set_scale`

    @property
    def denoiser(self) -> nn.Module: ...
    def set_scale(self, max_weight: float) -> None: ...
    @property
    def passes_are_local(self) -> bool: ...
    def accumulating(self) -> contextlib.AbstractContextManager[None]: ...
    def discard_gradients(self) -> None: ...
    def backward(self, loss: torch.Tensor, *, last: bool) -> None: ...
    def step(self) -> Any: ...


@dataclass(frozen=True)
class Reference:
    """The frozen model's log-probs of an epoch, as the objective wants them."""

    log_probs: torch.Tensor  # (N, S) float32
    error: float = 0.0  # nats, two standard errors of a trajectory's mean log-ratio, the largest; 0 if nothing was left out
    denoiser_rows: int = 0


@dataclass
class Experience:
    """What one epoch learns from, on this rank."""

    trajectories: Trajectories
    scores: Scores
    reference: Reference | None  # None while the policy is the reference, or if the objective needs none
    divisors: dict[str, float] = field(default_factory=dict)  # of rewards that are divided by their standard deviation


@dataclass
class UpdateReport:
    """What K updates did, for telemetry and the next epoch."""

    metrics: dict[str, float] = field(default_factory=dict)  # means over the updates; first_ratio_error is of the first
    drift_by_step: torch.Tensor | None = None  # (S,) max over trajectories of |sampler log-prob - trainer log-prob|, nats
    denoiser_rows: int = 0
    free_first_pass: bool = True
    skipped_updates: int = 0
    micro_batch: int = 0  # what it was in the end: half of what was asked for, if that was too much for the memory

    @property
    def drift(self) -> float:
        return 0.0 if self.drift_by_step is None else float(self.drift_by_step.nan_to_num().max())


def drift_warning(drift: float, clip_range: float, told: float) -> str | None:
    """What to tell the user of a drift; None if it is small, or no tenfold of one that was `told` (0: none was)."""
    if drift <= max(LOUD_DRIFT * clip_range, 10 * told):
        return None
    return (
        f"drift: sampler and trainer disagree by up to {drift:.1e} nats on one step's log-prob, more than a tenth of "
        f"objective.clip_range ({clip_range:.0e}). Clipping does not see it, for old log-probs come from the trainer; but if "
        "it is more than a 16-bit policy rounds by (1e-5 to 5e-3), rollout and update do not run the same U-Net: "
        "set performance.compile off and performance.attention sdpa to find out which choice it is"
    )


def _empty_rows(trajectories: Trajectories) -> torch.Tensor:
    """(N * S,) NaN: what a pass leaves out stays visible."""
    latents = trajectories.latents
    return torch.full((trajectories.log_probs.numel(),), math.nan, dtype=latents.dtype, device=latents.device)


@torch.no_grad()
def log_prob_pass(
    policy: Policy, denoiser: nn.Module, trajectories: Trajectories, micro_batch: int, chosen: torch.Tensor | None = None
) -> torch.Tensor:
    """(N, S) log-probs of the stored steps under `denoiser`, without gradients, in the batch geometry of the gradient pass.

    Args: chosen: (N, m) stochastic steps to evaluate; the others are NaN.
    """
    flat = _empty_rows(trajectories)
    for part in micro_batches(policy, trajectories, micro_batch, chosen):
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
) -> torch.Tensor:
    """Backpropagate sum(weights * log_prob).

    Args:
        weights: (N, S), dL/dlog_prob, constants.
        backward: called once a micro-batch with its scalar, and last=True for the final one.
        loss_scale: what `backward` multiplies the scalar by.
        chosen: (N, m) stochastic steps to backpropagate through; None for all.
    Returns: (N, S) the log-probs, detached; NaN where not chosen.
    """
    flat, flat_weights = _empty_rows(trajectories), weights.reshape(-1)
    parts = micro_batches(policy, trajectories, micro_batch, chosen)
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
    policy: Policy, reference: nn.Module, trajectories: Trajectories, micro_batch: int, timesteps: int | None = None
) -> Reference:
    """Log-probs of the stored steps under the frozen model.

    Args:
        timesteps: evaluate this many steps of each trajectory, one of each stratum. The loss needs the mean log-ratio over the
            steps alone, which the subset estimates without bias; every step then carries that mean. For K = 1 only.
    """
    sampled = trajectories.log_probs
    total = sampled.shape[1]
    stochastic = policy.transitions.stochastic
    if timesteps is None or timesteps >= total:
        log_probs = log_prob_pass(policy, reference, trajectories, micro_batch)
        return Reference(log_probs, denoiser_rows=len(sampled) * policy.evaluations(stochastic))
    chosen = stratified(trajectories.seeds, total, timesteps, REFERENCE_STREAM)
    on_device = chosen.to(sampled.device)
    evaluated = log_prob_pass(policy, reference, trajectories, micro_batch, chosen).gather(1, on_device)
    log_ratio = sampled.gather(1, on_device) - evaluated
    borders = strata(total, timesteps)
    sizes = (borders[1:] - borders[:-1]).to(log_ratio)
    mean = (sizes * log_ratio).sum(1) / total
    # One draw a stratum says nothing of the spread inside it; the spread over all of them is no smaller on average. What is
    # drawn from a stratum of one step has no error.
    drawn = sizes.square().where(sizes > 1, 0.0).sum().sqrt() / total
    error = 2 * float((log_ratio.std(1) * drawn).max())
    return Reference(sampled - mean[:, None], error, policy.evaluations(stochastic[chosen.flatten()]))


def run_updates(
    policy: Policy,
    engine: TrainingEngine,
    objective: Objective,
    trajectories: Trajectories,
    rewards: torch.Tensor,
    *,
    reference: Reference | None,
    updates: int,
    micro_batch: int,
    last_drift: float | None,
    reduce: Callable[[list[float], str], list[float]],
    timesteps: int | None = None,
    say: Callable[[str], None] = print,
) -> UpdateReport:
    """K updates on one epoch's trajectories.

    Args:
        rewards: (N,) float32, NaN removes an image.
        reference: `reference_pass`; None while the policy is the reference, or if the objective needs none.
        last_drift: `UpdateReport.drift` of the epoch before; None (first epoch) runs pass (1) to measure it, if it could matter.
        reduce: `zero.all_reduce`; ranks must agree on the loss scale and on the number of forwards.
        timesteps: backpropagate this many steps of each trajectory, one of each stratum; for K = 1 only.
        say: tells the user a line: that a micro-batch was too large for the memory, say.
    """
    report = UpdateReport()
    sampled = trajectories.log_probs
    total = sampled.shape[1]
    grouped = (len(trajectories.prompts), trajectories.images_per_prompt, total)
    stochastic = policy.transitions.stochastic
    denoiser_rows = len(sampled) * policy.evaluations(stochastic)
    finite = rewards[rewards.isfinite()].double()
    count, reward_sum, squares = reduce([float(len(finite)), float(finite.sum()), float(finite.square().sum())], "sum")
    reward_mean = reward_sum / max(count, 1.0)
    reward_std = max(squares / max(count, 1.0) - reward_mean**2, 0.0) ** 0.5

    policy_is_reference = objective.needs_reference and reference is None
    ref_log_probs = None if reference is None else reference.log_probs

    chosen, strata_sizes = None, torch.ones(1, device=sampled.device)
    if timesteps is not None and timesteps < total:
        assert updates == 1, "a subset of timesteps is unbiased for one update only"
        chosen = stratified(trajectories.seeds, total, timesteps, UPDATE_STREAM)
        borders = strata(total, timesteps)
        sizes = borders[1:] - borders[:-1]
        strata_sizes = sizes.repeat_interleave(sizes).to(sampled.device)  # (S,), of the stratum that a step is in

    def inputs(log_probs: torch.Tensor, old: torch.Tensor) -> ObjectiveInput:
        ref = log_probs if policy_is_reference and ref_log_probs is None else ref_log_probs
        return ObjectiveInput(
            log_probs=log_probs.view(grouped), old_log_probs=old.view(grouped),
            ref_log_probs=None if ref is None else ref.view(grouped),
            rewards=rewards.to(log_probs.device).view(grouped[:2]), reward_mean=reward_mean, reward_std=reward_std,
        )  # fmt: skip

    old = None
    told: list[dict[str, float]] = []  # of each update
    for _ in range(updates):
        if old is None:
            # Policy and snapshot coincide, so nothing is clipped and pass (1) can be the rollout's own log-probs, unless their
            # error would show in the weights. While the policy is the reference too, every log-ratio is exactly 0.
            log_probs = sampled
            if not policy_is_reference:
                error = objective.weight_error(inputs(sampled, sampled), math.inf if last_drift is None else last_drift)
                if reduce([error], "max")[0] > MAX_WEIGHT_ERROR:
                    report.free_first_pass = False
                    log_probs = log_prob_pass(policy, engine.denoiser, trajectories, micro_batch)
                    report.denoiser_rows += denoiser_rows
            output = objective(inputs(log_probs, log_probs))
        else:
            log_probs = log_prob_pass(policy, engine.denoiser, trajectories, micro_batch)
            report.denoiser_rows += denoiser_rows
            output = objective(inputs(log_probs, old))
        weights = output.weights.reshape(sampled.shape) * strata_sizes
        engine.set_scale(reduce([float(weights.abs().max())], "max")[0])
        attempt = partial(
            gradient_pass, policy, engine.denoiser, trajectories, weights, backward=engine.backward, loss_scale=engine.scale,
            chosen=chosen,
        )  # fmt: skip
        with engine.accumulating():
            # A halved micro-batch stays: old and new log-probs must have one batch geometry.
            trained, micro_batch = halve_on_oom(
                attempt, micro_batch, clear=engine.discard_gradients, recoverable=engine.passes_are_local, say=say,
                any_rank=lambda failed: reduce([float(failed)], "max")[0] > 0,
            )  # fmt: skip
        report.denoiser_rows += denoiser_rows if chosen is None else policy.evaluations(stochastic[chosen.flatten()])
        if old is None:
            # From here on old log-probs come from the training path: same code, dtype and batch geometry as the new ones.
            old = trained
            drift = (sampled - trained).abs()
            report.drift_by_step = torch.where(drift.isnan(), -math.inf, drift).amax(0).cpu()
            report.drift_by_step[report.drift_by_step == -math.inf] = math.nan
            first_error = (log_probs - trained).abs().nan_to_num().max()
            if policy_is_reference:
                ref_log_probs = trained
        result = engine.step()
        report.skipped_updates += not result.applied
        numbers = output.metrics | {"loss": output.loss, "first_ratio_error": first_error, "log_prob": trained.nanmean()}
        if ref_log_probs is not None:
            numbers["kl_to_reference"] = (trained - ref_log_probs).nanmean()
        # One wait an update, after everything else has been asked for.
        values = torch.stack([value.detach().double() for value in numbers.values()]).tolist()
        told.append(dict(zip(numbers, values, strict=True)) | {"grad_norm": result.grad_norm})
    report.metrics = {name: sum(one[name] for one in told) / updates for name in told[0]}
    report.metrics["first_ratio_error"] = told[0]["first_ratio_error"]
    if reference is not None and reference.error:
        report.metrics["reference_weight_error"] = objective.weight_error(inputs(sampled, sampled), reference.error / 2)
    report.micro_batch = micro_batch
    report.metrics["drift"] = report.drift
    report.metrics["skipped_updates"] = float(report.skipped_updates)
    return report
