"""Copies of tensors in host memory, which stay as they are while training changes the tensors."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

PINNED = 2**20  # bytes from which on a buffer is locked in memory, for a GPU to copy to at full speed


class HostCopies:
    """Room for the copies of one moment. The next `begin` gives the room to those of another."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._free: dict[int, list[torch.Tensor]] = {}  # buffers by bytes
        self._used: list[torch.Tensor] = []

    def begin(self) -> None:
        """What was copied before is no longer needed. Sizes that do not come again are given back."""
        self._free = {}
        for buffer in self._used:
            self._free.setdefault(buffer.numel(), []).append(buffer)
        self._used = []

    def take(self, value: Any) -> Any:
        """Nested dicts and lists with all tensors in host memory; tensors that share a storage go on to share one.

        A GPU may not be done with it before `finish`. `torch.save` writes the bytes that it would write of `value` on a CPU.
        """
        memo: dict[int, Any] = {}
        storages: dict[int, torch.Tensor] = {}
        for leaf in tree_leaves(value):
            if isinstance(leaf, torch.Tensor) and id(leaf) not in memo:
                memo[id(leaf)] = self._tensor(leaf, storages)
        return copy.deepcopy(value, memo)  # of the rest, which is small and changes likewise

    def finish(self) -> None:
        """Wait for the copies."""
        self._free = {}
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _tensor(self, tensor: torch.Tensor, storages: dict[int, torch.Tensor]) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in storages:
            whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
            storages[storage._cdata] = self._buffer(whole.numel()).copy_(whole, non_blocking=True)
        made = torch.empty(0, dtype=tensor.dtype).set_(
            storages[storage._cdata].untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride()
        )
        made = nn.Parameter(made) if isinstance(tensor, nn.Parameter) else made
        vars(made).update(copy.deepcopy(vars(tensor)))  # which pickles have too, such as DeepSpeed's ds_id
        return made.requires_grad_(tensor.requires_grad)

    def _buffer(self, size: int) -> torch.Tensor:
        free = self._free.get(size)
        if free:
            buffer = free.pop()
        else:
            buffer = torch.empty(size, dtype=torch.uint8)
            if self.device.type == "cuda" and size >= PINNED:
                pin(buffer)
        self._used.append(buffer)
        return buffer


def pin(buffer: torch.Tensor) -> None:
    """Lock a buffer in memory, where the system lets us: a copy into it is right in any case.

    Not by `pin_memory=True`, which takes the next power of two.
    """
    runtime, address = torch.cuda.cudart(), buffer.data_ptr()
    if int(runtime.cudaHostRegister(address, buffer.numel(), 0)) == 0:
        weakref.finalize(buffer, runtime.cudaHostUnregister, address)
