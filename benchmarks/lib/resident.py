"""The most memory that a call holds beyond what was there before: a GPU's allocator's account, or this process's pages."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable
from pathlib import Path

import torch

MIB = 2**20
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def can_measure(device: torch.device) -> bool:
    """On a CPU it takes Linux, whose high-water mark can be set back."""
    return device.type == "cuda" or (sys.platform == "linux" and _CLEAR.exists())


def _kibibytes(field: str) -> int:
    lines = (line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return int(dict(lines)[field].split()[0])


def _give_back_freed() -> None:
    """Pages that the C library keeps for later would be there before the call, and what uses them would count for nothing."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):
        return  # another C library than glibc: what it keeps is not known


def peak_during(call: Callable[[], object], device: torch.device) -> int:
    """The most bytes held during a call, what was there before included: see `peak_over_baseline`."""
    return _before_and_peak(call, device)[1]


def peak_over_baseline(call: Callable[[], object], device: torch.device) -> int:
    """Bytes. On CUDA those that tensors took; on a CPU resident pages, and so also libraries' workspaces and code first used.

    Raises: OSError where there is no way to know (see `can_measure`).
    """
    before, peak = _before_and_peak(call, device)
    return max(0, peak - before)


def _before_and_peak(call: Callable[[], object], device: torch.device) -> tuple[int, int]:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return before, torch.cuda.max_memory_allocated(device)
    _give_back_freed()
    _CLEAR.write_text("5")  # sets VmHWM back to what is resident now
    before = _kibibytes("VmRSS")
    call()
    return 1024 * before, 1024 * _kibibytes("VmHWM")
