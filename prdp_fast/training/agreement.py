"""Points of a run where every rank goes on, or none does."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from prdp_fast.core import distributed, stops
from prdp_fast.core.errors import AgreedError, RewardError, UserError, brief
from prdp_fast.core.stops import Interrupted, Request, Stopped


@contextlib.contextmanager
def agree() -> Iterator[None]:
    """Around work of this rank alone, whose result may be thrown away. Every rank enters and leaves.

    What a user can mend and one rank alone finds, such as a reward that fails, a damaged shard or too little memory, stops every
    rank with the same line, and leaves none in a collective. A stop that one rank was asked for interrupts the work, and ends it
    on every rank.

    Raises: RewardError, AgreedError, Stopped; each on every rank.
    """
    fault: UserError | None = None
    try:
        with stops.interruptible():
            yield
    except UserError as error:
        fault = error
    except torch.OutOfMemoryError as error:
        fault = UserError(
            f"out of memory ({brief(error)}); lower sampler.rollout_batch or schedule.micro_batch, take a higher ZeRO stage, or "
            "use a GPU with more memory"
        )
    except Interrupted:
        pass
    told = None if fault is None else (isinstance(fault, RewardError), str(fault))
    found = distributed.gather_objects((stops.requested(), told))
    leave_if_asked([request for request, _ in found])
    failed = [(rank, one) for rank, (_, one) in enumerate(found) if one is not None]
    if failed:
        rank, (of_reward, message) = failed[0]
        kind = RewardError if of_reward else AgreedError
        raise kind(message if len(failed) == len(found) else f"{message} (on rank {rank})") from fault


def leave_if_asked(requests: list[Request | None]) -> None:
    """Args: requests: of every rank. Raises: Stopped, the same on every rank, if there is one."""
    first = next((request for request in requests if request is not None), None)
    if first is not None:
        stops.request(first.reason, first.status)
        raise Stopped(first)
