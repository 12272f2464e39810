"""Scratch memory of kernels in which several programs finish one row: a semaphore a row, which every launch leaves at zero.

A launch spends nothing on clearing: what it is given is zero, because the launch before left it so, or because nobody used it.
That holds as long as two launches that share semaphores run one after the other.

- Outside a capture they are kept for the stream: launches of one stream do.
- A CUDA graph may be replayed on any stream, beside other graphs. A captured launch takes its own semaphores from a pool that was
  cleared outside the capture, and nobody is ever given them again: a graph needs no node that clears. The pool is bounded; when
  it is used up, or a capture comes before the first launch, the graph clears semaphores of its own.
"""

from __future__ import annotations

import torch

KEPT = 4096  # semaphores a stream has at least
POOL = 1 << 18  # semaphores of a device's pool: 1 MiB, or four thousand captured launches of 64 rows

_KEPT: dict[tuple[int, int], torch.Tensor] = {}  # (device index, stream) -> zeros
_POOLS: dict[int, Pool] = {}  # device index -> what captures take from


class Pool:
    """Zeros that are handed out once."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.zeros = torch.zeros(size, dtype=torch.int32, device=device)
        self.used = 0

    def take(self, count: int) -> torch.Tensor | None:
        """`count` of them, at a multiple of 16 bytes; None if they are used up."""
        begin, end = self.used, self.used + -(-count // 4) * 4
        if end > len(self.zeros):
            return None
        self.used = end
        return self.zeros[begin : begin + count]


def current_stream(index: int) -> int:
    """The stream's handle, without the Python object around it."""
    return torch._C._cuda_getCurrentRawStream(index)


def semaphores(count: int, device: torch.device) -> torch.Tensor:
    """At least `count` int32 zeros, for one launch on the current stream of `device`."""
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32, device=device)
    index = torch.cuda.current_device() if device.index is None else device.index
    if torch.cuda.is_current_stream_capturing():
        pool = _POOLS.get(index)
        own = pool.take(count) if pool else None
        return torch.zeros(count, dtype=torch.int32, device=device) if own is None else own
    if index not in _POOLS:
        # Once a device. The stream is waited for: a graph that is captured later may be replayed on another.
        _POOLS[index] = Pool(POOL, device)
        torch.cuda.current_stream(device).synchronize()
    key = (index, current_stream(index))
    kept = _KEPT.get(key)
    if kept is None or len(kept) < count:
        kept = _KEPT[key] = torch.zeros(max(count, KEPT), dtype=torch.int32, device=device)
    return kept
