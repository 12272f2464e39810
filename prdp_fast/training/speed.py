"""What makes a job's denoisers cheaper: chosen for the work that is left, and remembered in the run directory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from prdp_fast.acceleration import channels_last
from prdp_fast.acceleration.choose import Acceleration, Denoisers, Ranks, accelerate
from prdp_fast.acceleration.payback import WorkLeft
from prdp_fast.core import distributed, run_directory
from prdp_fast.core.files import write_json
from prdp_fast.planning.cost import epoch_rows
from prdp_fast.planning.job import Job
from prdp_fast.training.engine import ZeroEngine
from prdp_fast.training.state import TrainState


def speed_up(
    job: Job,
    engine: ZeroEngine,
    reference: nn.Module | None,
    vae: nn.Module | None,
    state: TrainState,
    device: torch.device,
    output: Path | None,
) -> Acceleration:
    """Make the job's denoisers cheaper, and its decoder by their layout; as an earlier start of the run did, if there was one.

    Args: vae: None in a job that decodes nothing, as benchmarks of a denoiser alone.
    """
    remembered = None if output is None else run_directory.read_acceleration(output)[0] or None
    acceleration = accelerate(
        Denoisers(engine.engine.module, engine.gathered, reference, engine.has_adapter), job.settings.performance, job.family,
        train_rows=min(state.micro_batch or 1, job.rows_per_update) * job.evaluations,
        sample_rows=min(job.settings.sampler.rollout_batch, job.images_per_rank) * job.evaluations,
        stage=job.config.stage, device=device, dtype=job.config.dtype, guided=job.evaluations == 2, remembered=remembered,
        ranks=Ranks(distributed.rank(), distributed.gather_objects), work=work_left(job, state),
    )  # fmt: skip
    engine.sampling_view = acceleration.sampling_view
    if acceleration.decisions["channels_last"].value == "on":
        if vae is not None:
            channels_last.enable(vae.decoder)
    return acceleration


def remember(acceleration: Acceleration, output: Path, say: Callable[[str], None]) -> None:
    """Keep the choices in the run directory: a resumed run that chose alike rounds alike. Tell where it could not."""
    path, record = output / run_directory.ACCELERATION, acceleration.record()
    earlier, damaged = run_directory.read_acceleration(output)
    if damaged:
        say(f"{path.name} was damaged: chosen anew, so results may round differently from here on")
    changed = [name for name in earlier if name in record and record[name]["value"] != earlier[name]["value"]]
    for name in changed:
        say(
            f"{name} was {earlier[name]['value']!r} when the run started and is {record[name]['value']!r} now "
            f"({record[name]['reason']}): results round differently from here on"
        )
    if changed or not earlier:
        write_json(path, record)


def work_left(job: Job, state: TrainState) -> WorkLeft:
    """Denoiser rows of one rank until the job's end, for which something may be compiled."""
    schedule = job.settings.schedule
    rows = epoch_rows(schedule, job.policy, needs_reference=job.needs_reference, on_policy=job.on_policy)
    left = (schedule.epochs - state.epoch) / job.world_size
    per_role = {
        "trained": rows["update"].backward, "rollout": rows["rollout"].forward, "reference": rows["reference"].forward
    }  # fmt: skip
    limit = None if schedule.time_limit_minutes is None else schedule.time_limit_minutes * 60  # of this start
    return WorkLeft({role: left * count for role, count in per_role.items()}, limit)
