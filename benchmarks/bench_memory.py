"""The most memory at once, phase by phase: `make bench`. The times are those of the same calls, watched.

`peak_mib` is of the device's tensors on CUDA, of the process's resident pages elsewhere; `over_mib` is what the phase added.
"""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.resident import MIB, can_measure, peak_during, peak_over_baseline
from benchmarks.workload import Workload

PHASES = ["rollout", "reference", "update", "text", "decode", "reward"]


@pytest.mark.benchmark(group="memory")
@pytest.mark.parametrize("phase", PHASES)
def test_peak(benchmark: Any, workload: Workload, phase_calls: Any, phase: str) -> None:
    device = workload.embeddings.prompt_embeds.device
    if not can_measure(device):
        pytest.skip("no high-water mark of resident pages on this system")
    run = phase_calls[phase].run
    run()
    over = peak_over_baseline(run, device)
    peak = benchmark.pedantic(lambda: peak_during(run, device), rounds=1)
    benchmark.extra_info.update(peak_mib=peak / MIB, over_mib=over / MIB)
