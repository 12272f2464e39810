"""A fault that one rank finds is every rank's, at a point where the run can be saved."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from prdp_fast.core import distributed, stops
from prdp_fast.core.errors import AgreedError, NotFiniteError, OneRankError, RewardError, UserError
from prdp_fast.core.stops import Request, Stopped
from prdp_fast.training.agreement import agree

MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


def on_rank(number: int, faults: list[BaseException | None], monkeypatch: pytest.MonkeyPatch) -> BaseException | None:
    """What `agree` raises on one of several ranks. Args: faults: of each."""
    told: list[Any] = []
    for rank, fault in enumerate([*faults, faults[number]]):  # a first round for what each says; then the rank that is looked at
        last = rank == len(faults)

        def gather(value: Any, last: bool = last) -> list[Any]:
            told.append(value)
            return told[:-1] if last else [value]

        monkeypatch.setattr(distributed, "gather_objects", gather)
        try:
            with agree():
                if fault is not None:
                    raise fault
        except (UserError, Stopped) as error:
            found: BaseException | None = error
        else:
            found = None
    return found


@pytest.mark.parametrize(
    "fault", [UserError("shard 3 is missing"), OneRankError("shard 3 is missing"), NotFiniteError("shard 3 is missing")]
)
def test_what_one_rank_finds_every_rank_raises(monkeypatch, fault: UserError) -> None:
    for number in range(2):
        found = on_rank(number, [None, fault], monkeypatch)
        assert type(found) is AgreedError and str(found) == "shard 3 is missing (on rank 1)"
    found = on_rank(0, [fault, fault], monkeypatch)
    assert type(found) is AgreedError and str(found) == "shard 3 is missing", "of every rank none is named"


def test_a_reward_that_fails_may_be_asked_again(monkeypatch) -> None:
    for number in range(3):
        found = on_rank(number, [None, RewardError("no licence"), UserError("shard 3 is missing")], monkeypatch)
        assert type(found) is RewardError and str(found) == "no licence (on rank 1)"


def test_memory_that_runs_out_is_one_line(monkeypatch) -> None:
    found = on_rank(1, [None, MEMORY], monkeypatch)
    assert type(found) is AgreedError and str(found).startswith("out of memory (CUDA out of memory. Tried to allocate 2 GiB); ")
    assert "(on rank 1)" in str(found) and "\n" not in str(found)


def test_a_stop_counts_before_a_fault(monkeypatch) -> None:
    monkeypatch.setattr(stops, "_request", Request("SIGTERM", 0))
    assert isinstance(on_rank(0, [UserError("x"), None], monkeypatch), Stopped)


def test_what_nobody_can_mend_is_left_to_its_rank() -> None:
    with pytest.raises(KeyError), agree():
        raise KeyError("boom")
