"""How well an epoch on several ranks is predicted from one on a single rank: `planning.cost.predict_epoch` against the clock.

    python -m benchmarks.epoch.scaling [--ranks 2] [--config zero2.json] [--output FILE.json]

Jobs of one rank and of several take turns, each started by the deepspeed launcher. One rank gives the seconds of each phase,
several the bandwidth of an all-reduce of as many numbers as the model has; from these two the epoch of several is predicted.

On a CPU a rank whose core is taken by another process says nothing of scaling. Epochs count in which every rank had its core
nearly all the time before the update. Where there is no such epoch, all count, and the verdict says so.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.lib import command
from benchmarks.lib.provenance import provenance
from prdp_fast.core import distributed
from prdp_fast.core.errors import UserError
from prdp_fast.core.files import write_json
from prdp_fast.planning.cost import predict_epoch

REDUCTIONS = 9  # all-reduces that are timed
UNDISTURBED = 0.95  # processor time over time on the wall, of one thread outside the update, which waits for other ranks
LAUNCH_SECONDS = 600


@dataclass
class Launch:
    """One job. Lists have an entry an epoch; seconds of the slowest rank."""

    ranks: int
    epochs: list[float]
    phases: dict[str, list[float]]
    processor_share: list[float]  # of the rank that was given least
    parameters: int
    stage: int
    coalesced: bool
    micro_batches: int  # of an update, on each rank
    all_reduce: float  # seconds, median, of as many float32 numbers as there are parameters
    sent: float  # bytes that each rank sends in an epoch's rollout and update


@dataclass(frozen=True)
class Verdict:
    """Seconds of an epoch on several ranks, and how they compare."""

    one_rank: float  # measured
    predicted: float
    predicted_communication: float
    measured: float
    error: float  # predicted / measured - 1
    speed_up: float  # one rank's over several's, measured
    bandwidth: float  # bytes/s of the link, from the all-reduce
    predicted_bytes: float  # that each rank sends
    counted_bytes: float
    epochs: dict[str, int]  # that count: of one rank, of several
    disturbed: bool  # there were none of some kind but disturbed ones


def counting(launches: list[Launch]) -> list[tuple[float, dict[str, float]]]:
    """(seconds, seconds by phase) of the epochs that other processes left alone; of all, if there is none."""
    every = [
        (share, (launch.epochs[i], {name: seconds[i] for name, seconds in launch.phases.items()}))
        for launch in launches
        for i, share in enumerate(launch.processor_share)
    ]
    return [epoch for share, epoch in every if share >= UNDISTURBED] or [epoch for _, epoch in every]


def conclude(single: list[Launch], several: list[Launch]) -> Verdict:
    """From jobs of one rank and jobs of several. Medians over the epochs that count, of all jobs."""
    one, many = single[0], several[0]
    n = many.ranks
    alone, together = counting(single), counting(several)
    phases = {name: statistics.median(taken[name] for _, taken in alone) for name in one.phases}
    seconds = statistics.median(launch.all_reduce for launch in several)
    bandwidth = 2 * (n - 1) / n * 4 * many.parameters / seconds
    options: dict[str, Any] = {"micro_batches": one.micro_batches, "coalesced": many.coalesced}
    prediction = predict_epoch(phases, n, many.stage, many.parameters, 4, bandwidth, **options)
    measured = statistics.median(seconds for seconds, _ in together)
    one_rank = statistics.median(seconds for seconds, _ in alone)
    return Verdict(
        one_rank=one_rank,
        predicted=prediction.seconds,
        predicted_communication=prediction.communication,
        measured=measured,
        error=prediction.seconds / measured - 1,
        speed_up=one_rank / measured,
        bandwidth=bandwidth,
        predicted_bytes=prediction.communication * bandwidth,
        counted_bytes=many.sent,
        epochs={"one_rank": len(alone), "several_ranks": len(together)},
        disturbed=any(max(share for job in jobs for share in job.processor_share) < UNDISTURBED for jobs in (single, several)),
    )


def describe(verdict: Verdict, ranks: int) -> str:
    busy = "; the machine was busy in every epoch, so this says little" if verdict.disturbed else ""
    return "\n".join(
        [
            f"epoch on 1 rank: {verdict.one_rank:.3f} s",
            f"all-reduce over {ranks} ranks: {verdict.bandwidth / 1e9:.3f} GB/s a link",
            f"epoch on {ranks} ranks, predicted: {verdict.predicted:.3f} s, "
            f"of it communication {1e3 * verdict.predicted_communication:.1f} ms",
            f"epoch on {ranks} ranks, measured: {verdict.measured:.3f} s, {verdict.speed_up:.2f} times one rank's speed",
            f"prediction error: {verdict.error:+.1%}, over {verdict.epochs['one_rank']} epochs of 1 rank and "
            f"{verdict.epochs['several_ranks']} of {ranks}{busy}",
            f"bytes that each rank sends, predicted: {verdict.predicted_bytes:.0f}, counted: {verdict.counted_bytes:.0f}",
        ]
    )


# ------------------------------------------------------------------------------------------------- in each rank of a launched job
def run_rank(config: str, overrides: list[str], rounds: int) -> Launch:
    """This rank's part of an epoch, `rounds` times after one that warms up."""
    # Imported here: the process that starts the jobs runs without the engine.
    import torch.distributed as dist

    from benchmarks.epoch.workload import TINY, Workload
    from benchmarks.lib.timing import wall_clock
    from benchmarks.lib.traffic import count_traffic

    workload = Workload.build(TINY, overrides, config=config)
    device, job = workload.device, workload.trainer.job
    watch = wall_clock(device)

    def epoch() -> tuple[dict[str, float], float]:
        """Seconds of each phase, as in `Workload.epoch`, and the share of them that this process ran before the update."""
        taken: dict[str, float] = {}

        def timed(name: str, call: Callable[[], Any]) -> Any:
            results: list[Any] = []
            taken[name] = watch(lambda: results.append(call())) / 1e3
            return results[0]

        start = time.process_time()
        workload.embeddings = timed("text", workload.encode)
        trajectories = timed("rollout", workload.rollout)
        images = timed("decode", lambda: workload.decode(trajectories))
        scores = timed("reward", lambda: workload.score(images))
        reference = timed("reference", lambda: workload.reference(trajectories)) if workload.needs_reference else None
        share = (time.process_time() - start) / sum(taken.values()) if device.type == "cpu" else 1.0
        timed("update", lambda: workload.update(trajectories, scores, reference))
        return taken, share

    epoch()
    totals, phases, shares = [], [], []
    for _ in range(rounds):
        distributed.barrier()
        start = time.perf_counter()
        taken, share = epoch()
        total = time.perf_counter() - start
        slowest = distributed.all_reduce([total, *taken.values()], "max")
        totals.append(slowest[0])
        shares.append(distributed.all_reduce([share], "min")[0])
        phases.append(dict(zip(taken, slowest[1:], strict=True)))

    parameters = job.family.trained_parameters
    gradients = torch.zeros(parameters, device=device)
    reductions = []
    for _ in range(REDUCTIONS + 2):
        distributed.barrier()
        reductions.append(watch(lambda: dist.all_reduce(gradients)) / 1e3)
    with count_traffic() as traffic:
        epoch()
    return Launch(
        ranks=job.world_size,
        epochs=totals,
        phases={name: [taken[name] for taken in phases] for name in phases[0]},
        processor_share=shares,
        parameters=parameters,
        stage=job.config.stage,
        coalesced=workload.trainer.engine.coalesce,
        micro_batches=-(-job.rows_per_update // workload.trainer.micro_batch),
        all_reduce=statistics.median(reductions[2:]),
        sent=traffic.sent,
    )


# ----------------------------------------------------------------------------------------------------------------- the whole
def launch(ranks: int, config: str, overrides: list[str], rounds: int) -> Launch:
    """Raises: UserError with the last error that the job printed, if it fails."""
    port = random.randrange(20000, 32000)  # below the ephemeral range, which other programs' connections draw from
    with tempfile.TemporaryDirectory() as directory:
        result = Path(directory) / "launch.json"
        launcher = [str(Path(sys.executable).with_name("deepspeed")), "--master_port", str(port), "--num_gpus", str(ranks)]
        own = ["--rank-result", str(result), "--config", config, "--rounds", str(rounds), *(f"--set={o}" for o in overrides)]
        done = subprocess.run(
            [*launcher, "--module", command.module_name(__file__), *own], capture_output=True, text=True,
            timeout=LAUNCH_SECONDS, env=command.environment(),
        )  # fmt: skip
        if done.returncode or not result.exists():
            lines = [line for line in (done.stdout + done.stderr).splitlines() if "rror" in line]
            raise UserError(f"the job of {ranks} rank(s) failed: {lines[-1].strip() if lines else 'it printed no error'}")
        return Launch(**json.loads(result.read_text()))


def run(args: argparse.Namespace, words: list[str]) -> int:
    if args.rank_result:
        result = run_rank(args.config, args.overrides, args.rounds)
        if distributed.is_main():
            args.rank_result.write_text(json.dumps(asdict(result)))
        return 0
    origin = provenance(__file__, words) if args.output else {}
    turns = [[launch(ranks, args.config, args.overrides, args.rounds) for ranks in (1, args.ranks)] for _ in range(args.launches)]
    single, several = [list(launches) for launches in zip(*turns, strict=True)]
    verdict = conclude(single, several)
    if args.output:
        jobs = {"one_rank": [asdict(job) for job in single], "several_ranks": [asdict(job) for job in several]}
        write_json(args.output, origin | {"config": Path(args.config).name, "verdict": asdict(verdict)} | jobs)
    print(describe(verdict, args.ranks))
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = command.parser_of(__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    command.add_job_options(parser)
    parser.add_argument("--launches", type=int, default=2, help="jobs of each number of ranks, in turn")
    parser.add_argument("--rounds", type=int, default=5, help="epochs of each job")
    parser.add_argument("--rank-result", type=Path, help=argparse.SUPPRESS)
    command.add_local_rank(parser)
    command.add_output(parser)
    args = parser.parse_args(arguments)
    if args.ranks < 2:
        parser.error(f"--ranks is {args.ranks}; expected 2 or more, to compare with one")
    return command.run(lambda: run(args, command.words(arguments)))


if __name__ == "__main__":
    sys.exit(main())
