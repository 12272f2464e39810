"""Requests to stop inside one process: signals, their order, what they interrupt; when a run stops by itself."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from prdp_fast.core import ranks, stop_times, stops, watchdog
from prdp_fast.core.stops import Interrupted


@pytest.fixture(autouse=True)
def as_before():
    before = {name: signal.getsignal(signal.Signals[name]) for name in stops.STATUS}
    for name, handler in before.items():
        if handler is signal.SIG_IGN:  # as nohup leaves SIGHUP, which a job then leaves alone too
            signal.signal(signal.Signals[name], signal.SIG_DFL)
    yield
    for name, handler in before.items():
        signal.signal(signal.Signals[name], handler)


@pytest.fixture
def watching():
    with watchdog.watching(30.0) as dog:
        yield dog


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 0), (signal.SIGUSR1, 0), (signal.SIGHUP, 0), (signal.SIGINT, 130)]
)
def test_a_signal_is_noted_and_interrupts_only_what_may_be(watching, number, status):
    os.kill(os.getpid(), number)
    time.sleep(0.01)
    assert stops.requested() == stops.Request(signal.Signals(number).name, status)
    os.kill(os.getpid(), signal.SIGTERM)  # the first one counts
    time.sleep(0.01)
    assert stops.requested().reason == signal.Signals(number).name
    with pytest.raises(Interrupted), stops.interruptible():
        pytest.fail("work began although a stop was asked for")


def test_a_request_of_another_thread_ends_a_wait_of_the_main_thread(watching):
    started = time.monotonic()
    threading.Timer(0.1, stops.request, ["the time limit"]).start()
    with pytest.raises(Interrupted), stops.interruptible():
        time.sleep(30)
    assert time.monotonic() - started < 5 and stops.requested() == ("the time limit", 0)


def test_an_interrupt_that_a_library_swallows_comes_again(watching, monkeypatch):
    monkeypatch.setattr(stops, "AGAIN_S", 0.2)
    swallowed = []

    def work():
        try:
            time.sleep(30)
        except BaseException as error:
            swallowed.append(error)
        time.sleep(30)

    threading.Timer(0.1, os.kill, [os.getpid(), signal.SIGTERM]).start()
    with pytest.raises(Interrupted), stops.interruptible():
        work()
    assert len(swallowed) == 1


def test_signals_are_given_back():
    with watchdog.watching(30.0):
        pass
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_a_process_that_ends_after_a_stop_keeps_its_status():
    with watchdog.watching(30.0):
        signal.raise_signal(signal.SIGTERM)
        assert stops.requested() is not None
    assert stops.requested() is None
    signal.raise_signal(signal.SIGTERM)  # of a launcher that means well


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with watchdog.watching(30.0):
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.01)
            assert stops.requested() is None
    finally:
        signal.signal(signal.SIGHUP, before)


NOW = time.mktime((2026, 3, 2, 16, 0, 0, 0, 0, -1))


@pytest.mark.parametrize(
    ("stop_after", "variables", "expected"),
    [
        (None, {}, None),
        (90, {}, (90 * 60, "schedule.stop_after (90 minutes)")),
        ("16:30", {}, (1800, "schedule.stop_after (16:30)")),
        ("15:30", {}, (23.5 * 3600, "schedule.stop_after (15:30)")),
        (None, {"SLURM_JOB_END_TIME": str(int(NOW) + 600)}, (570, "the time limit of the SLURM job")),
        (5, {"SLURM_JOB_END_TIME": str(int(NOW) + 600)}, (300, "schedule.stop_after (5 minutes)")),
        ("16:30", {"SLURM_JOB_END_TIME": str(int(NOW) + 600)}, (570, "the time limit of the SLURM job")),
        (None, {"SLURM_JOB_END_TIME": str(int(NOW) - 600)}, None),
        (None, {"SLURM_JOB_END_TIME": "Unknown"}, None),
    ],
)
def test_the_earliest_time_to_stop(stop_after, variables, expected):
    found = stop_times.first(stop_after, 30.0, variables, NOW)
    assert (found and (found[0] - NOW, found[1])) == expected


def test_a_rank_that_is_gone_without_a_word(tmp_path, monkeypatch):
    (tmp_path / ranks.RANKS).mkdir()
    ranks.join(tmp_path, "start", 0, 3)
    try:
        for rank, pid, left in ((1, 2**22 + 1, "finished"), (2, os.getpid(), None)):
            monkeypatch.setattr(ranks._here, "rank", rank)
            monkeypatch.setattr(ranks._here, "left", left)
            monkeypatch.setattr(os, "getpid", lambda pid=pid: pid)
            ranks.enter("rollout", 7)
        monkeypatch.undo()
        assert [one["rank"] for one in ranks.others()] == [1, 2]
        assert ranks.vanished() is None, "rank 1 has said that it leaves, rank 2 lives"
        monkeypatch.setattr(ranks, "start_of", lambda pid: None)
        lost = ranks.vanished()
        assert lost is not None and lost["rank"] == 2
        assert "rank 2 of 3" in watchdog.lost_line(lost) and "in phase rollout of epoch 7" in watchdog.lost_line(lost)
        assert ranks.first_word() and not ranks.first_word()
    finally:
        ranks.forget()


def test_what_an_earlier_start_has_left_counts_for_nothing(tmp_path):
    (tmp_path / ranks.RANKS).mkdir()
    try:
        ranks.join(tmp_path, "first", 0, 2)
        ranks.tell(ranks.STOP, reason="SIGTERM", status=0)
        assert ranks.told(ranks.STOP)["reason"] == "SIGTERM"
        ranks.join(tmp_path, "second", 0, 2)
        assert ranks.told(ranks.STOP) is None and ranks.others() == []
    finally:
        ranks.forget()
