"""The gated activation of a transformer's feed-forward layer, in plain torch.

y = h gelu(gate),  gelu(x) = x (1 + erf(x / sqrt 2)) / 2
"""

from __future__ import annotations

import torch
from torch.nn import functional


def geglu(x: torch.Tensor) -> torch.Tensor:
    """Differentiable. Computes in float32 (float64 if x is), and rounds once, to the dtype of x."""
    hidden, gate = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32).chunk(2, dim=-1)
    return (hidden * functional.gelu(gate)).to(x.dtype)
