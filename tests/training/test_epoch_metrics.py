"""A row of metrics.jsonl, from the scores of an epoch."""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch

from prdp_fast.core import distributed
from prdp_fast.core.records import Scores
from prdp_fast.training.metrics import epoch_metrics
from prdp_fast.training.update import Experience, UpdateReport


def row(monkeypatch, total: list[float], detail: list[float]) -> dict[str, float]:
    monkeypatch.setattr(distributed, "all_reduce", lambda values, op: [2.0 * value for value in values])  # two equal ranks
    scores = Scores(torch.tensor(total), {"a": torch.tensor(total)}, {"a/b": torch.tensor(detail)})
    return epoch_metrics(Experience(SimpleNamespace(prompts=[]), scores, None), UpdateReport())


def test_what_has_no_score_is_left_out_and_counted(monkeypatch) -> None:
    found = row(monkeypatch, [1.0, math.nan, 3.0, math.inf], [math.nan] * 4)
    assert (found["reward"], found["reward/a"], found["reward_std"], found["unscored"]) == (2.0, 2.0, 1.0, 4.0)
    assert math.isnan(found["reward/a/b"]), "no number is not 0"


def test_a_whole_epoch_has_no_such_count(monkeypatch) -> None:
    assert "unscored" not in row(monkeypatch, [1.0, 3.0], [0.0, 0.0])
