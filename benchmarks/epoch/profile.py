"""Where an epoch goes, phase by phase: seconds, denoiser work and its share of the machine's peak, memory, bytes to other ranks.

python -m benchmarks.epoch.profile                                   # the embedded model, here
python -m benchmarks.epoch.profile --preset sd14 --set schedule.prompts_per_epoch=4 --output profile.json --chart profile.png
python -m benchmarks.epoch.profile --trace trace.json                # one epoch for chrome://tracing or Perfetto
deepspeed --num_gpus 2 --module benchmarks.epoch.profile             # a rank's share of the prompts, and what it sends

A phase and its bare denoiser calls follow each other in every round, so that other processes on the machine slow both. The median
of the rounds' ratios is the result that carries over; the seconds are those of this machine in this hour.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.epoch.phases import Call, phase_calls
from benchmarks.epoch.workload import NAMES, Workload
from benchmarks.lib import command
from benchmarks.lib.provenance import provenance
from benchmarks.lib.resident import MIB, can_measure, peak_during
from benchmarks.lib.timing import Timing, device_name, peak_tflop_per_s, wall_clock
from benchmarks.lib.traffic import Traffic, count_traffic
from prdp_fast.core import distributed
from prdp_fast.core.files import write_json


@dataclass
class Phase:
    """One phase of the epoch; times in milliseconds."""

    name: str
    timing: Timing
    bare: Timing | None = None  # its denoiser calls alone
    overhead: float | None = None  # phase / bare, the median of the rounds' ratios
    overhead_spread: float | None = None  # their interquartile range
    denoiser_rows: int = 0
    tflop: float = 0.0  # of those rows, backward passes included
    tflop_per_s: float = 0.0
    share_of_peak: float = 0.0
    # The most there was at once, weights and all: of the device's tensors on CUDA, of the process's resident pages elsewhere.
    peak_memory_mib: float | None = None
    sent_bytes: float = 0.0  # by one rank to the others, in collectives taken for rings
    collective_bytes: int = 0  # of the tensors those worked on
    collectives: dict[str, int] = field(default_factory=dict)  # how often each was called


@dataclass
class Profile:
    preset: str
    device: str
    dtype: str
    images: int
    steps: int
    peak_tflop_per_s: float
    phases: list[Phase] = field(default_factory=list)
    ranks: int = 1

    @property
    def bare_ms(self) -> float:
        return sum(phase.bare.median_ms for phase in self.phases if phase.bare)

    @property
    def epoch_overhead(self) -> float:
        """All phases over all bare calls: each phase's own ratio, weighted by its calls, and the phases without calls on top."""
        with_calls = sum(phase.overhead * phase.bare.median_ms for phase in self.phases if phase.overhead and phase.bare)
        return (with_calls + sum(phase.timing.median_ms for phase in self.phases if not phase.bare)) / self.bare_ms

    @property
    def images_per_s(self) -> float:
        return 1e3 * self.images / sum(phase.timing.median_ms for phase in self.phases)

    def as_dict(self) -> dict[str, Any]:
        derived = {"epoch_overhead": self.epoch_overhead, "images_per_s": self.images_per_s}
        return asdict(self) | derived


def profile(workload: Workload, rounds: int = 5) -> Profile:
    """Every phase and its bare calls, `rounds` times in turn; then each once more for its memory, and for what it sends.

    Every rank of a job calls it. Ranks wait for each other before each call, so that none is charged for another's delay.
    """
    device, dtype, ranks = workload.device, workload.dtype, distributed.world_size()
    calls = phase_calls(workload)
    watch = wall_clock(device)

    def together(call: Call) -> float:
        if ranks > 1:
            distributed.barrier()
        return watch(call)

    # The best of many times between the phases: other processes slow the phases, and must not slow this measurement alone.
    peak = 0.0
    samples: dict[tuple[str, str], list[float]] = {}
    for round_number in range(-1, rounds):  # the first round warms up
        for name, phase_call in calls.items():
            peak = max(peak, peak_tflop_per_s(device, dtype, rounds=3))
            taken = {"phase": together(phase_call.run)}
            if phase_call.bare is not None:
                taken["bare"] = together(phase_call.bare)
            if round_number >= 0:
                for kind, value in taken.items():
                    samples.setdefault((name, kind), []).append(value)
    memory = {name: peak_during(one.run, device) / MIB for name, one in calls.items()} if can_measure(device) else {}
    traffic: dict[str, Traffic] = {}
    for name, phase_call in calls.items():  # last: compiled code may fall back to eager operators while they are watched
        with count_traffic() as traffic[name]:
            phase_call.run()

    result = Profile(
        workload.preset, device_name(device), str(dtype).removeprefix("torch."), workload.images,
        len(workload.policy.transitions), peak, ranks=ranks,
    )  # fmt: skip
    for name, phase_call in calls.items():
        timing = Timing.of(samples[name, "phase"])
        rate = phase_call.tflop / (timing.median_ms * 1e-3)
        phase = Phase(
            name, timing, None, None, None, phase_call.denoiser_rows, phase_call.tflop, rate, rate / peak, memory.get(name),
            traffic[name].sent, traffic[name].whole, traffic[name].calls,
        )  # fmt: skip
        if phase_call.bare is not None:
            pairs = zip(samples[name, "phase"], samples[name, "bare"], strict=True)
            ratios = Timing.of([one / other for one, other in pairs])
            phase.bare, phase.overhead = Timing.of(samples[name, "bare"]), ratios.median_ms
            phase.overhead_spread = ratios.iqr_ms
        result.phases.append(phase)
    return result


def table(profile: Profile) -> str:
    """The profile as text."""
    head = f"{profile.preset} on {profile.device}, {profile.dtype}: {profile.images} images, {profile.steps} steps"
    if profile.ranks > 1:
        head += f", on each of {profile.ranks} ranks"
    lines = [
        f"{head}; matrix product {1e3 * profile.peak_tflop_per_s:.0f} GFLOP/s",
        f"{'phase':<10} {'ms':>10} {'spread':>8} {'/ bare calls':>15} "
        f"{'rows':>11} {'GFLOP':>9} {'GFLOP/s':>9} {'of peak':>8} {'peak MiB':>9} {'sent MiB':>9}",
    ]
    for p in profile.phases:
        overhead = f"{p.overhead:.3f} ({p.overhead_spread:.3f})" if p.overhead else ""
        rates = f"{1e3 * p.tflop:>9.1f} {1e3 * p.tflop_per_s:>9.1f} {p.share_of_peak:>8.0%}"
        counted = f"{p.denoiser_rows:>11} {rates}" if p.denoiser_rows else ""
        memory = "" if p.peak_memory_mib is None else f"{p.peak_memory_mib:.0f}"
        lines.append(
            f"{p.name:<10} {p.timing.median_ms:>10.1f} {p.timing.iqr_ms:>8.1f} {overhead:>15} {counted:<40} "
            f"{memory:>9} {p.sent_bytes / MIB:>9.2f}"
        )
    total = statistics.fsum(p.timing.median_ms for p in profile.phases)
    lines.append(f"{'epoch':<10} {total:>10.1f} {'':>8} {profile.epoch_overhead:>15.3f}   {profile.images_per_s:.1f} images/s")
    return "\n".join(lines)


def annotation(phase: Phase) -> str:
    """What a phase's bar has beside it."""
    peak = [] if phase.peak_memory_mib is None else [f"peak {phase.peak_memory_mib:.0f} MiB"]
    return ", ".join(peak + [f"{phase.sent_bytes / MIB:.1f} MiB sent"] * bool(phase.sent_bytes))


def chart(result: Profile, path: Path) -> None:
    """Bars of the phases, the bare denoiser calls inside each darker."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3), layout="constrained")
    names = [phase.name for phase in result.phases]
    bars = axes.barh(names, [phase.timing.median_ms / 1e3 for phase in result.phases], color="#c9d7e8", label="phase")
    axes.barh(
        names, [phase.bare.median_ms / 1e3 if phase.bare else 0 for phase in result.phases], color="#2f6299", height=0.4,
        label="its denoiser calls alone",
    )  # fmt: skip
    axes.bar_label(bars, labels=[annotation(phase) for phase in result.phases], padding=4, fontsize=8, color="#555555")
    axes.margins(x=0.4)  # room for the labels
    axes.invert_yaxis()
    axes.set_xlabel(f"seconds an epoch of {result.images} images ({result.preset}, {result.device})")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def measure(args: argparse.Namespace, words: list[str]) -> int:
    origin = provenance(__file__, words) if args.output else {}
    workload = Workload.build(args.preset, args.overrides, config=args.config)
    if args.trace:
        with torch.profiler.profile() as trace:
            workload.epoch()
        if distributed.is_main():
            trace.export_chrome_trace(str(args.trace))
    result = profile(workload, args.rounds)
    if not distributed.is_main():
        return 0
    if args.output:
        write_json(args.output, origin | result.as_dict())
    if args.chart:
        chart(result, args.chart)
    print(table(result))
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = command.parser_of(__doc__)
    parser.add_argument("--preset", default="tiny", choices=NAMES)
    command.add_job_options(parser)
    parser.add_argument("--rounds", type=int, default=5)
    command.add_output(parser)
    parser.add_argument("--chart", type=Path, help="PNG")
    parser.add_argument("--trace", type=Path, help="torch.profiler trace of one epoch")
    command.add_local_rank(parser)
    args = parser.parse_args(arguments)
    return command.run(lambda: measure(args, command.words(arguments)))


if __name__ == "__main__":
    sys.exit(main())
