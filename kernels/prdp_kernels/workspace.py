"""Scratch memory of kernels in which several programs finish one row: arrival counters that every launch leaves at zero."""

from __future__ import annotations

import torch

_COUNTERS: dict[tuple[int, int], torch.Tensor] = {}  # (device index, stream) -> zeros


def arrivals(count: int, device: torch.device) -> torch.Tensor:
    """At least `count` int32 zeros for one launch on the current stream of `device`.

    On CUDA they are kept for the next launch on the same stream, which runs after this one has put the zeros back: no launch is
    spent on clearing. A CUDA graph may be replayed on any stream, so a capture gets its own and clears them in the graph.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(count, dtype=torch.int32, device=device)
    key = (torch.cuda.current_device() if device.index is None else device.index, torch.cuda.current_stream(device).cuda_stream)
    counters = _COUNTERS.get(key)
    if counters is None or len(counters) < count:
        counters = _COUNTERS[key] = torch.zeros(max(count, 4096), dtype=torch.int32, device=device)
    return counters
