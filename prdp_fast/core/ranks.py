"""What the ranks of a run tell each other through its directory, whatever the network does.

Each rank keeps a small file: who it is, and the phase that it is in. A rank that disappears without having said that it leaves
was killed. Nothing here raises: a directory that cannot be written any more must not end a run.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RANKS = "ranks"  # in the run directory
STOP, FAULT, HANG, FIRST = "stop.json", "fault.json", "hang.json", "first.json"  # in it: what one rank tells all


def own_rank() -> int:
    """As the launcher set it. What is no number is refused elsewhere, see `environment.check_launch`."""
    given = os.environ.get("RANK", "0")
    return int(given) if given.isdecimal() else 0


@dataclass
class Here:
    """This rank. Before `join` it has no directory, and says nothing."""

    rank: int = field(default_factory=own_rank)
    size: int = 1
    directory: Path | None = None
    job: str = ""  # of this start: what earlier ones have left counts for nothing
    phase: str = "start"
    since: float = field(default_factory=time.time)
    epoch: int | None = None
    left: str | None = None  # why this rank has ended, or is about to
    waiting: str | None = None  # for the other ranks, in which call
    waiting_since: float = 0.0
    known: dict[int, dict[str, Any]] = field(default_factory=dict)  # the other ranks, as they joined


_here = Here()


def join(directory: Path, job: str, rank: int, size: int) -> None:
    """Become known to the other ranks. Rank 0 has cleaned up already, see `clean`."""
    global _here
    _here = Here(rank, size, directory / RANKS, job)
    write()


def forget() -> None:
    global _here
    _here = Here()


def clean(directory: Path) -> None:
    """Remove what an earlier start has left. Rank 0 calls this, before the others join."""
    folder = directory / RANKS
    with contextlib.suppress(OSError):
        folder.mkdir(exist_ok=True)
        for path in folder.glob("*.json"):
            path.unlink()


def here() -> Here:
    return _here


def enter(phase: str, epoch: int | None = None) -> None:
    """The heartbeat: this rank begins a phase."""
    _here.phase, _here.since = phase, time.time()
    if epoch is not None:
        _here.epoch = epoch
    write()


def leave(reason: str) -> None:
    """This rank ends, and says so: it was not killed."""
    _here.left = reason
    write()


@contextlib.contextmanager
def waiting(call: str) -> Any:
    """Around a call in which this rank waits for the others."""
    _here.waiting, _here.waiting_since = call, time.monotonic()
    try:
        yield
    finally:
        _here.waiting = None


def write() -> None:
    if _here.directory is None:
        return
    values = {
        "job": _here.job, "rank": _here.rank, "host": socket.gethostname(), "pid": os.getpid(), "started": start_of(os.getpid()),
        "names": namespace(), "phase": _here.phase, "epoch": _here.epoch, "since": time.strftime(
            "%Y-%m-%d %H:%M:%S", time.localtime(_here.since)
        ), "waiting": _here.waiting, "left": _here.left,
    }  # fmt: skip
    _put(_here.directory / name_of(_here.rank), values)


def name_of(rank: int) -> str:
    return f"rank-{rank:05d}.json"


def _put(path: Path, values: dict[str, Any]) -> None:
    partial = path.with_name(f".{path.name}.{_here.rank}.partial")
    with contextlib.suppress(OSError):
        partial.write_text(json.dumps(values) + "\n", encoding="utf-8")
        os.replace(partial, path)


def _get(path: Path) -> dict[str, Any] | None:
    """None if it is not there, or of another start."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.get("job") == _here.job else None


# What one tells all.
def tell(name: str, **values: Any) -> None:
    if _here.directory is not None and told(name) is None:
        _put(_here.directory / name, {"job": _here.job, "by": _here.rank} | values)


def told(name: str) -> dict[str, Any] | None:
    return None if _here.directory is None else _get(_here.directory / name)


def first_word() -> bool:
    """Whether this rank is the one that tells the user how the run ended. One rank is, once."""
    if _here.directory is None:
        return _here.rank == 0
    try:
        handle = os.open(_here.directory / f"{_here.job}.{FIRST}", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    except OSError:
        return _here.rank == 0
    with os.fdopen(handle, "w") as file:
        file.write(json.dumps({"job": _here.job, "by": _here.rank}) + "\n")
    return True


def is_said() -> bool:
    """Whether a rank has had the first word."""
    return _here.directory is not None and (_here.directory / f"{_here.job}.{FIRST}").exists()


# What is known of the others.
def others() -> list[dict[str, Any]]:
    """The files of the other ranks as they are now, in rank order."""
    if _here.directory is None:
        return []
    found = (_get(_here.directory / name_of(rank)) for rank in range(_here.size) if rank != _here.rank)
    return [one for one in found if one is not None]


def sees(rank: int, within_s: float) -> bool:
    """Whether this rank sees what another one of this start has written. A network's file system takes its time."""
    deadline = time.monotonic() + within_s
    while _here.directory is not None and _get(_here.directory / name_of(rank)) is None:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def vanished() -> dict[str, Any] | None:
    """The file of a rank of this machine whose process is gone without a word, None if there is none.

    One that has been halted (SIGSTOP) is still there. Files are read once: many ranks share the disk.
    """
    if _here.directory is None:
        return None
    if len(_here.known) < _here.size - 1:
        _here.known |= {one["rank"]: one for one in others()}
    for one in _here.known.values():
        same_machine = one["host"] == socket.gethostname() and one["names"] == namespace()
        if same_machine and start_of(one["pid"]) != one["started"]:
            last = _get(_here.directory / name_of(one["rank"]))
            if last is not None and last["left"] is None:
                return last
    return None


def start_of(pid: int) -> int | None:
    """When a process began, in the kernel's ticks; None if there is none, or it is dead and not yet buried."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def is_stopped(pid: int) -> bool:
    """Whether a process has been halted by a signal."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
    except OSError:
        return False


def namespace() -> str:
    """Process numbers mean the same to those that share it."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


# For the user.
def place(one: dict[str, Any] | None = None) -> str:
    """Where a rank is: "phase update of epoch 12". None: this one."""
    phase, epoch = (_here.phase, _here.epoch) if one is None else (one["phase"], one["epoch"])
    return f"phase {phase}" + (f" of epoch {epoch}" if epoch is not None else "")


def last_saved() -> str:
    """What the next start of the run goes on from."""
    if _here.directory is None:
        return "the beginning"
    found = sorted((_here.directory.parent / "checkpoints").glob("epoch-*"))
    return f"its last checkpoint, {found[-1].name}" if found else "the beginning: no checkpoint was written yet"
