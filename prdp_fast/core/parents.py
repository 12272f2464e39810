"""The processes that started a rank. When one of them is gone, nobody waits for the rank any more, and it ends."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from pathlib import Path

PR_SET_PDEATHSIG = 1


def launchers() -> dict[int, str]:
    """The processes whose end is this rank's end, by their numbers: who started it, and DeepSpeed's `deepspeed` command above.

    Empty for a process that no launcher started: whoever starts a job by hand may log out.
    """
    if "RANK" not in os.environ:
        return {}
    parent = os.getppid()
    if parent <= 1:  # in a container the launcher may be the first process, and a parent that is gone looks the same
        return {}
    found = {parent: name_of(parent)}
    above = parent_of(parent)
    # A launcher of several machines is started by a shell or sshd, which is of no concern.
    if "deepspeed" in command_of(parent) and above > 1 and "deepspeed" in command_of(above):
        found[above] = name_of(above)
    return found


def die_with_parent() -> None:
    """Have the kernel send SIGTERM when the parent ends. On Linux; elsewhere the watch alone notices."""
    if "RANK" not in os.environ or not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def gone(known: dict[int, str]) -> str | None:
    """The name of the first launcher that has ended, None while all live."""
    parent = next(iter(known), None)
    for pid, name in known.items():
        if (os.getppid() != pid) if pid == parent else not is_alive(pid, name):
            return f"the end of its launcher ({name or 'process'} {pid})"
    return None


def is_alive(pid: int, name: str) -> bool:
    """Whether the process is still that one: a number is given again."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    state = field_of(pid, 0)
    return state != "Z" and name_of(pid) == name


def parent_of(pid: int) -> int:
    return int(field_of(pid, 1) or 0)


def field_of(pid: int, number: int) -> str | None:
    """Of /proc/PID/stat, counted from the state; None if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[number]
    except OSError:
        return None


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def name_of(pid: int) -> str:
    """The command's name, as ps shows it."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""
