"""Running out of a device's memory, and going on with less at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from prdp_fast.core.errors import OneRankError

T = TypeVar("T")


def release() -> None:
    """Give what torch keeps for later back to the device. Not inside an except clause, whose traceback holds tensors."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def smaller_on_oom(
    attempt: Callable[[int], T], size: int, *, phase: str, advice: str, say: Callable[[str], None]
) -> tuple[T, int]:
    """Run a phase whose batch size changes speed only; where memory runs out, again with half the batch, down to 1.

    For work of this rank alone: no other rank waits for it inside.

    Args:
        attempt: the whole phase at a batch size.
        phase, advice: of what is told: where it happened, and what to do if a batch of 1 does not fit.
        say: tells the user a line.
    Returns: what `attempt` returned, and the size it ran with.
    Raises: OneRankError if a batch of 1 is too much.
    """
    while True:
        try:
            return attempt(size), size
        except torch.OutOfMemoryError:
            pass
        release()
        if size == 1:
            raise OneRankError(f"out of memory in the {phase}, even one row at a time; {advice}")
        say(f"out of memory in the {phase} with a batch of {size}: going on with {size // 2}")
        size //= 2
