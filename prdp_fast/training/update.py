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

from prdp_fast.core.distributed import AllReduce
from prdp_fast.core.memory import release
from prdp_fast.core.records import Prompt, Scores, Trajectories
from prdp_fast.objectives import Objective, ObjectiveInput
from prdp_fast.planning.micro_batch import halve_on_oom
from prdp_fast.sampling.draws import UPDATE_STREAM
from prdp_fast.sampling.policy import Policy
from prdp_fast.sampling.rows import RowCounts, count_rows, strata, stratified
from prdp_fast.training.passes import Reference, gradient_pass, log_prob_pass
from prdp_fast.training.step_numbers import RatioWatch, StepNumbers

# Of the clip range: a drift beyond it is more than rounding, and is told.
LOUD_DRIFT = 0.1
ROUNDING_16_BIT = 5e-3  # nats; a drift beyond it is told where nothing is clipped
# The rollout's log-probs serve as pass (1) of the first update while their error moves the weights by less than this share.
MAX_WEIGHT_ERROR = 1e-3


class TrainingEngine(Protocol):
    """What an update needs of `ZeroEngine`."""

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


@dataclass
class Experience:
    """What one epoch learns from, on this rank."""

    trajectories: Trajectories
    scores: Scores
    reference: Reference | None  # None while the policy is the reference, or if the objective needs none
    divisors: dict[str, float] = field(default_factory=dict)  # of rewards that are divided by their standard deviation
    nonfinite_images: int = 0  # over all ranks; they have no reward

    @property
    def sources(self) -> list[str | None]:
        """(N) where each image's prompt comes from, if its metadata say so; empty if those of no prompt do."""
        found = [source_of(prompt) for prompt in self.trajectories.prompts]
        return [one for one in found for _ in range(self.trajectories.images_per_prompt)] if any(found) else []


def source_of(prompt: Prompt) -> str | None:
    """As its metadata say: `source`, or the `part` that `prdp shards build` names."""
    return next((value for name in ("source", "part") if isinstance(value := prompt.metadata.get(name), str) and value), None)


@dataclass
class UpdateReport:
    """What K updates did, for telemetry and the next epoch."""

    metrics: dict[str, float] = field(default_factory=dict)  # means over the updates; first_ratio_error is of the first
    # By the step's number: the largest over trajectories of |sampler log-prob - trainer log-prob|, nats.
    drift_by_step: dict[int, float] = field(default_factory=dict)
    by_step: StepNumbers = field(default_factory=StepNumbers)
    denoiser_rows: int = 0
    free_first_pass: bool = True
    skipped_updates: int = 0
    skipped_in_row: int = 0  # at the end, those of earlier epochs included
    scale: float = 1.0  # of the loss in the last update
    micro_batch: int = 0  # what it was in the end: half of what was asked for, if that was too much for the memory

    def count(self, applied: bool, scale: float) -> None:
        """An update, taken or skipped."""
        self.skipped_updates += not applied
        self.skipped_in_row = 0 if applied else self.skipped_in_row + 1
        self.scale = scale

    @property
    def drift(self) -> float:
        return max((value for value in self.drift_by_step.values() if not math.isnan(value)), default=0.0)


def drift_warning(drift: float, clip_range: float | None, told: float) -> str | None:
    """What to tell the user of a drift; None if it is small, or no tenfold of one that was `told` (0: none was).

    Args: clip_range: of the objective; None if it has none.
    """
    loud = ROUNDING_16_BIT if clip_range is None else LOUD_DRIFT * clip_range
    if drift <= max(loud, 10 * told):
        return None
    clipping = "" if clip_range is None else (
        f", more than a tenth of objective.clip_range ({clip_range:.0e}). Clipping does not see it, for old log-probs come from "
        "the trainer"
    )  # fmt: skip
    return (
        f"drift: sampler and trainer disagree by up to {drift:.1e} nats on one step's log-prob{clipping}; but if "
        "it is more than a 16-bit policy rounds by (1e-5 to 5e-3), rollout and update do not run the same denoiser: "
        "set performance.compile off and performance.attention sdpa to find out which choice it is"
    )


class EpochInputs:
    """One epoch as the objective takes it: log-probs grouped by prompt, beside the rewards and the reference."""

    def __init__(
        self,
        objective: Objective,
        trajectories: Trajectories,
        rewards: torch.Tensor,
        reference: Reference | None,
        reduce: AllReduce,
        step_weights: torch.Tensor | None = None,
        statistics: torch.Tensor | None = None,
    ) -> None:
        """The mean and deviation of the rewards are over all ranks. Every rank calls this.

        Args:
            step_weights: (N, S) of `step_weights`; the objective sees every log-prob multiplied by its own.
            statistics: (G, 2) running mean and deviation of the prompts' rewards, if the objective wants them.
        """
        groups, steps = len(trajectories.prompts), trajectories.log_probs.shape[1]
        self.grouped = (groups, trajectories.images_per_prompt, steps)
        self.rewards = rewards
        self.elements = trajectories.latents[0, 0].numel()
        self.seeds = trajectories.seeds.view(self.grouped[:2])
        self.statistics = statistics
        self.policy_is_reference = objective.needs_reference and reference is None
        self.ref_log_probs = None if reference is None else reference.log_probs  # (N, S)
        self.step_weights = None if step_weights is None else step_weights.to(trajectories.log_probs.device)
        finite = rewards[rewards.isfinite()].double()
        count, total, squares = reduce([float(len(finite)), float(finite.sum()), float(finite.square().sum())], "sum")
        self.reward_mean = total / max(count, 1.0)
        self.reward_std = max(squares / max(count, 1.0) - self.reward_mean**2, 0.0) ** 0.5

    def of(self, log_probs: torch.Tensor, old: torch.Tensor) -> ObjectiveInput:
        """Args: log_probs, old: (N, S)."""
        ref = log_probs if self.policy_is_reference and self.ref_log_probs is None else self.ref_log_probs
        return ObjectiveInput(
            log_probs=self.weighted(log_probs).view(self.grouped), old_log_probs=self.weighted(old).view(self.grouped),
            ref_log_probs=None if ref is None else self.weighted(ref).view(self.grouped),
            rewards=self.rewards.to(log_probs.device).view(self.grouped[:2]), reward_mean=self.reward_mean,
            reward_std=self.reward_std, elements=self.elements, seeds=self.seeds, statistics=self.statistics,
        )  # fmt: skip

    def weighted(self, values: torch.Tensor) -> torch.Tensor:
        """(N, S) log-probs as the objective takes them; and, by the chain rule, its weights as those of the log-probs."""
        return values if self.step_weights is None else values * self.step_weights


def draw_steps(trajectories: Trajectories, timesteps: int | None) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Which of the S stochastic steps an update backpropagates through: one of each of `timesteps` strata, or all.

    Returns: (N, m) their numbers among the S, None for all; and (S,) the size of the stratum that a step is in, by which its
        weight counts, or 1.
    """
    total = trajectories.log_probs.shape[1]
    if timesteps is None or timesteps >= total:
        return None, torch.ones(1, device=trajectories.log_probs.device)
    borders = strata(total, timesteps)
    sizes = borders[1:] - borders[:-1]
    chosen = stratified(trajectories.seeds, total, timesteps, UPDATE_STREAM)
    return chosen, sizes.repeat_interleave(sizes).to(trajectories.log_probs.device)


def sampled_will_do(
    objective: Objective, inputs: EpochInputs, sampled: torch.Tensor, last_drift: float | None, reduce: AllReduce
) -> bool:
    """Whether the rollout's own log-probs can be pass (1) of the first update. Every rank calls this.

    There policy and snapshot coincide, so nothing is clipped: what is wrong with them can show in the weights alone. While the
    policy is the reference too, every log-ratio is exactly 0.
    """
    if inputs.policy_is_reference:
        return True
    error = objective.weight_error(inputs.of(sampled, sampled), math.inf if last_drift is None else last_drift)
    return not reduce([error], "max")[0] > MAX_WEIGHT_ERROR


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
    reduce: AllReduce,
    timesteps: int | None = None,
    step_weights: torch.Tensor | None = None,
    skipped_in_row: int = 0,
    say: Callable[[str], None] = print,
    statistics: torch.Tensor | None = None,
    on_policy: bool = True,
) -> UpdateReport:
    """K updates on one epoch's trajectories.

    Args:
        rewards: (N,) float32, NaN removes an image.
        reference: `reference_pass`; None while the policy is the reference, or if the objective needs none.
        last_drift: `UpdateReport.drift` of the epoch before; None (first epoch) runs pass (1) to measure it, if it could matter.
        reduce: `distributed.all_reduce`; ranks must agree on the loss scale and on the number of forwards.
        timesteps: backpropagate this many steps of each trajectory, one of each stratum; for K = 1 only.
        step_weights: (N, S) of mean 1 over each trajectory's steps, by which they count in the objective; None: all alike.
        skipped_in_row: updates before this epoch's that were skipped, since the last one that was not.
        say: tells the user a line: that a micro-batch was too large for the memory, say.
        statistics: (G, 2) running mean and deviation of the prompts' rewards, if the objective wants them.
        on_policy: the policy itself has sampled; else its log-probs are never those of the rollout.
    """
    report, sampled = UpdateReport(skipped_in_row=skipped_in_row), trajectories.log_probs
    every_row = policy.evaluations(trajectories.steps)
    inputs = EpochInputs(objective, trajectories, rewards, reference, reduce, step_weights, statistics)
    chosen, strata_sizes = draw_steps(trajectories, timesteps)
    assert chosen is None or updates == 1, "a subset of timesteps is unbiased for one update only"
    trained_rows = every_row if chosen is None else policy.evaluations(trajectories.steps.gather(1, chosen))
    whole, part = (agreed_counts(policy, trajectories, numbers, reduce) for numbers in (None, chosen))

    old = None  # log-probs at the start of the epoch, by the training path
    geometry = micro_batch  # of `old`, and so of every log-prob that is compared with it
    told: list[dict[str, float]] = []  # of each update
    ratios = RatioWatch()
    for _ in range(updates):
        if old is None and on_policy and sampled_will_do(objective, inputs, sampled, last_drift, reduce):
            log_probs = sampled
        else:  # pass (1)
            report.free_first_pass &= old is not None
            log_probs = current_log_probs(policy, engine, trajectories, geometry, whole)
            report.denoiser_rows += every_row
        ratio = None if old is None else log_probs - old
        ratios.add(ratio, None if ratio is None else objective.outside_clip(inputs.weighted(ratio)))
        output = objective(inputs.of(log_probs, log_probs if old is None else old))
        weights = inputs.weighted(output.weights.reshape(sampled.shape)) * strata_sizes
        trained, micro_batch = backpropagate(policy, engine, trajectories, weights, chosen, part, micro_batch, reduce, say)
        report.denoiser_rows += trained_rows
        if old is None:
            # From here on old log-probs come from the training path: same code, dtype and batch geometry as the new ones.
            old, geometry = trained, micro_batch
            drift = ((sampled if on_policy else log_probs) - trained).abs()
            report.drift_by_step = largest_by_step(drift, trajectories.steps)
            first_error = (log_probs - trained).abs().nan_to_num().max()
            if inputs.policy_is_reference:
                inputs.ref_log_probs = trained
        result = engine.step()
        report.count(result.applied, engine.scale)
        numbers = output.metrics | {"loss": output.loss, "first_ratio_error": first_error, "log_prob": trained.nanmean()}
        if inputs.ref_log_probs is not None:
            numbers["kl_to_reference"] = (trained - inputs.ref_log_probs).nanmean()
        told.append(as_numbers(numbers) | {"grad_norm": result.grad_norm})

    report.micro_batch = micro_batch
    report.metrics = {name: sum(one[name] for one in told) / updates for name in told[0]}
    tell_steps(report, ratios, trained, rewards, trajectories.steps, reference)
    if reference is not None and reference.error is not None:
        error = objective.weight_error(inputs.of(sampled, sampled), reference.error / 2)
        report.metrics["reference_weight_error"] = error
    report.metrics["drift"] = report.drift
    report.metrics["skipped_updates"] = float(report.skipped_updates)
    return report


def tell_steps(
    report: UpdateReport, ratios: RatioWatch, trained: torch.Tensor, rewards: torch.Tensor, steps: torch.Tensor,
    reference: Reference | None,
) -> None:  # fmt: skip
    """Numbers by the sampler's step. Waits for the device, after the last update.

    Args: trained: (N, S), of the last update. steps: (N, S) on the CPU.
    """
    drift = {f"drift/step_{step:03d}": value for step, value in report.drift_by_step.items() if not math.isnan(value)}
    report.by_step.peaks |= drift
    ratios.read(report.by_step, steps, rewards.isfinite())
    if reference is not None and reference.error is None:  # else every step carries the mean over some
        report.by_step.add_means("kl_to_reference", (trained - reference.log_probs).cpu(), steps)


def agreed_counts(policy: Policy, trajectories: Trajectories, chosen: torch.Tensor | None, reduce: AllReduce) -> RowCounts:
    """The largest counts of all ranks: where some steps are guided and steps are drawn, ranks draw more or fewer guided ones, and
    each must run as many forwards as the others. Every rank calls this."""
    guided, plain = reduce([float(count) for count in count_rows(policy, trajectories, chosen)], "max")
    return RowCounts(int(guided), int(plain))


def current_log_probs(
    policy: Policy, engine: TrainingEngine, trajectories: Trajectories, micro_batch: int, counts: RowCounts
) -> torch.Tensor:
    """Pass (1): (N, S) log-probs of the stored steps under the current weights."""
    evaluate = partial(log_prob_pass, policy, engine.denoiser, trajectories, micro_batch, counts=counts)
    # Not where ranks communicate in a forward: the others would be one forward ahead.
    return again_after_release(evaluate) if engine.passes_are_local else evaluate()


def backpropagate(
    policy: Policy, engine: TrainingEngine, trajectories: Trajectories, weights: torch.Tensor, chosen: torch.Tensor | None,
    counts: RowCounts, micro_batch: int, reduce: AllReduce, say: Callable[[str], None],
) -> tuple[torch.Tensor, int]:  # fmt: skip
    """Pass (3): the gradient of sum(weights * log_prob), in the engine, over all ranks.

    Args: weights: (N, S) dL/dlog_prob. chosen: (N, m) the steps to go through, None for all. counts: of them, agreed upon.
    Returns: (N, S) the log-probs on the way, NaN where a trajectory was lost; and the micro-batch, halved if the memory was too
        small for it.
    """
    engine.set_scale(reduce([float(weights.abs().max())], "max")[0])
    attempt = partial(
        gradient_pass, policy, engine.denoiser, trajectories, weights, backward=engine.backward, loss_scale=engine.scale,
        chosen=chosen, counts=counts,
    )  # fmt: skip
    with engine.accumulating():
        # A halved micro-batch stays. If `old` is there already, log-probs keep its geometry to the end of the epoch: the weights
        # that it was computed with are gone, and the pass that makes them needs less memory than this one.
        trained, micro_batch = halve_on_oom(
            attempt, micro_batch, clear=engine.discard_gradients, recoverable=engine.passes_are_local, say=say,
            any_rank=lambda failed: reduce([float(failed)], "max")[0] > 0,
        )  # fmt: skip
    return trained.masked_fill(trajectories.log_probs.isnan(), math.nan), micro_batch


def as_numbers(values: dict[str, torch.Tensor]) -> dict[str, float]:
    """With one wait for the device, after everything else has been asked for."""
    numbers = torch.stack([value.detach().double() for value in values.values()]).tolist()
    return dict(zip(values, numbers, strict=True))


def again_after_release(run: Callable[[], torch.Tensor]) -> torch.Tensor:
    """run(), and once more with what torch kept of the device's memory given back. Another batch size would round otherwise."""
    try:
        return run()
    except torch.OutOfMemoryError:
        pass
    release()
    return run()


def largest_by_step(values: torch.Tensor, steps: torch.Tensor) -> dict[int, float]:
    """The largest of (N, S) values of each step, NaN where all are. steps: (N, S) on the CPU, the step's number of each."""
    values = torch.where(values.isnan(), -math.inf, values).flatten()
    largest = values.new_full((int(steps.max()) + 1,), -math.inf)
    largest = largest.scatter_reduce(0, steps.flatten().to(values.device), values, "amax").tolist()
    return {step: math.nan if largest[step] == -math.inf else largest[step] for step in steps.unique().tolist()}
