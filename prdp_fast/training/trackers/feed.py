"""What brings a run's numbers to one tracker: in a thread of its own, so that no network and no disk ever holds up training."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prdp_fast.core.errors import brief
from prdp_fast.core.files import partial_path
from prdp_fast.core.run_directory import METRICS
from prdp_fast.core.secret_words import without_secrets
from prdp_fast.training.trackers.base import Tracker, TrackerError

MOST_WAITING = 1000  # calls; what comes beyond is left out
MOST_TRIES = 3  # of one call
KINDS = ("epochs", "scalars", "images")


@dataclass
class Sent:
    """The last step of each kind that a tracker has got, over all starts of the run; in a small file of the run directory.

    A killed run goes on from a checkpoint, which is older than what it has sent: the epochs between are not sent again.
    """

    path: Path
    run_id: str
    steps: dict[str, int] = field(default_factory=dict)  # of this and earlier starts, by kind
    before: dict[str, int] = field(default_factory=dict)  # of earlier starts

    @classmethod
    def read(cls, path: Path, run_id: str | None, new_id: Callable[[], str]) -> Sent:
        """Args: run_id: as the checkpoint has it, None without one; then it is that of the file, or a new one."""
        known, steps = None, {}
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            value = json.loads(path.read_text(encoding="utf-8"))
            known, steps = str(value["run"]), {str(kind): int(step) for kind, step in value["sent"].items()}
        chosen = run_id or known or new_id()
        steps = steps if chosen == known else {}
        return cls(path, chosen, steps, dict(steps))

    def settle(self, arrived: int | None) -> None:
        """Args: arrived: as `Tracker.arrived` says."""
        if arrived is not None:
            self.before = dict.fromkeys(KINDS, arrived)

    def has(self, kind: str, step: int) -> bool:
        return step <= self.before.get(kind, -1)

    def add(self, kind: str, step: int) -> None:
        self.steps[kind] = max(step, self.steps.get(kind, -1))
        self.write()

    def write(self) -> None:
        """Without a sync: what a crash of the machine takes back is sent once more."""
        with contextlib.suppress(OSError):  # a full disk; there are louder lines about it
            self.path.parent.mkdir(exist_ok=True)
            partial = partial_path(self.path)
            partial.write_text(json.dumps({"run": self.run_id, "sent": self.steps}) + "\n", encoding="utf-8")
            os.replace(partial, self.path)


@dataclass
class Call:
    kind: str  # of KINDS
    step: int
    make: Callable[[Tracker], Any]
    tries: int = 0


class Feed:
    """Calls that wait for one tracker, and the thread that makes them, in order.

    A call that fails is made again with the next one. Every kind of error is told once.
    """

    def __init__(self, tracker: Tracker, say: Callable[[str], None], sent: Sent | None = None) -> None:
        """Args: sent: of a tracker that remembers."""
        self.tracker, self.say, self.sent = tracker, say, sent
        self._calls: deque[Call] = deque()
        self._change = threading.Condition()
        self._awake = self._working = self._closing = self._finished = self._begun = False
        self._told: set[str] = set()
        self._lost = 0
        self._thread: threading.Thread | None = None

    def put(self, kind: str, step: int, make: Callable[[Tracker], Any]) -> None:
        with self._change:
            if len(self._calls) >= MOST_WAITING:
                self._lost += 1
                return
            self._calls.append(Call(kind, step, make))
            self._awake = True
            self._change.notify()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=f"tracker {self.tracker.name}", daemon=True)
            self._thread.start()

    @property
    def idle(self) -> bool:
        """Whether every call that waits has been tried."""
        with self._change:
            return not (self._awake or self._working)

    def finish(self, finished: bool) -> None:
        """Ask for the end; `join` waits for it."""
        with self._change:
            self._closing, self._finished = True, finished
            self._change.notify()

    def join(self, timeout: float) -> None:
        """Tells of what has not been sent in time. Args: timeout: seconds."""
        if self._thread is None:
            return
        self._thread.join(timeout)
        missing = self._lost + len(self._calls)
        if missing or self._thread.is_alive():
            late = f"has not come to its end in {timeout:.0f} s" if self._thread.is_alive() else "has come to its end"
            self.say(f"WARNING: tracking.{self.tracker.name} {late}, without {missing} of its rows; {METRICS} has all of them")
        self._thread = None

    # In the thread.

    def _run(self) -> None:
        while True:
            with self._change:
                self._working = False
                self._change.wait_for(lambda: self._awake or self._closing)
                self._working, self._awake, closing = True, False, self._closing
            self._make_calls()
            if closing:
                if self._begun:
                    self._guarded(lambda: self.tracker.close(self._finished))
                return

    def _make_calls(self) -> None:
        while self._calls:
            if not self._begun:
                if not self._guarded(self.tracker.begin):
                    return  # until the next call wakes us
                self._begun = True
                if self.sent is not None:
                    self.sent.settle(self.tracker.arrived())
            call = self._calls[0]
            if self.sent is not None and self.sent.has(call.kind, call.step):
                pass  # by an earlier start
            elif self._guarded(lambda call=call: call.make(self.tracker)):  # type: ignore[misc]
                if self.sent is not None:
                    self.sent.add(call.kind, call.step)
            else:
                call.tries += 1
                if call.tries < MOST_TRIES:
                    return
                self._lost += 1
            with self._change:
                self._calls.popleft()

    def _guarded(self, make: Callable[[], Any]) -> bool:
        try:
            make()
        except Exception as error:  # whatever a library, a server or a disk comes up with: no number is worth the run
            self._tell(error)
            return False
        return True

    def _tell(self, error: Exception) -> None:
        kind = type(error.__cause__ if isinstance(error, TrackerError) and error.__cause__ else error).__name__
        if kind not in self._told:
            self._told.add(kind)
            said = str(error) if isinstance(error, TrackerError) else f"failed ({kind}: {brief(error)})"
            line = f"WARNING: tracking.{self.tracker.name}: {said}; training goes on, and {METRICS} has the same numbers"
            self.say(without_secrets(" ".join(line.split())))
