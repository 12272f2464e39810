"""A thread in each rank that notices what the main thread cannot: it may be in a call that does not return.

It takes signals at once, looks whether the launcher and the other ranks still live, and ends the process when the grace of a stop
or the patience with a collective is over.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import select
import signal
import threading
import time
from collections.abc import Iterator

from prdp_fast.core import parents, ranks, stops

BEAT_S = 0.5
LOST_RANK, HUNG = 1, 3  # exit statuses
AFTER_FAULT_S = 10.0  # from the fault of another rank, in which most ranks end by themselves
ANSWERS_S = 2.0  # for the other ranks to write their stacks, before the job ends


class Watchdog:
    """`patience_s` is how long this rank waits in one call for the others; None: for ever."""

    def __init__(self) -> None:
        self.launchers = parents.launchers()
        self.patience_s: float | None = None
        self.stop_at: tuple[float, str] | None = None  # a time, and what set it
        self.fault_at: float | None = None  # when another rank's fault was seen
        self.has_dumped = False
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        os.set_blocking(self._reader, False)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        # The interpreter writes a signal's number there at once, even while the main thread waits inside a library.
        self._before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._thread.start()

    def close(self) -> None:
        self._ended.set()
        signal.set_wakeup_fd(self._before)
        with contextlib.suppress(OSError):
            os.write(self._writer, b"\0")
        if threading.current_thread() is not self._thread:
            self._thread.join()
        os.close(self._reader)
        os.close(self._writer)

    def _run(self) -> None:
        while not self._ended.is_set():
            with contextlib.suppress(OSError):
                if select.select([self._reader], [], [], BEAT_S)[0]:
                    for number in os.read(self._reader, 64):
                        if number in stops.handled():
                            stops.signalled(number)
            if not self._ended.is_set():
                self.look()

    def look(self) -> None:
        """Everything that is looked at, once."""
        if (reason := parents.gone(self.launchers)) is not None:
            stops.request(reason)
        if self.stop_at is not None and time.time() >= self.stop_at[0]:
            stops.request(self.stop_at[1])
        if (asked := ranks.told(ranks.STOP)) is not None:
            stops.request(asked["reason"], asked["status"])
        if (request := stops.requested()) is not None:
            ranks.tell(ranks.STOP, reason=request.reason, status=request.status)
            stops.request(request.reason)  # interrupts again, if that was swallowed
            if stops.overdue():
                stops.end_now()
        if (lost := ranks.vanished()) is not None:
            end_without(lost)
        if ranks.told(ranks.FAULT) is not None and self.fault_at is None:
            self.fault_at = time.monotonic()
        if self.fault_at is not None and time.monotonic() - self.fault_at > AFTER_FAULT_S:
            os._exit(LOST_RANK)  # another rank has told the user; this one waits for it in a collective
        if ranks.told(ranks.HANG) is not None:
            self.answer()
        elif (
            self.patience_s is not None
            and ranks.here().waiting
            and time.monotonic() - ranks.here().waiting_since > self.patience_s
        ):
            self.has_dumped = True
            here = ranks.here()
            end_hang(
                f"has waited {self.patience_s:.0f} s in {here.waiting} ({ranks.place()}), the time of "
                "schedule.collective_timeout_minutes, and did not see"
            )

    def answer(self) -> None:
        """Another rank has lost its patience: write this one's stacks, and end a little later than it."""
        if not self.has_dumped:
            self.has_dumped = True
            dump_stacks()
            threading.Timer(2 * ANSWERS_S + BEAT_S, os._exit, [HUNG]).start()


def end_hang(what: str) -> None:
    """Ends the process, and through the other ranks' watchdogs the job.

    Args: what: of the line for the user, between this rank's name and those of the ranks that it waits for.
    """
    here = ranks.here()
    ranks.tell(ranks.HANG)
    dump_stacks()
    time.sleep(ANSWERS_S)
    if ranks.first_word():
        named = "; ".join(describe(one) for one in ranks.others() if not one["waiting"])
        stops.say(
            f"error: rank {here.rank} {what}: {named or 'every rank waits, and they disagree on what comes next'}; Python stacks "
            f"of every rank are in {here.directory}; the same command goes on from {ranks.last_saved()}"
        )
    ranks.leave("hang")
    os._exit(HUNG)


def describe(one: dict) -> str:
    """A rank, and what it does."""
    halted = ", halted by a signal" if ranks.is_stopped(one["pid"]) else ""
    return f"rank {one['rank']} (process {one['pid']} on {one['host']}{halted}), in {ranks.place(one)} since {one['since']}"


def dump_stacks() -> None:
    """This rank's Python stacks, of all threads, into the run directory; and its file says whether it waits."""
    here = ranks.here()
    if here.directory is None:
        return
    with contextlib.suppress(OSError), (here.directory / f"stacks-{here.rank:05d}.txt").open("w") as file:
        faulthandler.dump_traceback(file, all_threads=True)
    ranks.write()


def end_without(lost: dict) -> None:
    """Ends the process: a rank was killed, and nothing can be computed without it."""
    if ranks.first_word():
        stops.say(lost_line(lost))
    ranks.leave(f"rank {lost['rank']} was killed")
    os._exit(LOST_RANK)


def lost_line(lost: dict) -> str:
    return (
        f"error: rank {lost['rank']} of {ranks.here().size} (process {lost['pid']} on {lost['host']}) ended without a word in "
        f"{ranks.place(lost)}: killed (SIGKILL; by the kernel if memory ran out, see dmesg), a fault in a library, or os._exit; "
        f"the same command goes on from {ranks.last_saved()}"
    )


@contextlib.contextmanager
def watching(grace_s: float) -> Iterator[Watchdog]:
    """A watchdog while the block runs, and signals taken as requests to stop."""
    parents.die_with_parent()
    watchdog = Watchdog()
    stops.install(grace_s)
    watchdog.start()
    try:
        yield watchdog
    finally:
        watchdog.close()
        stops.release()
