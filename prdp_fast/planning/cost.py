"""What an epoch costs: denoiser rows by phase, floating-point operations, and how the time would scale over GPUs.

One multiplication with one addition counts as two operations (FLOP), as vendors count the peak of a device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch.utils.flop_counter import FlopCounterMode

from prdp_fast.config.recipe import ScheduleSettings
from prdp_fast.core.format import format_flop
from prdp_fast.models.families import Family
from prdp_fast.sampling.policy import Policy
from prdp_fast.sampling.rows import strata

# Each matrix product of a forward has two in the backward: one for the gradient of its input, one of its weight.
BACKWARD_PER_FORWARD = 2

# Dense 16-bit matrix products, TFLOP/s, from NVIDIA's data sheets (their tables show twice that, with sparsity). The longest
# name that begins a device's own counts; a device that is not here has no known peak.
PEAK_TFLOPS = {
    "NVIDIA A100": 312.0,
    "NVIDIA H100": 989.4,  # SXM
    "NVIDIA H100 PCIe": 756.5,
    "NVIDIA H100 NVL": 835.5,
    "NVIDIA H200": 989.4,
    "NVIDIA H200 NVL": 835.5,
}


def denoiser_flop(shapes: Family) -> int:
    """FLOP of the denoiser's forward for one row, matrix products, convolutions and attention, counted on the meta device."""
    denoiser = shapes.counted_denoiser
    inputs = shapes.denoiser_inputs(1, "meta")
    counter = FlopCounterMode(display=False)
    # There attention is its two matrix products, so what a fused kernel would do is counted too.
    with counter, torch.no_grad():
        denoiser(**inputs)
    return counter.get_total_flops()


def backward_per_forward(shapes: Family) -> float:
    """FLOP of the denoiser's backward over its forward's.

    With an adapter about 1: frozen weights have no gradient, but what comes before them does. Counted there, layer by layer.
    """
    if shapes.lora is None:
        return BACKWARD_PER_FORWARD
    forward, both = FlopCounterMode(display=False), FlopCounterMode(display=False)
    with both:
        with forward:
            output = shapes.counted_denoiser(**shapes.denoiser_inputs(1, "meta"))[0]
        output.sum().backward()
    return both.get_total_flops() / forward.get_total_flops() - 1


@dataclass(frozen=True)
class PhaseRows:
    """denoiser rows of one phase of an epoch, over all ranks."""

    forward: float = 0.0  # with random steps and a guidance interval, the average over the draws
    backward: float = 0.0  # of those, the ones that are backpropagated

    def flop(self, per_row: float, recompute: bool = False, backward: float = BACKWARD_PER_FORWARD) -> float:
        """recompute: activation checkpointing runs the forward again in the backward. backward: over the forward's."""
        return per_row * (self.forward + (backward + recompute) * self.backward)


def epoch_rows(
    schedule: ScheduleSettings, policy: Policy, *, needs_reference: bool, first_epoch: bool = False, on_policy: bool = True
) -> dict[str, PhaseRows]:
    """denoiser rows of one epoch by phase, on the fast path (no pass (1) before the first update).

    Args:
        first_epoch: before the first update the policy is the reference, and no reference pass is run.
        on_policy: the policy samples; where the reference does, pass (1) is always run.
    """
    images = schedule.prompts_per_epoch * schedule.images_per_prompt
    each = policy.trained_evaluations
    every = float(each.sum())

    def subset(steps: int | None) -> float:
        """Evaluations of one trajectory, in expectation over the draws: the mean of each stratum."""
        if steps is None or steps >= len(each):
            return every
        borders = strata(len(each), steps).tolist()
        return sum(float(each[first:end].mean()) for first, end in pairwise(borders))

    # Later updates of an epoch each need pass (1), the log-probs before the gradient, over every step.
    later = every * (schedule.updates_per_epoch - 1)
    trained = subset(schedule.update_timesteps) + later
    reference = subset(schedule.reference_timesteps) if needs_reference and not first_epoch else 0.0
    return {
        "rollout": PhaseRows(images * policy.evaluations(torch.arange(len(policy.transitions)))),
        "reference": PhaseRows(images * reference),
        "update": PhaseRows(images * (trained + later + (0 if on_policy else every)), images * trained),
    }


def device_peak(name: str, dtype: torch.dtype, *, tf32: bool = False) -> float | None:
    """FLOP/s of a device's matrix products; None if unknown.

    Args: tf32: whether float32 products run on tensor cores, at half the 16-bit rate. Without them the rate is another table's.
    """
    known = max((key for key in PEAK_TFLOPS if name.startswith(key)), key=len, default=None)
    if known is None or (dtype == torch.float32 and not tf32):
        return None
    return PEAK_TFLOPS[known] * 1e12 / (2 if dtype == torch.float32 else 1)


def describe_epoch(
    rows: Mapping[str, PhaseRows],
    per_row: float,
    *,
    recompute: bool,
    peak: float | None,
    gpus: int,
    backward: float = BACKWARD_PER_FORWARD,
    title: str = "U-Net",
) -> list[str]:
    """Lines for the user: rows and operations of an epoch by phase, and the least time they take where the peak is known.

    Args: title: of the denoiser.
    """
    flop = {name: phase.flop(per_row, recompute, backward) for name, phase in rows.items()}
    lines = [f"{title} rows per epoch, {name}: {phase.forward:.0f}" for name, phase in rows.items()]
    lines.append(f"{title} forward of one row: {format_flop(per_row)}; backward: {format_flop((backward + recompute) * per_row)}")
    total = sum(flop.values())
    shares = ", ".join(f"{name} {format_flop(value)}" for name, value in flop.items())
    lines.append(f"an epoch: {format_flop(total)} ({shares})")
    if peak is not None:
        lines.append(f"at {gpus} x {format_flop(peak)}/s, the devices' peak, an epoch takes at least {total / peak / gpus:.1f} s")
    return lines


@dataclass(frozen=True)
class Prediction:
    """Seconds of one epoch on n GPUs. An estimate, from measured phases and the least bytes that have to cross the link."""

    compute: float
    communication: float

    @property
    def seconds(self) -> float:
        return self.compute + self.communication


# Phases whose work is divided among the ranks; the rest (a checkpoint, the start of an epoch) is the same on each.
DIVIDED = frozenset({"text", "rollout", "decode", "reward", "reference", "update"})


def predict_epoch(
    phase_seconds: Mapping[str, float],
    gpus: int,
    stage: int,
    parameters: int,
    bytes_per_parameter: float,
    bandwidth: float,
    *,
    updates: int = 1,
    micro_batches: int = 1,
    first_passes: int | None = None,
    coalesced: bool = False,
    gradient_bytes: float | None = None,
    overlap: float = 0.0,
    max_live: int = 1_000_000_000,
) -> Prediction:
    """Epoch time on `gpus` GPUs, from phases measured on one GPU with the whole epoch's prompts.

    A ring moves (n-1)/n of a tensor through each link for a reduce-scatter or an all-gather, and an all-reduce is one of each.
    What DeepSpeed 0.19.8 sends, as counted by `benchmarks/lib/traffic.py`:

        stage 0     gradients all-reduced once an update
        stage 1, 2  gradients all-reduced, where a reduce-scatter would do (a rank drops what it does not keep), the optimizer's
                    new weights all-gathered once an update; at stage 2 the gradients of every micro-batch, unless coalesced
        stage 3     gradients reduce-scattered as often as at stage 2; the weights all-gathered for every forward, again for its
                    backward if they do not stay in between, and once for the rollout

    Args:
        phase_seconds: seconds of an epoch by phase, on one GPU. Phases in DIVIDED are divided by `gpus`.
        bytes_per_parameter: of the weights that are gathered: 2 in bf16, 4 in float32.
        bandwidth: bytes/s of the slowest link of the ring, one direction.
        updates: K.
        micro_batches: backward passes of one update, on one GPU; divided by `gpus` too, since each has fewer rows.
        first_passes: updates with a pass (1), which at stage 3 gathers weights for each of its forwards; default K - 1.
        gradient_bytes: per parameter, as they cross the link; default as the weights.
        overlap: the share of the communication that hides behind compute, 0 to 1. Nothing is taken for hidden by default.
        max_live: DeepSpeed's stage3_max_live_parameters, which stay gathered from a forward to its backward.
    """
    compute = sum(seconds / gpus if name in DIVIDED else seconds for name, seconds in phase_seconds.items())
    ring = (gpus - 1) / gpus / bandwidth  # seconds per byte; 0 for one GPU
    gather = parameters * bytes_per_parameter * ring
    scatter = parameters * (bytes_per_parameter if gradient_bytes is None else gradient_bytes) * ring
    backwards = -(-micro_batches // gpus)
    reductions = backwards if stage >= 2 and not coalesced else 1
    if stage == 0:
        communication = updates * 2 * scatter
    elif stage < 3:
        communication = updates * (2 * reductions * scatter + gather)
    else:
        passes = updates - 1 if first_passes is None else first_passes
        again = 1 - min(1.0, max_live / parameters)  # of the weights, gathered a second time
        gathers = (1 + again) * backwards
        communication = updates * (reductions * scatter + gathers * gather) + passes * backwards * gather + gather
    return Prediction(compute, communication * (1 - overlap))
