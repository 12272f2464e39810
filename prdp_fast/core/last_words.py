"""What the user reads of a rank that fails: who, where, of what. One rank speaks first, the others keep still."""

from __future__ import annotations

import os
import re
import time
import traceback

from prdp_fast.core import ranks, stops, watchdog
from prdp_fast.core.errors import OneRankError, UserError

FAILED = 1
OTHERS_S = 3.0  # in which a fault of another rank becomes known
COMMUNICATION = re.compile(r"gloo|nccl|c10d|connection (was )?(closed|reset)|broken pipe|timed out waiting|socket", re.IGNORECASE)
TIMEOUT = re.compile(r"timed? ?out", re.IGNORECASE)


def mistake(error: UserError) -> int:
    """What the user can mend. Returns: the exit status."""
    everywhere = not isinstance(error, OneRankError)  # then one line is enough
    cause = error.__cause__
    if not everywhere and cause is not None and ranks.here().size > 1 and is_of_communication(cause):
        status = because_of_another(cause)
        if status is not None:  # the user can mend nothing: another rank is gone
            return status
    if not everywhere or ranks.first_word():
        stops.say(f"error: {error}" if everywhere else f"error: {of_rank()}{error}")
    return 2


def of_rank() -> str:
    here = ranks.here()
    return f"rank {here.rank}: " if here.size > 1 else ""


def unexpected(error: BaseException) -> int:
    """Any other error. Prints who failed and where, before the traceback. Returns: the exit status."""
    here = ranks.here()
    if here.size > 1 and is_of_communication(error):
        status = because_of_another(error)
        if status is not None:
            return status
        if TIMEOUT.search(str(error)):  # of the process group: this was in a collective of DeepSpeed's
            watchdog.end_hang(f"has waited until a collective of {ranks.place()} timed out, for one of")
    if ranks.first_word():
        who = f"rank {here.rank} of {here.size} failed in " if here.size > 1 else "the run failed in "
        what = f"asked the process to end ({error})" if isinstance(error, SystemExit) else "".join(
            traceback.format_exception_only(error)
        )  # fmt: skip
        stops.say(
            f"error: {who}{ranks.place()}: {' '.join(what.split())[:300]}; the same command goes on from {ranks.last_saved()}"
        )
        traceback.print_exception(error)
    return FAILED


def is_of_communication(error: BaseException) -> bool:
    """Whether a collective failed, as it does when another rank is gone."""
    return isinstance(error, (RuntimeError, OSError)) and bool(
        COMMUNICATION.search(f"{type(error).__name__} {error}") or type(error).__name__.startswith("Dist")
    )


def because_of_another(error: BaseException) -> int | None:
    """The exit status if this error only follows from what happened to another rank. None if nothing is known of that."""
    until = time.monotonic() + OTHERS_S
    while time.monotonic() < until:
        if (lost := ranks.vanished()) is not None:
            if ranks.first_word():
                stops.say(watchdog.lost_line(lost))
            return watchdog.LOST_RANK
        if ranks.told(ranks.FAULT) is not None:
            return FAILED  # it has spoken
        if (request := stops.requested()) is not None and any(one["left"] for one in ranks.others()):
            return request.status  # its grace was over a little earlier
        time.sleep(0.1)
    return None


def leave(status: int) -> int:
    """This rank ends with a fault. With others the process ends here: they wait in a collective, and an orderly exit would wait
    for them. Returns: the status, of a job of one rank."""
    ranks.tell(ranks.FAULT, status=status)
    ranks.leave("fault")
    if ranks.here().size > 1:
        os._exit(status)
    return status
