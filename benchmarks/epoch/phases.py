"""The phases of an epoch, each with the bare denoiser calls that it contains: same rows, same mode, inputs made beforehand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.epoch.workload import Workload
from prdp_fast.models.lora import adapter_off, trained_parameters
from prdp_fast.planning.cost import PhaseRows, backward_per_forward, denoiser_flop
from prdp_fast.sampling.draws import REFERENCE_STREAM, UPDATE_STREAM
from prdp_fast.sampling.rows import stratified

Call = Callable[[], object]


@dataclass(frozen=True)
class PhaseCalls:
    """What a phase does, and what of it can be done bare."""

    run: Call
    bare: Call | None = None  # its denoiser calls alone
    denoiser_rows: int = 0
    tflop: float = 0.0  # of those rows, backward passes included


@dataclass(frozen=True)
class Rows:
    """Latents that a pass evaluates. One that is guided takes two rows of the denoiser."""

    guided: int
    plain: int

    @property
    def denoiser_rows(self) -> int:
        return 2 * self.guided + self.plain

    @classmethod
    def of(cls, guided: torch.Tensor, images: int = 1) -> Rows:
        """guided: bool, of every step that is taken; images: that take these steps."""
        return cls(images * int(guided.sum()), images * int((~guided).sum()))


def phase_calls(workload: Workload) -> dict[str, PhaseCalls]:
    """The phases of an epoch, each ready to be run over and over on trajectories that are drawn here."""
    trainer, policy, schedule = workload.trainer, workload.policy, workload.settings.schedule
    recompute = workload.settings.performance.activation_checkpointing
    images = workload.images
    family = trainer.job.family
    per_row, backward = 1e-12 * denoiser_flop(family), backward_per_forward(family)
    trajectories, scores = workload.rollout(), workload.made_up_scores()

    def rows_of(timesteps: int | None, stream: int) -> Rows:
        """Of a pass over the stochastic steps, or over a subset, whose draw follows from the trajectories."""
        steps, total = trajectories.steps, trajectories.steps.shape[1]
        if timesteps is None or timesteps >= total:
            return Rows.of(policy.guided[steps])
        return Rows.of(policy.guided[steps.gather(1, stratified(trajectories.seeds, total, timesteps, stream))])

    frozen = workload.bare_denoiser
    sampled = Rows.of(policy.guided, images)
    calls = {
        "rollout": PhaseCalls(
            workload.rollout,
            bare_rollout(workload, frozen),
            sampled.denoiser_rows,
            PhaseRows(sampled.denoiser_rows).flop(per_row),
        )
    }
    reference = None
    if workload.needs_reference:
        reference = workload.reference(trajectories)
        rows = rows_of(schedule.reference_timesteps, REFERENCE_STREAM)
        calls["reference"] = PhaseCalls(
            lambda: workload.reference(trajectories),
            without_adapter(frozen, bare_pass(workload, frozen, rows)),
            rows.denoiser_rows,
            PhaseRows(rows.denoiser_rows).flop(per_row),
        )
    # K gradient passes. All but the first have a pass over every step before them, for the log-probs.
    later = schedule.updates_per_epoch - 1
    every, differentiated = rows_of(None, 0), rows_of(schedule.update_timesteps, UPDATE_STREAM)
    before, trained = later * every.denoiser_rows, (1 + later) * differentiated.denoiser_rows
    trainable = trainable_copy(frozen, recompute)
    log_probs = bare_pass(workload, trainable, every)
    gradients = bare_pass(workload, trainable, differentiated, gradients=True)

    def bare_updates() -> None:
        for number in range(1 + later):
            if number:
                log_probs()
            gradients()

    calls["update"] = PhaseCalls(
        lambda: workload.update(trajectories, scores, reference),
        bare_updates,
        before + trained,
        PhaseRows(before + trained, trained).flop(per_row, recompute, backward),
    )
    if workload.has_pictures:
        pictures = workload.decode(trajectories)
        calls["text"] = PhaseCalls(workload.encode)
        calls["decode"] = PhaseCalls(lambda: workload.decode(trajectories))
        calls["reward"] = PhaseCalls(lambda: workload.score(pictures))
    return calls


def trainable_copy(frozen: nn.Module, recompute: bool) -> nn.Module:
    """In training mode, with gradients where training has them. recompute: activation checkpointing."""
    module = copy.deepcopy(frozen)
    for parameter in trained_parameters(module):
        parameter.requires_grad_(True)
    if recompute:
        module.enable_gradient_checkpointing()
    return module.train()


def without_adapter(denoiser: nn.Module, call: Call) -> Call:
    def run() -> None:
        with adapter_off(denoiser):
            call()

    return run


def bare_rollout(workload: Workload, denoiser: nn.Module) -> Call:
    """Every step of a rollout, in its batches."""
    batch, guided = workload.settings.sampler.rollout_batch, workload.policy.guided
    steps = [
        bare_calls(workload, denoiser, workload.images, batch, guided=mode, repeat=int((guided == mode).sum()))
        for mode in (True, False)
    ]

    def run() -> None:
        for step in steps:
            step()

    return run


def bare_pass(workload: Workload, denoiser: nn.Module, rows: Rows, *, gradients: bool = False) -> Call:
    """A pass over stored steps, in its micro-batches. Unguided steps of a guided policy come two for one."""
    size, twice = workload.trainer.micro_batch, 1 if workload.policy.guidance_scale is None else 2
    parts = [
        bare_calls(workload, denoiser, rows.guided, size, guided=True, gradients=gradients),
        bare_calls(workload, denoiser, rows.plain, twice * size, guided=False, gradients=gradients),
    ]

    def run() -> None:
        for part in parts:
            part()
        if gradients:
            denoiser.zero_grad(set_to_none=True)

    return run


def bare_calls(
    workload: Workload, denoiser: nn.Module, latents: int, most: int, *, guided: bool, repeat: int = 1, gradients: bool = False
) -> Call:
    """This many latents in calls of one size, at most `most` each, `repeat` times.

    Args: gradients: backpropagate a given gradient at the output; it adds to those of the weights.
    """
    if not latents or not repeat:
        return lambda: None
    calls = -(-latents // most)
    rows = -(-latents // calls) * (2 if guided else 1)
    x, timesteps, told = inputs(workload, rows)
    grad = torch.randn_like(x)

    def run() -> None:
        with torch.set_grad_enabled(gradients):
            for _ in range(calls * repeat):
                output = denoiser(x, timestep=timesteps, **told, return_dict=False)[0]
                if gradients:
                    output.backward(grad)

    return run


def inputs(workload: Workload, rows: int) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Random latents, a timestep, and the workload's prompts over and over."""
    device, dtype = workload.device, workload.dtype
    x = torch.randn(rows, *workload.trainer.pipeline.latent_shape, device=device, dtype=dtype)
    told = workload.embeddings.rows(torch.arange(rows, device=device) % len(workload.prompts))
    conditioning = workload.trainer.job.family.conditioning(told, guided=False)
    return x, torch.full((rows,), 500, device=device), conditioning
