"""How many rows one backward takes: chosen before the job by what fits, halved in it if a rank runs out of memory after all."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch
from torch import nn

from prdp_fast.core.errors import OneRankError, UserError
from prdp_fast.core.format import format_bytes
from prdp_fast.core.memory import release
from prdp_fast.models.families.base import Family
from prdp_fast.models.lora import trained_parameters
from prdp_fast.planning.memory import (
    Footprint,
    MemoryPlan,
    forward_backward,
    free_bytes,
    measure_activations,
    peak_bytes,
    plan_memory,
)

T = TypeVar("T")

CPU_MICRO_BATCH = 64  # rows; on a CPU the embedded model is no faster with 128, and slower with 256


def sizes_up_to(most: int) -> list[int]:
    """Micro-batches worth trying, largest first: multiples of 8, then powers of two, which matrix units like."""
    return [*range(most // 8 * 8, 0, -8), *(size for size in (4, 2, 1) if size <= most)]


def choose_micro_batch(
    job: Footprint,
    available: float,
    *,
    most: int,
    trial: Callable[[int], bool] | None = None,
    agree: Callable[[float], float] = lambda size: size,
) -> int:
    """The largest micro-batch that fits.

    Args:
        available: free bytes on the rank's device.
        most: rows that an update has anyway, or the largest size known to be of use.
        trial: tells whether a size really fits; asked once, and the next size (half) is taken on trust.
        agree: the minimum over all ranks.
    Raises: UserError, on every rank, if one row does not fit on some rank.
    """
    size = next((size for size in sizes_up_to(most) if plan_memory(replace(job, micro_batch=size)).fits(available)), 0)
    if trial is not None and size > 1 and not trial(size):
        size = next(smaller for smaller in sizes_up_to(size // 2))
    agreed = int(agree(float(size)))
    if agreed == 0:
        plan = plan_memory(replace(job, micro_batch=1))
        raise UserError(
            f"schedule.micro_batch auto: not even one row fits: {format_bytes(plan.total())} planned on a rank with "
            f"{format_bytes(available)} free, on this rank or another; use a higher ZeRO stage, more ranks, or "
            "performance.activation_checkpointing true"
        )
    return agreed


def fit(
    job: Footprint,
    denoiser: nn.Module,
    shapes: Family,
    *,
    wanted: int | None,
    most: int,
    local_ranks: int,
    agree: Callable[[float], float],
) -> tuple[int, MemoryPlan, int]:
    """Measure the activations of the real denoiser, and choose the micro-batch if the recipe leaves it open. Every rank calls it.

    Args:
        job: its activations and micro-batch are filled in here.
        denoiser: float32, on the rank's device, before DeepSpeed takes it over; left alone.
        wanted: the recipe's micro-batch; None for auto.
        most, agree: as in `choose_micro_batch`.
    Returns: the micro-batch, the plan with it, and the bytes that this rank may fill.
    """
    device = next(denoiser.parameters()).device
    available = free_bytes(device, local_ranks)
    job, size = _try_out(job, denoiser, shapes, available, None if wanted else most, agree)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what the copy and its gradients took
    size = wanted or size
    return size, plan_memory(replace(job, micro_batch=size)), available


def _try_out(
    job: Footprint,
    denoiser: nn.Module,
    shapes: Family,
    available: int,
    most: int | None,
    agree: Callable[[float], float],
) -> tuple[Footprint, int]:
    """The job with its activations measured on a copy of the denoiser, and, if `most` is given, the micro-batch to take."""
    device = next(denoiser.parameters()).device
    probe = copy.deepcopy(denoiser).to(job.dtype).train()
    for parameter in trained_parameters(probe):
        parameter.requires_grad_(True)
    job = replace(job, activations=measure_activations(probe, shapes, job.dtype))

    def trial(size: int) -> bool:
        rows = size * job.evaluations
        try:
            used = peak_bytes(lambda: forward_backward(probe, shapes, rows, job.dtype), probe)
        except torch.OutOfMemoryError:
            return False
        measured = replace(job.activations, per_row=0, fixed=used)
        return plan_memory(replace(job, micro_batch=size, activations=measured)).fits(available)

    if most is None:
        return job, 0
    if device.type == "cuda":
        return job, choose_micro_batch(job, available, most=most, trial=trial, agree=agree)
    return job, choose_micro_batch(job, available, most=min(most, CPU_MICRO_BATCH), agree=agree)


def halve_on_oom(
    attempt: Callable[[int], T],
    size: int,
    *,
    clear: Callable[[], None],
    any_rank: Callable[[bool], bool],
    say: Callable[[str], None],
    recoverable: bool = True,
) -> tuple[T, int]:
    """Run a gradient pass; if a rank runs out of memory, forget what it added and run it again, once, with half the micro-batch.

    A backward that stopped half way has added part of its gradient, and which part is unknown: hence all over again.

    Args:
        attempt: the whole pass at a micro-batch size.
        clear: removes every gradient that the pass has added.
        any_rank: whether it is true on any rank. A collective: every rank calls it after every attempt.
        say: tells the user one line.
        recoverable: False where ranks communicate inside a forward or backward. A rank that stops there leaves the others
            waiting, so that nothing can be agreed upon, and the job has to stop.
    Returns: what `attempt` returned, and the size it ran with.
    Raises: UserError if it cannot be mended, or half is too much as well.
    """
    first = size
    while True:
        result: T | None = None
        failed = False
        try:
            result = attempt(size)
        except torch.OutOfMemoryError:
            failed = True
        # Outside the except clause: the traceback of the exception holds the activations that have to go.
        if failed and not recoverable:
            clear()
            raise OneRankError(out_of_memory(first, size))
        if not any_rank(failed):
            return result, size  # type: ignore[return-value]
        result = None
        clear()
        release()
        if size < first or size == 1:
            raise UserError(out_of_memory(first, size))
        size = size // 2
        say(f"out of memory in the update with schedule.micro_batch {first}: going on with {size}, the gradient is the same")


def out_of_memory(asked: int, size: int) -> str:
    tried = f"schedule.micro_batch {asked}" + (f", and with {size} after it" if size != asked else "")
    mend = f"set schedule.micro_batch {size // 2} or auto" if size > 1 else "set performance.activation_checkpointing true"
    return (
        f"out of memory in the update with {tried}; {mend}, and go on with --resume and the run's directory, or start the job "
        "again at a higher ZeRO stage"
    )
