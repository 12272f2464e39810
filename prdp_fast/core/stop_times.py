"""When a run has to stop by itself: the recipe says so, or the queue's time limit is near."""

from __future__ import annotations

import time
from collections.abc import Mapping

DAY_S = 86400.0


def first(stop_after: float | str | None, grace_s: float, environment: Mapping[str, str], now: float) -> tuple[float, str] | None:
    """The earliest time at which a start has to stop, in seconds since 1970, and what set it. None: it need not.

    Args:
        stop_after: of the recipe, minutes from now or a time of day.
        grace_s: that the stop may take: it begins so long before a queue's end.
        environment: SLURM_JOB_END_TIME, seconds since 1970, is what SLURM tells of a job's limit.
        now: seconds since 1970.
    """
    found = []
    if isinstance(stop_after, str):
        found.append((next_time_of_day(stop_after, now), f"schedule.stop_after ({stop_after})"))
    elif stop_after is not None:
        found.append((now + 60 * stop_after, f"schedule.stop_after ({stop_after:g} minutes)"))
    end = environment.get("SLURM_JOB_END_TIME", "")
    if end.isdecimal() and int(end) > now:  # one that is over already is no limit: SLURM would have ended the job
        found.append((int(end) - grace_s, "the time limit of the SLURM job"))
    return min(found, default=None)


def next_time_of_day(text: str, now: float) -> float:
    """Args: text: "06:30", of the local clock."""
    hour, minute = map(int, text.split(":"))
    today = time.localtime(now)
    at = time.mktime((today.tm_year, today.tm_mon, today.tm_mday, hour, minute, 0, 0, 0, -1))
    if at <= now:
        tomorrow = time.localtime(now + DAY_S)
        at = time.mktime((tomorrow.tm_year, tomorrow.tm_mon, tomorrow.tm_mday, hour, minute, 0, 0, 0, -1))
    return at
