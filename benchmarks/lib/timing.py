"""Clocks, the machine's own rates, and how contestants take turns.

`wall_clock` times what takes milliseconds and more: a phase of an epoch. A `Stopwatch` times one operator. On CUDA it takes two
times, both with events and a cold L2:

- launch: from an idle device to the last kernel's end. Everything the host does to launch is in it: this is what a user waits.
- graph: one replay of a CUDA graph of the same call, enqueued while the device is still busy evicting the cache: kernels only.
  Its floor is the start of a graph, a few microseconds, which `launch_floor` measures with a graph that writes four bytes.

The cache is made cold by reading a buffer larger than it. Writing one would leave dirty lines, which would be written back while
the contestant runs, and charged to it. Contestants take turns in rounds, in an order that rotates, so that drifting clocks and
temperature affect all alike.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from benchmarks.lib.resident import MIB

EVICT_BYTES = 256 * MIB  # at least; or four times the L2
COPY_BYTES = 512 * MIB
MATRIX_SIZE = {"cpu": 1024, "cuda": 8192}  # of the square matrix product that measures the peak

Run = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Median and quartiles of one contestant's rounds."""

    median_ms: float
    q1_ms: float
    q3_ms: float
    samples: int

    @classmethod
    def of(cls, samples: list[float]) -> Timing:
        if not samples:
            raise ValueError("Timing.of: got no samples, expected at least one; run at least one round")
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0], 1)
        q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, q1, q3, len(samples))

    @property
    def iqr_ms(self) -> float:
        return self.q3_ms - self.q1_ms


def wall_clock(device: torch.device) -> Callable[[Run], float]:
    """A function that gives the milliseconds of a call, the device's work included."""

    def measure(call: Run) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return 1e3 * (time.perf_counter() - start)

    return measure


class CpuStopwatch:
    """Wall-clock time of a call. There is no launch to leave out, so nothing is captured."""

    device = torch.device("cpu")

    def launch(self, run: Run) -> float:
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3

    def capture(self, run: Run) -> Callable[[], float] | None:
        return None

    def synchronize(self) -> None:
        pass


class CudaStopwatch:
    def __init__(self, device: torch.device | str = "cuda") -> None:
        self.device = torch.device("cuda", torch.device(device).index or 0)
        l2 = getattr(torch.cuda.get_device_properties(self.device), "L2_cache_size", 0)
        self._cold = torch.zeros(max(EVICT_BYTES, 4 * l2) // 4, device=self.device)
        self._sink = torch.zeros((), device=self.device)
        self._start = torch.cuda.Event(enable_timing=True)
        self._end = torch.cuda.Event(enable_timing=True)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def _evict(self) -> None:
        torch.sum(self._cold, dim=0, out=self._sink)

    def launch(self, run: Run) -> float:
        self._evict()
        self.synchronize()
        return self._timed(run)

    def queued(self, run: Run) -> float:
        """Like `launch`, but `run` is enqueued behind the eviction (some 60 us), which hides one launch."""
        self._evict()
        return self._timed(run)

    def _timed(self, run: Run) -> float:
        self._start.record()
        run()
        self._end.record()
        self._end.synchronize()
        return self._start.elapsed_time(self._end)

    def capture(self, run: Run) -> Callable[[], float] | None:
        """A function that replays `run` once and gives its milliseconds. Raises RuntimeError if `run` cannot be captured."""
        warm = torch.cuda.Stream(self.device)
        warm.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(warm):
            for _ in range(3):
                run()
        torch.cuda.current_stream(self.device).wait_stream(warm)
        self.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return lambda: self.queued(graph.replay)


Stopwatch = CpuStopwatch | CudaStopwatch


def stopwatch_for(device: torch.device | str) -> Stopwatch:
    return CudaStopwatch(device) if torch.device(device).type == "cuda" else CpuStopwatch()


def interleave(contestants: Mapping[str, Callable[[], float]], *, rounds: int, warmup: int = 5) -> dict[str, Timing]:
    """Timing of each contestant; calling one runs it once and gives its milliseconds. The first `warmup` rounds do not count."""
    names = list(contestants)
    samples: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.disable()  # a collection in the middle of a launch would be charged to a contestant
    try:
        for turn in range(warmup + rounds):
            shift = turn % max(1, len(names))
            for name in names[shift:] + names[:shift]:
                milliseconds = contestants[name]()
                if turn >= warmup:
                    samples[name].append(milliseconds)
    finally:
        if collecting:
            gc.enable()
    return {name: Timing.of(values) for name, values in samples.items()}


def copy_bandwidth(stopwatch: Stopwatch, *, rounds: int = 20, size: int = COPY_BYTES) -> float:
    """GB/s (10^9 bytes, read plus written) of a copy of `size` bytes on the device: the roof that the operators are held to.

    Writing is dearer than reading, so an operator that mostly reads can come out above 100 % of it.
    """
    source = torch.ones(size // 4, device=stopwatch.device)
    target = torch.empty_like(source)
    run = stopwatch.queued if isinstance(stopwatch, CudaStopwatch) else stopwatch.launch
    timing = interleave({"copy": lambda: run(lambda: target.copy_(source))}, rounds=rounds)["copy"]
    return 2 * size / timing.median_ms / 1e6


def launch_floor(stopwatch: Stopwatch, *, rounds: int = 20) -> float | None:
    """Milliseconds of the smallest graph: one kernel that writes four bytes. None where there are no graphs."""
    one = torch.zeros(1, device=stopwatch.device)
    replay = stopwatch.capture(lambda: one.fill_(1.0))
    return interleave({"floor": replay}, rounds=rounds)["floor"].median_ms if replay else None


def peak_tflop_per_s(device: torch.device, dtype: torch.dtype, rounds: int = 7) -> float:
    """The rate of a large square matrix product here and now, the best of a few: the ceiling of a denoiser's rate."""
    n = MATRIX_SIZE[device.type]
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    watch = wall_clock(device)
    best = min(watch(lambda: a @ b) for _ in range(rounds + 1))
    return 2 * n**3 / best * 1e-9


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
