"""Whether a fast path may be timed: each result is compared with a float32 truth, never with another result in 16 bits.

A path fails only if it is more than SLACK times as far off as the plain model in the same dtype is: that one's error is what the
dtype costs, and no path can be asked to do better. Two paths that are both right in bf16 may differ from each other by more than
either differs from the truth.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

import torch

SLACK = 1.5
# What float32 itself may be off by where sums are taken in another order: in float32 the plain model is its own truth, and 1.5
# times nothing is nothing. As in `prdp_fast/acceleration/probe.py`, two orders of magnitude above what is seen.
FLOAT32 = 1e-4


def relative_distance(values: Sequence[torch.Tensor | None], expected: Sequence[torch.Tensor | None]) -> float:
    """||values - expected|| / ||expected|| over all tensors together, in float64; a tensor that is None is zeros.

    Returns: NaN if what is expected is zero, for that is no agreement.
    """
    square = norm = 0.0
    for one, other in zip(values, expected, strict=True):
        if one is None and other is None:
            continue
        a, b = (torch.zeros(()) if x is None else x.detach() for x in (one, other))
        b = b.to(a.device) if one is not None else b
        a = a.to(b.device)
        square += float((a.double() - b.double()).square().sum())
        norm += float(b.double().square().sum())
    return math.sqrt(square / norm) if norm > 0 else math.nan


def fault(what: str, own: float, plain: float) -> str | None:
    """Why a result may not be used, in a line; None if it may. own, plain: relative distances from the truth. NaN fails."""
    most = max(SLACK * plain, FLOAT32)
    if own <= most:
        return None
    return f"{what} is off by {own:.2e} of the float32 truth, more than {most:.2e} (plain eager: {plain:.2e}, times {SLACK:g})"


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """Inside, float32 products have all their bits."""
    before, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        torch.backends.cudnn.allow_tf32 = cudnn
