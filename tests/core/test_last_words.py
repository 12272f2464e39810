"""Who tells the user how a job ended, and what its exit status is."""

from __future__ import annotations

import pytest

from prdp_fast.core import last_words, ranks, watchdog
from prdp_fast.core.errors import OneRankError, UserError


@pytest.fixture
def rank_of_two(tmp_path, monkeypatch):
    """Rank 0 of a job whose rank 1 is this process likewise, and its run directory."""
    monkeypatch.setattr(last_words, "OTHERS_S", 0.2)
    (tmp_path / ranks.RANKS).mkdir()
    for rank in (1, 0):
        ranks.join(tmp_path, "start", rank, 2)
    ranks.enter("update", 3)
    yield tmp_path
    ranks.forget()


CLOSED = RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:554] Connection closed by peer [127.0.0.1]:7931")
TIMED_OUT = RuntimeError("[.../gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 66000ms for recv operation to complete")


def test_a_collective_that_broke_because_a_rank_was_killed_names_that_rank(rank_of_two, monkeypatch, capsys):
    monkeypatch.setattr(ranks, "start_of", lambda pid: None)
    assert last_words.unexpected(CLOSED) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: rank 1 of 2 ") and said.count("\n") == 1


def test_a_rank_keeps_still_after_another_s_fault(rank_of_two, capsys):
    ranks.tell(ranks.FAULT, status=1)
    assert last_words.unexpected(CLOSED) == 1
    assert capsys.readouterr().err == ""


def test_a_collective_that_broke_by_itself_is_told_with_its_traceback(rank_of_two, capsys):
    assert last_words.unexpected(CLOSED) == 1
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("error: rank 0 of 2 failed in phase update of epoch 3: RuntimeError: ") and "pair.cc" in said[-1]


def test_a_collective_that_timed_out_is_a_hang(rank_of_two, monkeypatch, capsys):
    ended = []
    monkeypatch.setattr(watchdog, "ANSWERS_S", 0.0)
    monkeypatch.setattr(watchdog.os, "_exit", lambda status: ended.append(status))
    last_words.unexpected(TIMED_OUT)
    assert ended == [watchdog.HUNG] and (rank_of_two / "ranks/stacks-00000.txt").read_text()
    assert "has waited until a collective of phase update of epoch 3 timed out, for one of: rank 1 (" in capsys.readouterr().err


def test_a_mistake_of_every_rank_is_told_once_and_one_of_a_single_rank_always(rank_of_two, capsys):
    assert last_words.mistake(UserError("the recipe is wrong")) == last_words.mistake(UserError("the recipe is wrong")) == 2
    assert last_words.mistake(OneRankError("the disk of rank 0 is full")) == 2
    assert capsys.readouterr().err.splitlines() == ["error: the recipe is wrong", "error: rank 0: the disk of rank 0 is full"]


@pytest.mark.parametrize("killed", [True, False])
def test_a_checkpoint_that_cannot_be_gathered_because_a_rank_was_killed_names_that_rank(rank_of_two, monkeypatch, capsys, killed):
    if killed:
        monkeypatch.setattr(ranks, "start_of", lambda pid: None)
    error = OneRankError("the checkpoint cannot be gathered")
    error.__cause__ = CLOSED
    assert last_words.mistake(error) == (1 if killed else 2)
    said = capsys.readouterr().err
    assert (
        said.startswith("error: rank 1 of 2 " if killed else "error: rank 0: the checkpoint cannot be") and said.count("\n") == 1
    )
