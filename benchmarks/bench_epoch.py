"""The phases of an epoch of the embedded model, under pytest-benchmark: `make bench`.

Ratios to the bare U-Net calls, and other models: `python benchmarks/profile_step.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from benchmarks.workload import Workload
from prdp_fast import zero

ROUNDS = 5


@pytest.fixture(scope="module")
def workload() -> Iterator[Workload]:
    torch.set_num_threads(1)
    yield Workload.build("tiny", ["schedule.prompts_per_epoch=4"])
    zero.shutdown_distributed()


@pytest.fixture(scope="module")
def trajectories(workload: Workload) -> Any:
    return workload.rollout()


def measure(benchmark: Any, images: int, call: Callable[[], object]) -> None:
    benchmark.extra_info["images"] = images
    benchmark.pedantic(call, rounds=ROUNDS, warmup_rounds=1)


def test_rollout(benchmark: Any, workload: Workload) -> None:
    measure(benchmark, workload.images, workload.rollout)


def test_reference(benchmark: Any, workload: Workload, trajectories: Any) -> None:
    measure(benchmark, workload.images, lambda: workload.reference(trajectories))


def test_update(benchmark: Any, workload: Workload, trajectories: Any) -> None:
    rewards, reference = torch.arange(workload.images, dtype=torch.float32), workload.reference(trajectories)
    measure(benchmark, workload.images, lambda: workload.update(trajectories, rewards, reference))


def test_decode_and_reward(benchmark: Any, workload: Workload, trajectories: Any) -> None:
    measure(benchmark, workload.images, lambda: workload.score(workload.decode(trajectories)))


def test_epoch(benchmark: Any, workload: Workload) -> None:
    measure(benchmark, workload.images, workload.epoch)
