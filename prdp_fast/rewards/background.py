"""Scoring in a thread of its own: beside the denoiser, and so that a call that never ends can be left behind.

The threads are daemons. A process that ends does not wait for them, so a reward that hangs holds up neither an error nor Ctrl-C.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any, Generic, NamedTuple, TypeVar

import torch

from prdp_fast.core.records import Scores

Result = TypeVar("Result")


class _Outcome(NamedTuple):
    value: Any
    error: BaseException | None


class Pending(Generic[Result]):
    """What a worker is asked to do, and its outcome."""

    def __init__(self, work: Callable[[], Result]) -> None:
        self._work: Callable[[], Result] | None = work
        self._outcome: SimpleQueue[_Outcome] = SimpleQueue()
        # A new thread starts on GPU 0 and records gradients; this one goes on where its caller was.
        self._gpu = torch.cuda.current_device() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
        self._records_gradients = torch.is_grad_enabled()

    def run(self) -> None:
        work, self._work = self._work, None
        assert work is not None
        try:
            if self._gpu is not None:
                torch.cuda.set_device(self._gpu)
            with torch.set_grad_enabled(self._records_gradients):
                self._outcome.put(_Outcome(work(), None))
        except BaseException as error:  # sys.exit ends no thread but its own, in silence: the caller decides
            self._outcome.put(_Outcome(None, error))

    def result(self, timeout_s: float | None = None) -> Result:
        """Waits; an interrupt ends the waiting. Raises: what the work raised, and TimeoutError."""
        try:
            outcome = self._outcome.get(timeout=timeout_s)
        except Empty:
            raise TimeoutError from None
        if outcome.error is not None:
            raise outcome.error
        return outcome.value


class Worker:
    """A thread that does one thing after the other. It starts with the first, and ends with the object."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._asked: SimpleQueue[Pending[Any] | None] | None = None

    def start(self, work: Callable[[], Result]) -> Pending[Result]:
        if self._asked is None:
            self._asked = SimpleQueue()
            threading.Thread(target=_serve, args=(self._asked,), name=self._name, daemon=True).start()
            weakref.finalize(self, self._asked.put, None)
        pending = Pending(work)
        self._asked.put(pending)
        return pending

    def run(self, work: Callable[[], Result], timeout_s: float | None) -> Result:
        """work() in the thread. Raises: what it raised; TimeoutError, and the next call has a thread of its own."""
        pending = self.start(work)
        try:
            return pending.result(timeout_s)
        except TimeoutError:
            self.abandon()
            raise

    def abandon(self) -> None:
        """Let the thread end after what it does now, whenever that is."""
        if self._asked is not None:
            self._asked.put(None)
            self._asked = None


def _serve(asked: SimpleQueue[Pending[Any] | None]) -> None:
    while (pending := asked.get()) is not None:
        pending.run()
        del pending  # with its images, before the next one comes


class BackgroundScores:
    """Runs a scoring call while its caller goes on, or right away where there is nothing to gain."""

    def __init__(self, in_background: bool) -> None:
        self._worker = Worker("rewards") if in_background else None

    def start(self, score: Callable[[], Scores]) -> Callable[[], Scores]:
        """Returns: a function that waits for the scores; what `score` raised is raised there."""
        return score if self._worker is None else self._worker.start(score).result

    def close(self) -> None:
        """Does not wait: a call that is still running has lost whoever wanted its scores."""
        if self._worker is not None:
            self._worker.abandon()
