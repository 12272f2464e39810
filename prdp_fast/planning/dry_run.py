"""What a job would cost, for `--dry-run`: denoiser rows and FLOP of an epoch, memory of a rank. From configurations alone."""

from __future__ import annotations

from dataclasses import replace

import torch

from prdp_fast.core import distributed
from prdp_fast.core.errors import UserError
from prdp_fast.core.format import format_bytes
from prdp_fast.planning import cost
from prdp_fast.planning.job import Job
from prdp_fast.planning.memory import Footprint, choose_async_save, fake_activations, free_bytes, plan_memory
from prdp_fast.planning.micro_batch import CPU_MICRO_BATCH, choose_micro_batch


def dry_run(job: Job, device_name: str | None) -> list[str]:
    """Lines for the user. Nothing is loaded.

    Args: device_name: of the GPU, whose peak may be known; None on a CPU.
    """
    return [
        *job.family.notes,
        *job.step_lines(),
        *epoch_lines(job, device_name),
        *memory_lines(job, cuda=device_name is not None),
    ]


def epoch_lines(job: Job, device_name: str | None) -> list[str]:
    settings, family = job.settings, job.family
    tf32 = settings.performance.tf32 == "on"  # auto leaves it off in a float32 job
    peak = cost.device_peak(device_name, job.config.dtype, tf32=tf32) if device_name else None
    rows = cost.epoch_rows(settings.schedule, job.policy, needs_reference=job.needs_reference, on_policy=job.on_policy)
    lines = cost.describe_epoch(
        rows, cost.denoiser_flop(family),
        recompute=settings.performance.activation_checkpointing, peak=peak, gpus=job.world_size,
        backward=cost.backward_per_forward(family), title=family.denoiser_title,
    )  # fmt: skip
    if family.lora is not None:
        trained, whole = family.trained_parameters, family.denoiser_parameters
        lines.insert(0, f"LoRA of rank {family.lora.rank}: {trained} weights are trained, {whole - trained} stay as they are")
    return lines


def memory_lines(job: Job, *, cuda: bool) -> list[str]:
    recompute = job.settings.performance.activation_checkpointing
    activations = fake_activations(job.family, job.config.dtype, checkpointing=recompute)
    footprint = replace(job.footprint(cuda=cuda), activations=activations)
    available = free_bytes(torch.device("cuda" if cuda else "cpu"), distributed.local_ranks())
    size, about = planned_micro_batch(job, footprint, available, cuda=cuda)
    _, plan = choose_async_save(
        job.settings.checkpoint.async_save, plan_memory(replace(footprint, micro_batch=size)), footprint, available,
        free_bytes(torch.device("cpu"), distributed.local_ranks()), agree=bool,
    )  # fmt: skip
    each = f" (2 {job.family.denoiser_title} rows each with guidance)" if job.evaluations == 2 else ""
    verdict = "fits" if plan.fits(available) else "may not fit"
    return [
        f"one update of a rank: {job.rows_per_update} rows (trajectory, timestep){each}, "
        f"micro-batch {about}{size}: {-(-job.rows_per_update // size)} backward passes",
        plan.table(),
        f"  {verdict}: {format_bytes(available)} free on this machine's {'GPU' if cuda else 'CPU'}",
    ]


def planned_micro_batch(job: Job, footprint: Footprint, available: int, *, cuda: bool) -> tuple[int, str]:
    """Rows of a backward, and how sure that is."""
    size = job.settings.schedule.micro_batch
    if size != "auto":
        return size, ""
    most = job.rows_per_update if cuda else min(job.rows_per_update, CPU_MICRO_BATCH)
    try:
        return choose_micro_batch(footprint, available, most=most), "auto, about "
    except UserError:  # the machine at hand need not be the one that will train
        return 1, "auto, here not even "
