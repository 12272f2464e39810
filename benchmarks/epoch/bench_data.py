"""Prompts per second, from shards on disk to text embeddings: `make bench`."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import pytest

from benchmarks.epoch.workload import Workload
from benchmarks.lib.made_up_prompts import build_prompts
from prdp_fast.prompts import PromptSet, PromptStream

PROMPTS = 20_000  # two shards
PER_EPOCH = 64


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts")
    build_prompts(path, PROMPTS)
    return path


def add_rate(benchmark: Any, prompts: int) -> None:
    benchmark.extra_info.update(prompts=prompts, prompts_per_s=prompts / benchmark.stats.stats.median)


def drop_cached_pages(directory: Path) -> None:
    """Let the system drop what it keeps of these files in memory, where it can be asked to."""
    if hasattr(os, "posix_fadvise"):
        for path in directory.iterdir():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)  # pages not yet written stay
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


@pytest.mark.benchmark(group="prompts of an epoch")
def test_stream(benchmark: Any, directory: Path) -> None:
    """Epoch after epoch, as a job draws them. Most prompts come from a shard that is open."""
    stream = PromptStream(PromptSet.open(directory, "train"), seed=0, prompts_per_epoch=PER_EPOCH)
    numbers = itertools.count()
    benchmark.pedantic(lambda: stream.epoch(next(numbers)), rounds=200, warmup_rounds=1)
    add_rate(benchmark, PER_EPOCH)


@pytest.mark.benchmark(group="a first epoch, set opened")
@pytest.mark.parametrize("cache", ["cold", "warm"])
def test_open(benchmark: Any, directory: Path, cache: str) -> None:
    """The index read, digests checked, the first shard decoded; its files on disk, or in the system's memory."""

    def first_epoch() -> list[Any]:
        return PromptStream(PromptSet.open(directory, "train"), seed=0, prompts_per_epoch=PER_EPOCH).epoch(0)

    benchmark.pedantic(
        first_epoch, setup=(lambda: drop_cached_pages(directory)) if cache == "cold" else None, rounds=5, warmup_rounds=1
    )
    add_rate(benchmark, PER_EPOCH)


@pytest.mark.benchmark(group="a shard decoded")
def test_shard(benchmark: Any, directory: Path) -> None:
    def fresh() -> tuple[tuple[PromptSet], dict[str, Any]]:
        return (PromptSet.open(directory, "train"),), {}

    benchmark.pedantic(lambda prompt_set: prompt_set.shard(0), setup=fresh, rounds=5, warmup_rounds=1)
    add_rate(benchmark, PROMPTS // 2)


@pytest.mark.benchmark(group="text")
def test_text_encoding(benchmark: Any, workload: Workload) -> None:
    prompts = (workload.prompts * PER_EPOCH)[:PER_EPOCH]
    benchmark.pedantic(lambda: workload.trainer.encode(prompts), rounds=10, warmup_rounds=1)
    add_rate(benchmark, PER_EPOCH)
