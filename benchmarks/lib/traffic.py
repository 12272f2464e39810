"""What a rank sends to the others: every collective of torch.distributed, seen where it is dispatched.

Wrapping torch's functions would miss those that DeepSpeed binds when it starts. Python sees every operator inside the block,
which costs time: a call is either timed or counted, never both.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operator: (which argument is the whole tensor, its bytes that each rank sends, by the number of ranks n). In a ring, as NCCL and
# gloo do with what is large: a reduce-scatter or an all-gather moves (n-1)/n of the whole through each link, an all-reduce is one
# of each. A broadcast and a reduce end at one rank, which sends nothing: (n-1)/n on average.
_EVERY: Callable[[int], float] = lambda n: (n - 1) / n  # noqa: E731
_TWICE: Callable[[int], float] = lambda n: 2 * (n - 1) / n  # noqa: E731
_OPERATORS: dict[str, tuple[int, Callable[[int], float]]] = {
    "allreduce_": (0, _TWICE),
    "allreduce_coalesced_": (0, _TWICE),
    "reduce_": (0, _EVERY),
    "broadcast_": (0, _EVERY),
    "allgather_": (0, _EVERY),
    "allgather_coalesced_": (0, _EVERY),
    "_allgather_base_": (0, _EVERY),
    "allgather_into_tensor_coalesced_": (0, _EVERY),
    "reduce_scatter_": (1, _EVERY),
    "_reduce_scatter_base_": (1, _EVERY),
    "reduce_scatter_tensor_coalesced_": (1, _EVERY),
    "alltoall_": (1, _EVERY),
    "alltoall_base_": (1, _EVERY),
    "gather_": (1, _EVERY),  # every rank's own part, which all but one send
    "scatter_": (0, _EVERY),  # likewise, received
    "send": (0, lambda n: 1.0),
}
_NOTHING = {"recv_", "recv_any_source_", "barrier", "monitored_barrier_", "check_for_nan"}


@dataclass
class Traffic:
    """Of one rank. `whole` is the size of the tensors that collectives worked on, `sent` what goes over this rank's link."""

    sent: float = 0.0  # bytes
    whole: int = 0  # bytes
    calls: dict[str, int] = field(default_factory=dict)  # of each kind, how many


class _Count(TorchDispatchMode):
    def __init__(self, traffic: Traffic) -> None:
        super().__init__()
        self.traffic = traffic

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in func.namespace:  # torch's functional collectives, which DeepSpeed does not use, have names of their own
            self._add(func._schema.name.removeprefix("c10d::"), args)
        return func(*args, **(kwargs or {}))

    def _add(self, name: str, args: Any) -> None:
        if name in _NOTHING:
            return
        if name not in _OPERATORS:
            raise NotImplementedError(
                f"count_traffic: got collective {name!r}, expected one of {sorted(_OPERATORS)}; add it there"
            )
        position, share = _OPERATORS[name]
        size = sum(leaf.nbytes for leaf in tree_leaves(args[position]) if isinstance(leaf, torch.Tensor))
        self.traffic.whole += size
        self.traffic.sent += size * share(_ranks(args))
        kind = name.strip("_")
        self.traffic.calls[kind] = self.traffic.calls.get(kind, 0) + 1


def _ranks(args: Any) -> int:
    """Of the group that an operator was given."""
    group = next((arg for arg in args if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in arg._type().name()), None)
    return dist.get_world_size() if group is None else dist.ProcessGroup.unbox(group).size()


@contextlib.contextmanager
def count_traffic() -> Iterator[Traffic]:
    """Count what this rank sends inside the block, backward passes included.

    Raises: NotImplementedError at a collective that is not known, rather than leave it out.
    """
    traffic = Traffic()
    with _Count(traffic):
        yield traffic
