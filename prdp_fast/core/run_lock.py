"""One job a run directory: a lock that the kernel drops when the job's process ends, whatever ends it."""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from pathlib import Path
from typing import IO

from prdp_fast.core import environment
from prdp_fast.core.errors import UserError

LOCK = ".lock"  # in the run directory: host, process and start of the job that holds it
_held: dict[Path, IO[str]] = {}  # by this process, until it ends


def _let_go() -> None:
    """In a child that this process has forked, such as a worker of a reward: it would hold the lock after its parent's end."""
    for file in _held.values():
        file.close()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


def lock(directory: Path) -> None:
    """Keep other jobs out, before anything in the directory is cleaned. The kernel drops the lock when the process ends.

    Raises: UserError if another job has it.
    """
    place = directory.resolve()
    if place in _held:
        return
    try:
        import fcntl

        file = (directory / LOCK).open("a+", encoding="utf-8")
    except ImportError:  # not a Unix
        return
    except OSError as error:
        raise UserError(f"--output {directory} cannot be written ({error.strerror}); choose a directory that can") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            file.seek(0)
            who = holder(file.read())
            file.close()
            raise UserError(
                f"--output {directory} is in use by a job {who}; wait for its end, or choose another directory"
            ) from None
        file.close()
        environment.say(f"{directory}: its file system has no locks ({error.strerror}); see that no second job is started in it")
        return
    file.truncate(0)
    file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}) + "\n")
    file.flush()
    _held[place] = file


def holder(text: str) -> str:
    """Who wrote a lock file."""
    try:
        found = json.loads(text)
        return f"on {found['host']}, process {found['pid']}, since {found['since']}"
    except (ValueError, KeyError, TypeError):
        return "that has just started"
