"""Ranks of a job and what they tell each other: a few numbers or objects at a time.

Torch alone: DeepSpeed joins the group later, in the engine.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from prdp_fast.core import environment, ranks
from prdp_fast.core.errors import UserError

_OPERATIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}

LOOK_S = 0.1  # between two looks for what other ranks have left
GROUP_MARGIN_S = 60.0  # after the ranks' own patience, which says more: the group's timeout is for what has no other

# Reduces a few numbers over all ranks: `all_reduce` below, or a stand-in of a single process.
AllReduce = Callable[[list[float], str], list[float]]


def world_size() -> int:
    """Ranks of this job as the launcher set them; 1 without a launcher."""
    return environment.launched("WORLD_SIZE", 1)


def local_ranks() -> int:
    """Ranks of this job that share this machine."""
    return environment.launched("LOCAL_SIZE", 0) or environment.launched("LOCAL_WORLD_SIZE", 1) or 1


def local_rank() -> int:
    """This rank among those that share this machine."""
    return int(os.environ.get("LOCAL_RANK") or "0")


def rank() -> int:
    return environment.launched("RANK", 0)


def is_main() -> bool:
    """Whether this rank is the one that writes files and speaks to the user."""
    return rank() == 0


def init(timeout_s: float = 1800.0) -> torch.device:
    """Join the job's process group (NCCL on CUDA, gloo on CPU) and return this rank's device.

    Args: timeout_s: how long one rank may keep the others waiting.
    Raises: UserError if the ranks cannot meet, or this one has no GPU of its own.
    """
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", environment.launched("LOCAL_RANK", 0)) if cuda else torch.device("cpu")
    if cuda:
        if device.index >= torch.cuda.device_count():
            raise UserError(
                f"LOCAL_RANK is {device.index}, and this process sees {torch.cuda.device_count()} GPUs; start as many ranks a "
                "machine as it has GPUs, and let each see all of them"
            )
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        options: dict[str, Any] = {"backend": "nccl", "device_id": device} if cuda else {"backend": "gloo"}
        if "RANK" not in os.environ:
            # Run by python itself: a job of one, which needs no address and so takes no port.
            options |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        options["timeout"] = timedelta(seconds=timeout_s + GROUP_MARGIN_S)
        try:
            options |= after_restart(options["timeout"])
            dist.init_process_group(**options)
        except (ValueError, RuntimeError) as error:  # DistNetworkError, DistStoreError: RuntimeErrors
            raise no_meeting(error) from error
    return device


def after_restart(timeout: timedelta) -> dict[str, Any]:
    """Where a rank that torchrun has started again meets the others; nothing for a first start.

    Without --rdzv-backend the store is torchrun's own and outlives the ranks: it still has the addresses of those that died, and
    torch 2.13 puts no number of the attempt before its keys.

    Raises: ValueError, RuntimeError.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or attempt == "0":
        return {}
    address, port = os.environ["MASTER_ADDR"], environment.launched("MASTER_PORT", 0)
    store = dist.TCPStore(address, port, world_size(), is_master=False, timeout=timeout)
    return {"store": dist.PrefixStore(f"attempt-{attempt}", store), "rank": rank(), "world_size": world_size()}


def share_timeout(timeout_s: float) -> None:
    """Give every process group that there is this timeout: those that libraries make have torch's own."""
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.GroupMember.NON_GROUP_MEMBER:
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s + GROUP_MARGIN_S), group)


def no_meeting(error: Exception) -> UserError:
    """Why the ranks do not meet, in one line."""
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    said = str(error)
    if "EADDRINUSE" in said or "address already in use" in said.lower():
        return UserError(
            f"MASTER_PORT {port} is in use on this machine, by another job perhaps; expected a free one: give the launcher "
            "another --master_port, or set MASTER_PORT"
        )
    reason = (said.splitlines() or [type(error).__name__])[0][:300]
    return UserError(
        f"the ranks of the job do not meet at MASTER_ADDR {address!r}, MASTER_PORT {port!r} ({reason}); expected an address of "
        "rank 0's machine that all ranks reach, and a port that is free there"
    )


def shutdown() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    with ranks.waiting("barrier"):
        dist.barrier()


def all_reduce(values: list[float], op: str = "sum") -> list[float]:
    """Reduce a few numbers over all ranks in float64; op is sum, max or min."""
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    with ranks.waiting("all_reduce"):
        dist.all_reduce(tensor, op=_OPERATIONS[op])
        return tensor.tolist()  # waits for the device


def gather_objects(value: Any) -> list[Any]:
    """Every rank's picklable value, in rank order, on every rank. Outside a process group there is one rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    with ranks.waiting("all_gather_object"):
        dist.all_gather_object(values, value)
    return values


def from_main(value: Any) -> Any:
    """Rank 0's value, on every rank. Every rank calls this."""
    return gather_objects(value)[0]


# Between threads of the ranks, while their main threads train: no collective, whose order the main threads decide about.


def leave(key: str, value: Any) -> None:
    """Leave a value of JSON for rank 0, under a key that nothing else has in the life of the job."""
    _store().set(f"{key}/{rank()}", json.dumps(value))


def collect(key: str) -> list[Any]:
    """What every rank has left under a key, in rank order, once all have. Rank 0 alone calls this."""
    store, keys = _store(), [f"{key}/{number}" for number in range(dist.get_world_size())]
    while not store.check(keys):  # `wait` would keep others of this process from the store meanwhile
        time.sleep(LOOK_S)
    values = [json.loads(store.get(one)) for one in keys]
    for one in keys:
        store.delete_key(one)
    return values


def _store() -> dist.Store:
    """Where the ranks have met. It needs no file system that they share."""
    return dist.distributed_c10d._get_default_store()
