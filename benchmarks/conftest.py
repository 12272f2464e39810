"""The job whose phases `make bench` measures, and what is printed below the table."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from benchmarks.epoch.phases import PhaseCalls
    from benchmarks.epoch.workload import Workload

ROUNDS = 5


@pytest.fixture(scope="session")
def workload() -> Iterator[Workload]:
    """The embedded model at an eighth of its recipe's epoch."""
    from benchmarks.epoch.workload import TINY, Workload  # the operators' benchmarks need neither DeepSpeed nor diffusers
    from prdp_fast.core import distributed

    torch.set_num_threads(1)
    yield Workload.build(TINY, ["schedule.prompts_per_epoch=2"])
    distributed.shutdown()


@pytest.fixture(scope="session")
def phase_calls(workload: Workload) -> dict[str, PhaseCalls]:
    from benchmarks.epoch import phases

    return phases.phase_calls(workload)


Measure = Callable[..., None]


@pytest.fixture
def measure(benchmark: Any, workload: Workload) -> Measure:
    """Time a call that makes all images of the workload's epoch."""

    def run(call: Callable[[], object], *, setup: Callable[[], object] | None = None, **info: Any) -> None:
        benchmark.extra_info.update(images=workload.images, **info)
        benchmark.pedantic(call, setup=setup, rounds=ROUNDS, warmup_rounds=1)

    return run


@pytest.fixture
def measure_against_bare(benchmark: Any, measure: Measure, workload: Workload, phase_calls: dict[str, PhaseCalls]) -> Measure:
    """Time a phase, with its bare denoiser calls before it in every round: `overhead` is the median of the rounds' ratios."""
    from benchmarks.lib.timing import peak_tflop_per_s, wall_clock

    def run(name: str) -> None:
        phase_call = phase_calls[name]
        assert phase_call.bare is not None
        bare = phase_call.bare
        watch, taken, peak = wall_clock(workload.device), [], 0.0

        def before() -> None:
            nonlocal peak
            peak = max(peak, peak_tflop_per_s(workload.device, workload.dtype, rounds=3))
            taken.append(watch(bare))

        measure(phase_call.run, setup=before)
        own = benchmark.stats.stats.data  # seconds, of the rounds that count: the warm-up came first
        ratios = [1e3 * one / other for one, other in zip(own, taken[-len(own) :], strict=True)]
        share = phase_call.tflop / statistics.median(own) / peak
        benchmark.extra_info.update(
            rows=phase_call.denoiser_rows, tflop=phase_call.tflop, share_of_peak=share, overhead=statistics.median(ratios)
        )  # fmt: skip

    return run


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    session = getattr(terminalreporter.config, "_benchmarksession", None)
    for one in getattr(session, "benchmarks", []):  # the table has no room for these
        numbers = {name: value for name, value in one.extra_info.items() if isinstance(value, (int, float))}
        if numbers:
            shown = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
            terminalreporter.write_line(f"{one.name}: {shown}")
    if torch.cuda.is_available():
        terminalreporter.write_line("bytes, bandwidth, compiled chains and the results file: make gpu-session")
    else:
        terminalreporter.write_line("no CUDA device: Triton kernels not measured; CPU references only")
