"""Ranks of a job and what they tell each other: a few numbers or objects at a time.

Torch alone: DeepSpeed joins the group later, in the engine.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

_OPERATIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}

# Reduces a few numbers over all ranks: `all_reduce` below, or a stand-in of a single process.
AllReduce = Callable[[list[float], str], list[float]]


def world_size() -> int:
    """Ranks of this job as the launcher set them; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_ranks() -> int:
    """Ranks of this job that share this machine."""
    return int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or "1")


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def is_main() -> bool:
    """Whether this rank is the one that writes files and speaks to the user."""
    return rank() == 0


def init() -> torch.device:
    """Join the job's process group (NCCL on CUDA, gloo on CPU) and return this rank's device."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        options: dict[str, Any] = {"backend": "nccl", "device_id": device} if cuda else {"backend": "gloo"}
        if "RANK" not in os.environ:
            # Run by python itself: a job of one, which needs no address and so takes no port.
            options |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        dist.init_process_group(**options)
    return device


def shutdown() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    dist.barrier()


def all_reduce(values: list[float], op: str = "sum") -> list[float]:
    """Reduce a few numbers over all ranks in float64; op is sum, max or min."""
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op=_OPERATIONS[op])
    return tensor.tolist()


def gather_objects(value: Any) -> list[Any]:
    """Every rank's picklable value, in rank order, on every rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def from_main(value: Any) -> Any:
    """Rank 0's value, on every rank. Every rank calls this."""
    return gather_objects(value)[0]
