"""A whole epoch of the embedded model and what in it is no U-Net call, under pytest-benchmark: `make bench`.

Phases against their U-Net calls: `bench_rollout.py`, `bench_update.py`; other models: `python benchmarks/profile_step.py`.
"""

from __future__ import annotations

from typing import Any

from benchmarks.workload import Workload


def test_decode_and_reward(measure: Any, workload: Workload) -> None:
    trajectories = workload.rollout()
    measure(lambda: workload.score(workload.decode(trajectories)))


def test_epoch(measure: Any, workload: Workload) -> None:
    measure(workload.epoch)
