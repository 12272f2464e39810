"""Group norm of a channels-last tensor, with what stands before and after it in a residual block, in plain torch.

    h = x + shift,  y = (h - mean) rstd weight + bias,  with `silu` y sigmoid(y)

Mean and rstd are over the channels and the pixels of a group.
"""

from __future__ import annotations

import torch
from torch.nn import functional


def group_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    shift: torch.Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
) -> torch.Tensor:
    """Differentiable in everything. Computes in float32 (float64 if x or weight is), and rounds once, to the dtype of x."""
    compute = torch.float64 if torch.float64 in (x.dtype, weight.dtype) else torch.float32
    h = x.to(compute)
    if shift is not None:
        h = h + shift.to(compute)[:, :, None, None]
    y = functional.group_norm(h, groups, weight.to(compute), bias.to(compute), eps)
    return (functional.silu(y) if silu else y).to(x.dtype)
