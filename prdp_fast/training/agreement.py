"""Points of a run where every rank goes on, or none does."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from prdp_fast.core import distributed, stops
from prdp_fast.core.errors import NotFiniteError, RewardError
from prdp_fast.core.stops import Interrupted, Request, Stopped


@contextlib.contextmanager
def agree() -> Iterator[None]:
    """Around work of this rank alone, whose result may be thrown away. Every rank enters and leaves.

    A reward or a model that fails on one rank stops every rank, with the same line, and leaves none in a collective. A stop that
    one rank was asked for interrupts the work, and ends it on every rank.

    Raises: RewardError, NotFiniteError, Stopped; each on every rank.
    """
    fault: RewardError | NotFiniteError | Interrupted | None = None
    try:
        with stops.interruptible():
            yield
    except (RewardError, NotFiniteError, Interrupted) as error:
        fault = error
    told = (type(fault), str(fault)) if isinstance(fault, (RewardError, NotFiniteError)) else None
    found = distributed.gather_objects((stops.requested(), told))
    leave_if_asked([request for request, _ in found])
    failed = [(rank, one) for rank, (_, one) in enumerate(found) if one is not None]
    if failed:
        rank, (kind, message) = failed[0]
        raise kind(message if len(failed) == len(found) else f"{message} (on rank {rank})") from fault


def leave_if_asked(requests: list[Request | None]) -> None:
    """Args: requests: of every rank. Raises: Stopped, the same on every rank, if there is one."""
    first = next((request for request in requests if request is not None), None)
    if first is not None:
        stops.request(first.reason, first.status)
        raise Stopped(first)
