"""The phases of an epoch of the embedded model under pytest-benchmark: `make bench`.

A phase, and the bare denoiser calls in it: `overhead` is the first over the second. Then a whole epoch, and the most memory of
each phase: `peak_mib` counts the device's tensors on CUDA and the process's resident pages elsewhere, `over_mib` is what the
phase added. Other models: `python -m benchmarks.epoch.profile`.
"""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.epoch.workload import Workload
from benchmarks.lib.resident import MIB, can_measure, peak_during, peak_over_baseline

WITH_CALLS = ["rollout", "reference", "update"]
PHASES = [*WITH_CALLS, "text", "decode", "reward"]


@pytest.mark.parametrize("phase", WITH_CALLS)
def test_phase(benchmark: Any, measure_against_bare: Any, phase: str) -> None:
    benchmark.group = phase
    measure_against_bare(phase)


@pytest.mark.parametrize("phase", WITH_CALLS)
def test_bare_calls(benchmark: Any, measure: Any, phase_calls: Any, phase: str) -> None:
    benchmark.group = phase
    measure(phase_calls[phase].bare, rows=phase_calls[phase].denoiser_rows)


@pytest.mark.benchmark(group="epoch")
def test_decode_and_reward(measure: Any, workload: Workload) -> None:
    trajectories = workload.rollout()
    measure(lambda: workload.score(workload.decode(trajectories)))


@pytest.mark.benchmark(group="epoch")
def test_epoch(measure: Any, workload: Workload) -> None:
    measure(workload.epoch)


@pytest.mark.benchmark(group="memory")  # the times are those of the same calls, while memory is watched
@pytest.mark.parametrize("phase", PHASES)
def test_peak(benchmark: Any, workload: Workload, phase_calls: Any, phase: str) -> None:
    device = workload.device
    if not can_measure(device):
        pytest.skip("no high-water mark of resident pages on this system")
    run = phase_calls[phase].run
    run()
    over = peak_over_baseline(run, device)
    peak = benchmark.pedantic(lambda: peak_during(run, device), rounds=1)
    benchmark.extra_info.update(peak_mib=peak / MIB, over_mib=over / MIB)
