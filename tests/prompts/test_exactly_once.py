"""Every prompt exactly once a pass, whatever shards, ranks, stops, restarts and changed numbers of ranks there are."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.epoch import exactly_once
from benchmarks.lib.made_up_prompts import build_prompts
from prdp_fast.core.errors import UserError
from prdp_fast.core.records import Prompt
from prdp_fast.prompts import PromptSet, PromptStream, write_index, write_shards
from prdp_fast.prompts.shards import SetEntry


def write(directory: Path, shards: list[int]) -> None:
    """A set whose shards hold so many prompts each."""
    entries, index = [], 0
    for number, count in enumerate(shards):
        prompts = [Prompt(index + i, f"prompt {index + i}", {}) for i in range(count)]
        entries += write_shards(prompts, directory, f"part{number}", shard_size=count).shards
        index += count
    write_index(directory, {"train": SetEntry(total=index, shards=entries)}, "1-test")


@st.composite
def jobs(draw: st.DrawFn) -> tuple[list[int], int, int, list[tuple[int, int, int]]]:
    """Shard sizes, prompts an epoch, a seed, and starts: (ranks, epochs that are drawn, epochs lost when it is stopped)."""
    shards = draw(st.lists(st.integers(1, 30), min_size=1, max_size=6))
    starts = draw(st.lists(st.tuples(st.integers(1, 16), st.integers(1, 9), st.integers(0, 3)), min_size=1, max_size=6))
    most = sum(shards)
    # Ranks divide an epoch: where one does not fit, the start has the next lower number that does.
    per_epoch = draw(st.integers(1, most))
    return shards, per_epoch, draw(st.integers(0, 2**31)), starts


@settings(max_examples=60, deadline=None, derandomize=True)
@given(jobs())
def test_every_prompt_comes_exactly_once_a_pass(job: tuple[list[int], int, int, list[tuple[int, int, int]]]) -> None:
    shards, per_epoch, seed, starts = job
    total, kept = sum(shards), []  # epochs that are finished, as they were drawn first
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), shards)
        for ranks, epochs, lost in starts:
            ranks = next(number for number in range(ranks, 0, -1) if per_epoch % number == 0)
            prompt_set = PromptSet.open(folder, "train")  # a restart: nothing is remembered but the epoch's number
            streams = [
                PromptStream(prompt_set, seed=seed, prompts_per_epoch=per_epoch, rank=rank, world_size=ranks)
                for rank in range(ranks)
            ]
            first = max(0, len(kept) - lost)
            again, kept = kept[first:], kept[:first]
            for epoch in range(first, first + len(again) + epochs):
                parts = [stream.epoch(epoch) for stream in streams]
                assert {len(part) for part in parts} == {per_epoch // ranks}
                assert streams[0].position(epoch) == divmod(epoch * per_epoch, total)
                kept.append([prompt for part in parts for prompt in part])
            assert kept[first : first + len(again)] == again, "what is drawn again is the same, noise included"
        sequence = [prompt for epoch in kept for prompt in epoch]
        for start in range(0, len(sequence) - total + 1, total):
            assert sorted(prompt.index for prompt in sequence[start : start + total]) == [*range(total)]
        rest = [prompt.index for prompt in sequence[len(sequence) // total * total :]]
        assert len(set(rest)) == len(rest), "nor twice in a pass that is not over"
        for epoch in kept:
            assert len({(prompt.index, prompt.occurrence) for prompt in epoch}) == per_epoch


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("many")
    build_prompts(directory, 5_000)
    return directory


def test_a_short_walk_of_the_benchmark(many: Path) -> None:
    """The long one has a million prompts; its result is in benchmarks/results."""
    found = exactly_once.walk(many, passes=2, seed=1, starts=8)
    assert found["drawn"] >= 10_000 and found["starts"] > 3 and len(found["ranks"]) > 2 and found["repeated"] > 0
    assert exactly_once.rate(many, 16) > 1000


def test_a_prompt_that_comes_twice_is_noticed(many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second epoch comes in the place of the first."""
    original = PromptStream.epoch
    monkeypatch.setattr(PromptStream, "epoch", lambda self, e: original(self, e if e else 1))
    with pytest.raises(UserError, match="came twice or not at all"):
        exactly_once.walk(many, starts=4)


def test_the_kept_result_is_whole() -> None:
    (file,) = (Path(__file__).parents[2] / "benchmarks/results").glob("exactly-once-*.json")
    found = json.loads(file.read_text())
    assert found["walk"]["drawn"] >= found["walk"]["prompts"] == 1_000_000
    assert found["times_needed"] > 50 and found["walk"]["growth"] < 0.05
