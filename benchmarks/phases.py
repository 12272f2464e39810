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

from benchmarks.timing import Timing
from benchmarks.workload import Workload
from prdp_fast.cost import unet_flop
from prdp_fast.models.shapes import Shapes

PEAK_SIZE = {"cpu": 1024, "cuda": 8192}  # of the square matrix product that measures the peak


@dataclass
class Phase:
    """One phase of the epoch; times in milliseconds."""

    name: str
    timing: Timing
    bare: Timing | None = None  # its U-Net calls alone
    overhead: float | None = None  # phase / bare, the median of the rounds' ratios
    overhead_spread: float | None = None  # their interquartile range
    unet_rows: int = 0
    tflop: float = 0.0  # of those rows; a backward counts twice its forward
    tflop_per_s: float = 0.0
    share_of_peak: float = 0.0
    peak_memory_mib: float | None = None  # CUDA only


@dataclass
class Profile:
    preset: str
    device: str
    dtype: str
    images: int
    steps: int
    peak_tflop_per_s: float
    phases: list[Phase] = field(default_factory=list)

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


def profile(workload: Workload, rounds: int = 5) -> Profile:
    """Every phase and its bare calls, `rounds` times in turn."""
    device = workload.embeddings.prompt_embeds.device
    policy, stochastic = workload.policy, workload.policy.transitions.stochastic
    guided = bool(policy.guided.any())
    steps = len(policy.transitions)
    trajectories = workload.rollout()
    rewards = torch.rand(workload.images, generator=torch.Generator().manual_seed(0))
    images = workload.decode(trajectories) if workload.pipeline else None
    reference = workload.reference(trajectories)
    # The policy's calls in the policy's own mode, on a module that no sharding touches.
    plain = copy.deepcopy(workload.reference_unet).requires_grad_(True).train()

    n, density = workload.images, workload.images * len(stochastic)
    calls: dict[str, tuple[Callable[[], object], Callable[[], object] | None, int, int]] = {
        # name: (phase, its bare calls, U-Net rows, forwards a row costs)
        "rollout": (
            workload.rollout,
            workload.bare_forward(workload.reference_unet, n, guided, workload.rollout_batch, repeat=steps),
            n * policy.evaluations(torch.arange(steps)), 1,
        ),
        "reference": (
            lambda: workload.reference(trajectories),
            workload.bare_forward(workload.reference_unet, density, guided, workload.micro_batch),
            n * policy.evaluations(stochastic), 1,
        ),
        "update": (
            lambda: workload.update(trajectories, rewards, reference),
            workload.bare_forward_backward(plain, density, guided),
            n * policy.evaluations(stochastic), 3,
        ),
    }  # fmt: skip
    if workload.text is not None and images is not None:
        calls["text"] = (lambda: workload.text.encode(workload.prompts), None, 0, 0)  # type: ignore[union-attr]
        calls["decode"] = (lambda: workload.decode(trajectories), None, 0, 0)
        calls["reward"] = (lambda: workload.score(images), None, 0, 0)

    watch = stopwatch(device)
    samples: dict[tuple[str, str], list[float]] = {}
    memory: dict[str, float] = {}
    for round_number in range(-1, rounds):  # the first round warms up
        for name, (run, bare, _, _) in calls.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            taken = {"phase": watch(run)}
            if device.type == "cuda":
                memory[name] = torch.cuda.max_memory_allocated(device) / 2**20
            if bare is not None:
                taken["bare"] = watch(bare)
            if round_number >= 0:
                for kind, value in taken.items():
                    samples.setdefault((name, kind), []).append(value)

    dtype = workload.embeddings.prompt_embeds.dtype
    shapes = Shapes(dict(workload.reference_unet.config), workload.embeddings.prompt_embeds.shape[1])
    peak, per_row = peak_tflop_per_s(device, dtype), 1e-12 * unet_flop(shapes)
    result = Profile(
        workload.preset, device_name(device), str(dtype).removeprefix("torch."), workload.images, steps, peak
    )  # fmt: skip
    for name, (_, bare, rows, forwards) in calls.items():
        timing = Timing.of(samples[name, "phase"])
        tflop = rows * forwards * per_row
        rate = tflop / (timing.median_ms * 1e-3)
        phase = Phase(name, timing, None, None, None, rows, tflop, rate, rate / peak, memory.get(name))
        if bare is not None:
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
    lines = [
        f"{head}; matrix product {1e3 * profile.peak_tflop_per_s:.0f} GFLOP/s",
        f"{'phase':<10} {'ms':>10} {'spread':>8} {'/ bare U-Net':>15} "
        f"{'U-Net rows':>11} {'GFLOP':>9} {'GFLOP/s':>9} {'of peak':>8}",
    ]
    for p in profile.phases:
        overhead = f"{p.overhead:.3f} ({p.overhead_spread:.3f})" if p.overhead else ""
        work = (
            f"{p.unet_rows:>11} {1e3 * p.tflop:>9.1f} {1e3 * p.tflop_per_s:>9.1f} {p.share_of_peak:>7.0%}" if p.unet_rows else ""
        )
        lines.append(f"{p.name:<10} {p.timing.median_ms:>10.1f} {p.timing.iqr_ms:>8.1f} {overhead:>15} {work}")
    total = statistics.fsum(p.timing.median_ms for p in profile.phases)
    lines.append(f"{'epoch':<10} {total:>10.1f} {'':>8} {profile.epoch_overhead:>15.3f}   {profile.images_per_s:.1f} images/s")
    return "\n".join(lines)
