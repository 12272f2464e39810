"""Out of memory in a phase whose batch size changes speed only."""

from __future__ import annotations

import pytest
import torch

from prdp_fast.core.errors import OneRankError
from prdp_fast.core.memory import smaller_on_oom


def run(limit: int, size: int) -> tuple[tuple[str, int], list[int], list[str]]:
    tried, said = [], []

    def attempt(batch: int) -> str:
        tried.append(batch)
        if batch > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return "done"

    return smaller_on_oom(attempt, size, phase="rollout", advice="buy more", say=said.append), tried, said


def test_half_and_half_again() -> None:
    assert run(64, 16) == (("done", 16), [16], [])
    result, tried, said = run(5, 16)
    assert result == ("done", 4) and tried == [16, 8, 4]
    assert said[0] == "out of memory in the rollout with a batch of 16: going on with 8" and len(said) == 2


def test_one_row_that_does_not_fit_is_one_line_of_its_own_rank() -> None:
    with pytest.raises(OneRankError, match=r"^out of memory in the rollout, even one row at a time; buy more$"):
        run(0, 3)


def test_another_error_is_no_lack_of_memory() -> None:
    with pytest.raises(RuntimeError, match="shapes"):
        smaller_on_oom(lambda size: (_ for _ in ()).throw(RuntimeError("shapes")), 4, phase="", advice="", say=pytest.fail)
