"""Requests to stop a run: a signal, a time that has come, a launcher that is gone.

The first request counts and later ones change nothing. Work that may be thrown away is interrupted; all other work goes on to the
next point where every rank can leave, see `training/agreement.py`. When the grace is over, the process ends wherever it is.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NamedTuple

from prdp_fast.core import ranks
from prdp_fast.core.visible import visible

# A run that was asked to stop has done what it was asked. Ctrl-C tells scripts, as everywhere, that a person broke it off.
STATUS = {"SIGTERM": 0, "SIGUSR1": 0, "SIGHUP": 0, "SIGINT": 130}
AGAIN_S = 1.0  # between two interrupts of one block: the first could have been swallowed by a library


class Interrupted(BaseException):
    """Ends work whose result may be thrown away. No Exception, which libraries catch."""


class Stopped(BaseException):
    """Every rank leaves the run here. No Exception, which libraries catch."""

    def __init__(self, request: Request) -> None:
        super().__init__(request.reason)
        self.request = request
        self.kept = "no epoch was finished yet, and nothing is lost"  # what the run has to show


class Request(NamedTuple):
    reason: str  # "SIGTERM"
    status: int  # what the process exits with


_request: Request | None = None
_requested_at = 0.0
_grace_s = 30.0
_handled: set[int] = set()
_armed = False  # inside `interruptible`
_interrupted_at = 0.0
_on_request: list[Callable[[Request], None]] = []


def install(grace_s: float) -> None:
    """Take the signals over. Of the main thread. A signal that is ignored, as nohup does with SIGHUP, stays ignored."""
    global _grace_s
    _grace_s = grace_s
    for name in STATUS:
        number = signal.Signals[name]
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _handle)
            _handled.add(number)


def release() -> None:
    """Give the signals back, and forget the request: the run has ended. After a stop further signals are ignored, or they would
    change the exit status of a process that is on its way out."""
    global _request
    for number in _handled:
        usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, usual if _request is None else signal.SIG_IGN)
    _handled.clear()
    _on_request.clear()
    _request = None


def grace_s() -> float:
    return _grace_s


def handled() -> set[int]:
    """Numbers of the signals that are taken for requests."""
    return _handled


def requested() -> Request | None:
    return _request


def overdue() -> bool:
    """Whether the grace is over."""
    return _request is not None and time.monotonic() - _requested_at > _grace_s


def on_request(tell: Callable[[Request], None]) -> None:
    """Call tell(request) when there is one, in whatever thread it is noticed."""
    _on_request.append(tell)


def request(reason: str, status: int = 0) -> None:
    """Ask this rank to stop. From any thread, any number of times."""
    global _request, _requested_at
    if _request is None:
        _requested_at = time.monotonic()
        _request = Request(reason, status)
        for tell in _on_request:
            tell(_request)
    if _armed and threading.current_thread() is not threading.main_thread() and _handled:
        # Python runs handlers in the main thread, and a signal ends the call that this waits in.
        signal.pthread_kill(threading.main_thread().ident or 0, min(_handled))


def signalled(number: int) -> None:
    """Ask for the stop that a signal means."""
    name = signal.Signals(number).name
    request(name, STATUS.get(name, 0))


def _handle(number: int, frame: FrameType | None) -> None:
    global _interrupted_at
    signalled(number)
    if _armed and time.monotonic() - _interrupted_at > AGAIN_S:
        _interrupted_at = time.monotonic()
        raise Interrupted


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Around work that no other rank waits for inside, and whose result may be thrown away.

    Raises: Interrupted, at any moment.
    """
    global _armed
    if _request is not None:
        raise Interrupted
    _armed = True
    try:
        yield
    finally:
        _armed = False


def end_now() -> None:
    """End the process: the grace is over, and the main thread is where it cannot leave."""
    assert _request is not None
    if ranks.first_word():
        say(
            f"stopped by {_request.reason}: {ranks.place()} took longer than --grace {_grace_s:g} s; the same command goes on "
            f"from {ranks.last_saved()}"
        )
    ranks.leave(f"stopped by {_request.reason}")
    os._exit(_request.status)


def say(line: str) -> None:
    """To whoever may still listen: the terminal of a launcher that is gone does not."""
    with contextlib.suppress(OSError, ValueError):
        print(visible(line), file=sys.stderr, flush=True)
