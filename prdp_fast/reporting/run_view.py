"""What `prdp watch` shows of a run, as lines of plain text: all of it, or one line for an epoch."""

from __future__ import annotations

import re
import statistics
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from prdp_fast.core.run_directory import MESSAGES, RUN, SUMMARY
from prdp_fast.core.visible import visible
from prdp_fast.reporting.liveness import Rank, how_it_ended, read_file, read_ranks
from prdp_fast.reporting.run_data import at, finite, points_of, read_rows, total

BLOCKS, ASCII_BLOCKS = "▁▂▃▄▅▆▇█", "_.-=+*#@"
INDENT = 12 * " "  # below the names of the lines
RECENT = 20  # epochs that the time left is told from
MOST_RANKS, MOST_MESSAGES, MOST_CHARACTERS = 8, 5, 160
TAIL = 64 * 1024  # bytes of the messages that are read
BEGINS = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d .")  # a message, whose other lines are without a time
# What did not go as it should, over the whole run: metric, and what one is.
LOST = (
    ("skipped_updates", "updates skipped"), ("dropped_images", "images dropped"), ("unscored", "images without a score"),
    ("nonfinite_images", "images not finite"),
)  # fmt: skip


@dataclass(frozen=True)
class Snapshot:
    """A run directory at one moment."""

    name: str
    rows: list[dict[str, Any]]
    total: int | None  # epochs
    ranks: list[Rank]
    messages: list[str]
    finished: bool
    end: str | None  # how it ended, None while it goes on or has not begun

    @property
    def epoch(self) -> int:
        """Finished epochs."""
        return self.rows[-1]["epoch"] + 1 if self.rows else 0


def look(directory: Path) -> Snapshot:
    """Raises: OSError if metrics.jsonl cannot be read."""
    record, summary = read_file(directory / RUN), read_file(directory / SUMMARY)
    ranks = read_ranks(directory)
    end = how_it_ended(directory, ranks)
    whole = at(record, "recipe", "schedule", "epochs", kind=int)
    # A summary stays from an earlier start while a run that was given more epochs goes on.
    finished = summary is not None and (end is not None or not ranks) and end in (None, "finished")
    return Snapshot(
        directory.resolve().name, read_rows(directory), whole, ranks, last_messages(directory / MESSAGES), finished,
        "finished" if finished else end,
    )  # fmt: skip


def last_messages(path: Path) -> list[str]:
    """The first lines of the last few; none if there is no such file."""
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - TAIL))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return []
    kept = [line for line in lines if BEGINS.match(line)][-MOST_MESSAGES:]
    return [visible(line, most=MOST_CHARACTERS) for line in kept]


# Numbers


def epoch_seconds(rows: Sequence[dict[str, Any]]) -> list[float]:
    """Of every epoch, evaluations and checkpoints included."""
    return [sum(phases_of([row]).values()) for row in rows]


def phases_of(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Seconds by phase over some epochs."""
    found: dict[str, float] = {}
    for row in rows:
        for name, value in row.items():
            if name.startswith("seconds/") and (number := finite(value)) is not None:
                found[name.removeprefix("seconds/")] = found.get(name.removeprefix("seconds/"), 0.0) + number
    return found


def time_left(snapshot: Snapshot) -> float | None:
    """Seconds, from the mean of the last epochs."""
    if snapshot.total is None or not snapshot.rows:
        return None
    return statistics.fmean(epoch_seconds(snapshot.rows[-RECENT:])) * max(snapshot.total - snapshot.epoch, 0)


def clock(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    minutes, rest = divmod(max(round(seconds), 0), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


def number(value: float | None, form: str = ".4f") -> str:
    return "-" if value is None else f"{value:{form}}"


def sparkline(values: Sequence[float], width: int, blocks: str = BLOCKS) -> str:
    """Values as a row of blocks between the lowest and the highest; where there are more than fit, means of stretches."""
    if not values:
        return ""
    count = min(width, len(values))
    bounds = [round(i * len(values) / count) for i in range(count + 1)]
    shown = [statistics.fmean(values[start:stop]) for start, stop in pairwise(bounds)]
    low, high = min(shown), max(shown)
    steps = len(blocks) - 1
    return "".join(blocks[round((value - low) / (high - low) * steps) if high > low else steps // 2] for value in shown)


# Lines


def epoch_line(row: dict[str, Any], snapshot: Snapshot) -> str:
    """An epoch in one line, for a log."""
    whole = f"/{snapshot.total}" if snapshot.total is not None else ""
    value = {name: finite(row.get(name)) for name in ("reward", "images_per_s", "clip_fraction", "drift", "kl_to_reference")}
    parts = [f"epoch {row['epoch'] + 1}{whole}", f"reward {number(value['reward'])}"]
    parts += [f"{number(value['images_per_s'], '.1f')} images/s", f"clipped {number(value['clip_fraction'], '.1%')}"]
    parts += [f"drift {number(value['drift'], '.1e')}", f"KL {number(value['kl_to_reference'], '.1e')}"]
    parts += [f"{finite(row[name]):.0f} {what}" for name, what in LOST if finite(row.get(name))]
    if row is snapshot.rows[-1] and snapshot.end is None:
        parts.append(f"{clock(time_left(snapshot))} left")
    return "  ".join(parts)


def view(snapshot: Snapshot, width: int, blocks: str = BLOCKS) -> list[str]:
    """All of it, in lines of at most `width` characters, 40 or more."""
    whole = f" of {snapshot.total}" if snapshot.total is not None else ""
    left = "" if snapshot.end else f", {clock(time_left(snapshot))} left"
    lines = [f"{visible(snapshot.name, most=60)}: epoch {snapshot.epoch}{whole}{left}"]
    if snapshot.end:
        lines.append(ending(snapshot))
    if snapshot.rows:
        lines += numbers(snapshot, width, blocks)
    lines += rank_lines(snapshot.ranks)
    if snapshot.messages:
        lines += ["last messages", *(f"  {line}" for line in snapshot.messages)]
    return [part for line in lines for part in textwrap.wrap(line, width, subsequent_indent=INDENT, drop_whitespace=False)]


def ending(snapshot: Snapshot) -> str:
    if snapshot.finished:
        early = snapshot.total is not None and snapshot.epoch < snapshot.total
        return "the run has come to its time limit, and is evaluated and exported" if early else "the run is finished"
    return f"the run has ended before its last epoch: {visible(snapshot.end, most=80)}; the same command goes on"


def numbers(snapshot: Snapshot, width: int, blocks: str) -> list[str]:
    rows = snapshot.rows
    rewards = [value for _, value in points_of(rows, "reward")]
    last = {name: finite(rows[-1].get(name)) for name in ("reward", "reward_std", "images_per_s", "clip_fraction", "drift")}
    last |= {name: finite(rows[-1].get(name)) for name in ("kl_to_reference", "first_ratio_error", "grad_norm")}
    spread = f" (images differ by {last['reward_std']:.3f})" if last["reward_std"] is not None else ""
    lines = [f"reward      {number(last['reward'])}{spread}"]
    if rewards:
        room = max(8, min(60, width - 34))
        lines.append(f"{INDENT}{sparkline(rewards, room, blocks)}  {min(rewards):.3f} to {max(rewards):.3f}")
    lines += [
        f"speed       {number(last['images_per_s'], '.1f')} images/s",
        f"clipped     {number(last['clip_fraction'], '.1%')}   first ratio off by {number(last['first_ratio_error'], '.1e')}",
        f"drift       {number(last['drift'], '.1e')} nats   KL {number(last['kl_to_reference'], '.1e')} nats"
        f"   gradient {number(last['grad_norm'], '.2g')}",
    ]
    lost = [f"{total(rows, name):.0f} {what}" for name, what in LOST if total(rows, name)]
    lines.append(f"lost        {', '.join(lost) or 'nothing'}")
    phases = phases_of(rows[-RECENT:])
    if whole := sum(phases.values()):
        shares = (f"{visible(name, most=20)} {value / whole:.0%}" for name, value in sorted(phases.items(), key=lambda p: -p[1]))
        lines.append(f"time        {', '.join(shares)}")
    return lines


def rank_lines(ranks: Sequence[Rank]) -> list[str]:
    """Who is where: each of a few ranks, or how many are in which phase."""
    if len(ranks) > MOST_RANKS:
        counts: dict[str, int] = {}
        for rank in ranks:
            counts[place_of(rank)] = counts.get(place_of(rank), 0) + 1
        return ["ranks", *(f"  {count} in {place}" for place, count in sorted(counts.items(), key=lambda pair: -pair[1]))]
    return [
        f"rank {rank.number}      {place_of(rank)} since {visible(rank.since, most=30)} on {visible(rank.host, most=40)}"
        for rank in ranks
    ]  # fmt: skip


def place_of(rank: Rank) -> str:
    if rank.left is not None:
        return f"left ({visible(rank.left, most=60)})"
    of = f" of epoch {rank.epoch + 1}" if rank.epoch is not None else ""
    return f"{visible(rank.phase, most=30)}{of}" + (", ended without a word" if rank.gone else "")
