"""Times the phases of an epoch against the bare U-Net calls they contain, and against the machine's own peak, in one run.

A phase and its bare calls follow each other in every round, so that a busy neighbour slows both: the median of the rounds' ratios
is what counts; seconds are this machine's and this hour's.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from benchmarks.resident import MIB, can_measure, peak_during
from benchmarks.timing import Timing
from benchmarks.traffic import Traffic, count_traffic
from benchmarks.workload import Call, Workload
from prdp_fast.core import distributed
from prdp_fast.models.families import StableDiffusion
from prdp_fast.planning.cost import denoiser_flop

PEAK_SIZE = {"cpu": 1024, "cuda": 8192}  # of the square matrix product that measures the peak


@dataclass
class Phase:
    """One phase of the epoch; times in milliseconds."""

    name: str
    timing: Timing
    bare: Timing | None = None  # its U-Net calls alone
    overhead: float | None = None  # phase / bare, the median of the rounds' ratios
    overhead_spread: float | None = None  # their interquartile range
    denoiser_rows: int = 0
    tflop: float = 0.0  # of those rows; a backward counts twice its forward
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
        """All phases over all bare U-Net calls: each phase's own ratio, weighed by its calls, and the rest on top."""
        with_calls = sum(phase.overhead * phase.bare.median_ms for phase in self.phases if phase.overhead and phase.bare)
        return (with_calls + sum(phase.timing.median_ms for phase in self.phases if not phase.bare)) / self.bare_ms

    @property
    def images_per_s(self) -> float:
        return 1e3 * self.images / sum(phase.timing.median_ms for phase in self.phases)

    def as_dict(self) -> dict[str, Any]:
        derived = {"epoch_overhead": self.epoch_overhead, "images_per_s": self.images_per_s}
        return asdict(self) | derived


def stopwatch(device: torch.device) -> Callable[[Callable[[], object]], float]:
    """Milliseconds of a call, device work included."""

    def measure(call: Callable[[], object]) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return 1e3 * (time.perf_counter() - start)

    return measure


def peak_tflop_per_s(device: torch.device, dtype: torch.dtype, rounds: int = 7) -> float:
    """The rate of a large square matrix product here and now, its best of a few: what no U-Net can exceed."""
    n = PEAK_SIZE[device.type]
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    watch = stopwatch(device)
    best = min(watch(lambda: a @ b) for _ in range(rounds + 1))
    return 2 * n**3 / best * 1e-9


@dataclass(frozen=True)
class PhaseCalls:
    """What a phase does, and what of it can be done bare."""

    run: Call
    bare: Call | None = None  # its U-Net calls alone: same rows, same mode
    denoiser_rows: int = 0
    forwards: int = 1  # that a row costs: a backward counts for two


def phase_calls(workload: Workload) -> dict[str, PhaseCalls]:
    """The phases of an epoch of `workload`, each ready to be run over and over on trajectories that are drawn here."""
    policy, stochastic = workload.policy, workload.policy.transitions.stochastic
    guided, steps = bool(policy.guided.any()), len(policy.transitions)
    trajectories = workload.rollout()
    rewards = torch.rand(workload.images, generator=torch.Generator().manual_seed(0))
    reference = workload.reference(trajectories)
    # The policy's calls in the policy's own mode, on a module that no sharding touches.
    plain = copy.deepcopy(workload.reference_denoiser).requires_grad_(True).train()

    n, density = workload.images, workload.images * len(stochastic)
    calls = {
        "rollout": PhaseCalls(
            workload.rollout,
            workload.bare_forward(workload.reference_denoiser, n, guided, workload.rollout_batch, repeat=steps),
            n * policy.evaluations(torch.arange(steps)),
        ),
        "reference": PhaseCalls(
            lambda: workload.reference(trajectories),
            workload.bare_forward(workload.reference_denoiser, density, guided, workload.micro_batch),
            n * policy.evaluations(stochastic),
        ),
        "update": PhaseCalls(
            lambda: workload.update(trajectories, rewards, reference),
            workload.bare_forward_backward(plain, density, guided),
            n * policy.evaluations(stochastic),
            forwards=3,
        ),
    }
    text = workload.text
    if text is not None:
        images = workload.decode(trajectories)
        calls["text"] = PhaseCalls(lambda: text.encode(workload.prompts))
        calls["decode"] = PhaseCalls(lambda: workload.decode(trajectories))
        calls["reward"] = PhaseCalls(lambda: workload.score(images))
    return calls


def tflop_per_row(workload: Workload) -> float:
    """Of one forward of the workload's U-Net."""
    shapes = StableDiffusion(dict(workload.reference_denoiser.config), workload.embeddings.prompt_embeds.shape[1])
    return 1e-12 * denoiser_flop(shapes)


def profile(workload: Workload, rounds: int = 5) -> Profile:
    """Every phase and its bare calls, `rounds` times in turn; then each once more for its memory, and for what it sends.

    Every rank of a job calls it. Ranks wait for each other before each call, so that none is charged for another's delay.
    """
    device, ranks = workload.embeddings.prompt_embeds.device, distributed.world_size()
    calls = phase_calls(workload)
    watch = stopwatch(device)

    def together(call: Call) -> float:
        if ranks > 1:
            distributed.barrier()
        return watch(call)

    dtype = workload.embeddings.prompt_embeds.dtype
    peak = 0.0  # the best of many times between the phases: a busy neighbour slows those, and must not slow this alone
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
    for name, phase_call in calls.items():  # last: code that was compiled may not be, with somebody watching its operators
        with count_traffic() as traffic[name]:
            phase_call.run()

    per_row = tflop_per_row(workload)
    result = Profile(
        workload.preset, device_name(device), str(dtype).removeprefix("torch."), workload.images,
        len(workload.policy.transitions), peak, ranks=ranks,
    )  # fmt: skip
    for name, phase_call in calls.items():
        timing = Timing.of(samples[name, "phase"])
        tflop = phase_call.denoiser_rows * phase_call.forwards * per_row
        rate = tflop / (timing.median_ms * 1e-3)
        phase = Phase(
            name, timing, None, None, None, phase_call.denoiser_rows, tflop, rate, rate / peak, memory.get(name),
            traffic[name].sent, traffic[name].whole, traffic[name].calls,
        )  # fmt: skip
        if phase_call.bare is not None:
            pairs = zip(samples[name, "phase"], samples[name, "bare"], strict=True)
            ratios = Timing.of([one / other for one, other in pairs])
            phase.bare, phase.overhead = Timing.of(samples[name, "bare"]), ratios.median_ms
            phase.overhead_spread = ratios.iqr_ms
        result.phases.append(phase)
    return result


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"


def table(profile: Profile) -> str:
    """The profile as text."""
    head = f"{profile.preset} on {profile.device}, {profile.dtype}: {profile.images} images, {profile.steps} steps"
    if profile.ranks > 1:
        head += f", on each of {profile.ranks} ranks"
    lines = [
        f"{head}; matrix product {1e3 * profile.peak_tflop_per_s:.0f} GFLOP/s",
        f"{'phase':<10} {'ms':>10} {'spread':>8} {'/ bare U-Net':>15} "
        f"{'U-Net rows':>11} {'GFLOP':>9} {'GFLOP/s':>9} {'of peak':>8} {'peak MiB':>9} {'sent MiB':>9}",
    ]
    for p in profile.phases:
        overhead = f"{p.overhead:.3f} ({p.overhead_spread:.3f})" if p.overhead else ""
        work = (
            f"{p.denoiser_rows:>11} {1e3 * p.tflop:>9.1f} {1e3 * p.tflop_per_s:>9.1f} {p.share_of_peak:>8.0%}" if p.denoiser_rows else ""
        )
        memory = "" if p.peak_memory_mib is None else f"{p.peak_memory_mib:.0f}"
        lines.append(
            f"{p.name:<10} {p.timing.median_ms:>10.1f} {p.timing.iqr_ms:>8.1f} {overhead:>15} {work:<40} "
            f"{memory:>9} {p.sent_bytes / MIB:>9.2f}"
        )
    total = statistics.fsum(p.timing.median_ms for p in profile.phases)
    lines.append(f"{'epoch':<10} {total:>10.1f} {'':>8} {profile.epoch_overhead:>15.3f}   {profile.images_per_s:.1f} images/s")
    return "\n".join(lines)
