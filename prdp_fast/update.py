"""The gradient pass: K updates from one epoch's trajectories, in micro-batches of (trajectory, timestep) rows.

    (1) log_prob of every row, without gradients
    (2) weights = dL/dlog_prob, in closed form, from the whole (B, S) matrix of each group
    (3) backpropagate sum(weights * log_prob), a micro-batch at a time

This is the exact gradient of the whole loss, and memory does not grow with the number of steps. No autograd graph is longer than
one micro-batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from prdp_fast.objectives import Objective, ObjectiveInput
from prdp_fast.records import Trajectories
from prdp_fast.sampling.policy import Policy

# The rollout's log-probs serve as pass (1) of the first update while their error moves the weights by less than this share.
MAX_WEIGHT_ERROR = 1e-3


class TrainingEngine(Protocol):
    """What an update needs of `zero.ZeroEngine`."""

    scale: float  # of the loss, chosen by `set_scale`

    @property
    def unet(self) -> nn.Module: ...
    def set_scale(self, max_weight: float) -> None: ...
    def backward(self, loss: torch.Tensor, *, last: bool) -> None: ...
    def step(self) -> Any: ...


@dataclass
class UpdateReport:
    """What K updates did, for telemetry and the next epoch."""

    metrics: dict[str, float] = field(default_factory=dict)
    drift_by_step: torch.Tensor | None = None  # (S,) max over trajectories of |sampler log-prob - trainer log-prob|, nats
    reference_rows: int = 0  # latents evaluated; guidance doubles them in the U-Net
    update_rows: int = 0
    free_first_pass: bool = True
    skipped_updates: int = 0

    @property
    def drift(self) -> float:
        return 0.0 if self.drift_by_step is None else float(self.drift_by_step.max())


def micro_batches(policy: Policy, trajectories: Trajectories, size: int) -> Iterator[tuple[slice, tuple[Any, ...]]]:
    """Rows of (trajectory, stochastic step) pairs, trajectory-major.

    Yields: the slice of the flattened (N * S) rows, and the arguments of `Policy.log_prob` after the U-Net.
    """
    latents = trajectories.latents
    stochastic = policy.transitions.stochastic.to(latents.device)
    total = len(latents) * len(stochastic)
    for start in range(0, total, size):
        rows = torch.arange(start, min(start + size, total), device=latents.device)
        trajectory = torch.div(rows, len(stochastic), rounding_mode="floor")
        steps = stochastic[rows % len(stochastic)]
        arguments = (latents[trajectory, steps], latents[trajectory, steps + 1], steps, trajectories.embedding_rows(trajectory))
        yield slice(start, start + len(rows)), arguments


@torch.no_grad()
def log_prob_pass(policy: Policy, unet: nn.Module, trajectories: Trajectories, micro_batch: int) -> torch.Tensor:
    """(N, S) log-probs of the stored steps under `unet`, without gradients, in the batch geometry of the gradient pass."""
    flat = torch.empty(trajectories.log_probs.numel(), dtype=trajectories.latents.dtype, device=trajectories.latents.device)
    for rows, arguments in micro_batches(policy, trajectories, micro_batch):
        flat[rows] = policy.log_prob(unet, *arguments)
    return flat.view(trajectories.log_probs.shape)


def gradient_pass(
    policy: Policy,
    unet: nn.Module,
    trajectories: Trajectories,
    weights: torch.Tensor,
    micro_batch: int,
    backward: Callable[..., None],
    loss_scale: float = 1.0,
) -> torch.Tensor:
    """Backpropagate sum(weights * log_prob).

    Args:
        weights: (N, S), dL/dlog_prob, constants.
        backward: called once a micro-batch with its scalar, and last=True for the final one.
        loss_scale: what `backward` multiplies the scalar by.
    Returns: (N, S) the log-probs, detached.
    """
    flat = torch.empty(trajectories.log_probs.numel(), dtype=trajectories.latents.dtype, device=trajectories.latents.device)
    flat_weights = weights.reshape(-1)
    for rows, arguments in micro_batches(policy, trajectories, micro_batch):
        loss, flat[rows] = policy.weighted_log_prob(unet, *arguments, weights=flat_weights[rows], loss_scale=loss_scale)
        backward(loss, last=rows.stop == len(flat))
    return flat.view(trajectories.log_probs.shape)


def run_updates(
    policy: Policy,
    engine: TrainingEngine,
    objective: Objective,
    trajectories: Trajectories,
    rewards: torch.Tensor,
    *,
    reference: nn.Module | None,
    updates: int,
    micro_batch: int,
    last_drift: float | None,
    reduce: Callable[[list[float], str], list[float]],
    phase: Callable[[str], contextlib.AbstractContextManager[Any]],
) -> UpdateReport:
    """K updates on one epoch's trajectories.

    Args:
        rewards: (N,) float32, NaN removes an image.
        reference: the frozen U-Net; None if the objective needs none.
        last_drift: `UpdateReport.drift` of the epoch before; None (first epoch) runs pass (1) to measure it.
        reduce: `zero.all_reduce`; ranks must agree on the loss scale and on the number of forwards.
        phase: names the phases "reference" and "update" for telemetry.
    """
    report = UpdateReport()
    sampled = trajectories.log_probs
    grouped = (len(trajectories.prompts), trajectories.images_per_prompt, sampled.shape[1])
    rows = sampled.numel()
    finite = rewards[rewards.isfinite()].double()
    count, total, squares = reduce([float(len(finite)), float(finite.sum()), float(finite.square().sum())], "sum")
    reward_mean = total / max(count, 1.0)
    reward_std = max(squares / max(count, 1.0) - reward_mean**2, 0.0) ** 0.5

    ref_log_probs = None
    if objective.needs_reference:
        assert reference is not None
        with phase("reference"):
            ref_log_probs = log_prob_pass(policy, reference, trajectories, micro_batch).view(grouped)
            report.reference_rows += rows

    def inputs(log_probs: torch.Tensor, old: torch.Tensor) -> ObjectiveInput:
        return ObjectiveInput(
            log_probs=log_probs.view(grouped), old_log_probs=old.view(grouped), ref_log_probs=ref_log_probs,
            rewards=rewards.to(log_probs.device).view(grouped[:2]), reward_mean=reward_mean, reward_std=reward_std,
        )  # fmt: skip

    with phase("update"):
        old = None
        for _ in range(updates):
            if old is None:
                # Policy and snapshot coincide, so nothing is clipped and pass (1) can be the rollout's own log-probs, unless
                # their error would show in the weights.
                log_probs = sampled
                error = float("inf") if last_drift is None else objective.weight_error(inputs(sampled, sampled), last_drift)
                if reduce([error], "max")[0] > MAX_WEIGHT_ERROR:
                    report.free_first_pass = False
                    log_probs = log_prob_pass(policy, engine.unet, trajectories, micro_batch)
                    report.update_rows += rows
                output = objective(inputs(log_probs, log_probs))
            else:
                log_probs = log_prob_pass(policy, engine.unet, trajectories, micro_batch)
                report.update_rows += rows
                output = objective(inputs(log_probs, old))
            engine.set_scale(reduce([float(output.weights.abs().max())], "max")[0])
            trained = gradient_pass(policy, engine.unet, trajectories, output.weights, micro_batch, engine.backward, engine.scale)
            report.update_rows += rows
            if old is None:
                # From here on old log-probs come from the training path: same code, dtype and batch geometry as the new ones.
                old = trained
                report.drift_by_step = (sampled - trained).abs().amax(0).cpu()
                report.metrics["first_ratio_error"] = float((log_probs - trained).abs().max())
            result = engine.step()
            report.skipped_updates += not result.applied
            report.metrics.update(output.metrics)
            report.metrics["loss"] = float(output.loss)
            report.metrics["grad_norm"] = result.grad_norm
        if ref_log_probs is not None:
            report.metrics["kl_to_reference"] = float((trained.view(grouped) - ref_log_probs).mean())
    report.metrics["log_prob"] = float(trained.mean())
    report.metrics["drift"] = report.drift
    report.metrics["skipped_updates"] = float(report.skipped_updates)
    return report
