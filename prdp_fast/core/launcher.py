"""A launcher as a child of this process, which stands between it and the user.

Launchers end their ranks when they are told to end. What reaches this process goes to the ranks themselves, which save; the
launcher then finds that they have ended well, and so does whoever started this.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

from prdp_fast.core.parents import PR_SET_PDEATHSIG, field_of
from prdp_fast.core.stops import STATUS

BEAT_S = 0.2


def run(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Returns: the exit status; of a job that was asked to stop and did, that of the signal."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    for name in STATUS:
        number = signal.Signals[name]
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, note)
    # A session of its own: Ctrl-C at a terminal reaches the ranks through this process, and the launcher not at all.
    launcher = subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=end_with_parent)
    told: set[int] = set()
    while launcher.poll() is None:
        if received:
            told |= tell(set(ranks_below(launcher.pid)) - told, received[0])
        time.sleep(BEAT_S)
    status = launcher.returncode
    if received and status in (0, STATUS[signal.Signals(received[0]).name]):
        return STATUS[signal.Signals(received[0]).name]
    return status if status >= 0 else 128 - status


def end_with_parent() -> None:
    """In the child: SIGTERM if this process is killed. The ranks notice in turn that the launcher is gone."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def tell(ranks: set[int], number: int) -> set[int]:
    """Send a signal. Returns: those that it reached, or that are gone."""
    for pid in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    return ranks


def ranks_below(pid: int) -> list[int]:
    """The ranks that a launcher has started: processes below it that have the variables of one."""
    parents = {int(entry.name): int(field_of(int(entry.name), 1) or 0) for entry in Path("/proc").glob("[0-9]*")}
    below = {pid}
    while more := {child for child, parent in parents.items() if parent in below} - below:
        below |= more
    found = [child for child in below - {pid} if b"RANK" in variables_of(child)]
    return [child for child in found if parents[child] not in found]  # not what a rank has started itself


def variables_of(pid: int) -> set[bytes]:
    """Names of the variables in a process's environment as it was started."""
    try:
        return {entry.partition(b"=")[0] for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")}
    except OSError:
        return set()
