"""Whether a run goes on: what its ranks have written of themselves, and whether their processes are there."""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prdp_fast.core.ranks import FAULT, HANG, RANKS, STOP, namespace, start_of
from prdp_fast.core.run_directory import SUMMARY
from prdp_fast.reporting.run_data import at

MOST_RANKS = 4096


@dataclass(frozen=True)
class Rank:
    """A heartbeat file."""

    number: int
    host: str
    phase: str
    epoch: int | None
    since: str  # local time of that machine
    left: str | None  # why it has ended, as it said itself
    gone: bool  # its process was of this machine, and is there no more

    @property
    def ended(self) -> bool:
        return self.left is not None or self.gone


def read_file(path: Path) -> dict[str, Any] | None:
    """None if it is not there, being replaced, or no object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def read_ranks(directory: Path) -> list[Rank]:
    """In rank order; none before the ranks have met."""
    found = []
    for path in sorted((directory / RANKS).glob("rank-*.json"))[:MOST_RANKS]:
        told = read_file(path)
        number = at(told, "rank", kind=int)
        if told is None or number is None:
            continue
        words = {key: at(told, key, kind=str) for key in ("host", "phase", "since", "left", "names")}
        gone = is_gone(words["host"], words["names"], at(told, "pid", kind=int), told.get("started"))
        host, phase, since = (words[key] or "?" for key in ("host", "phase", "since"))
        found.append(Rank(number, host, phase, at(told, "epoch", kind=int), since, words["left"], gone))
    return found


def is_gone(host: str | None, names: str | None, pid: int | None, started: Any) -> bool:
    """Whether the process is known to have ended. Of another machine, or of a container, nothing is known."""
    if pid is None or host != socket.gethostname() or names != namespace():
        return False
    return start_of(pid) != started


def how_it_ended(directory: Path, ranks: list[Rank]) -> str | None:
    """In words, as far as the ranks have told; None while the run goes on or has not begun."""
    if not ranks or not any(rank.ended for rank in ranks):
        return None
    if not all(rank.ended for rank in ranks) and any(rank.left is None and not rank.gone for rank in ranks):
        return None  # the others still say why
    for name, words in ((STOP, "stopped by {reason}"), (HANG, "a rank did not come in time"), (FAULT, "a rank failed")):
        told = read_file(directory / RANKS / name)
        if told is not None:
            return words.format(reason=at(told, "reason", kind=str) or "a signal")
    lost = [rank for rank in ranks if rank.left is None]
    if lost:
        return f"rank {lost[0].number} ended without a word in phase {lost[0].phase}"
    return next((rank.left for rank in ranks if rank.left not in (None, "finished")), "finished")


def has_ended(directory: Path) -> bool:
    """Whether nothing more comes: the run is finished, or all its processes are gone. False before it begins."""
    ranks = read_ranks(directory)
    if not ranks:
        return (directory / SUMMARY).is_file()
    return how_it_ended(directory, ranks) is not None
