"""Which implementation of an operator runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

BACKENDS = ("auto", "triton", "torch")

F = TypeVar("F", bound=Callable[..., object])


def choose(op: str, backend: str, *tensors: torch.Tensor, reference: F, triton: F | None = None) -> F:
    """The implementation of `op` to call: `reference` (plain torch) or `triton`, None where the operator has no Triton kernel.

    "auto" takes Triton when every one of `tensors` is on CUDA and a Triton implementation exists, else torch.
    Raises: ValueError for an unknown backend; NotImplementedError for "triton" without an implementation.
    """
    if backend not in BACKENDS:
        raise ValueError(f"{op}: unknown backend {backend!r}; expected one of {', '.join(map(repr, BACKENDS))}")
    if backend == "triton" and triton is None:
        raise NotImplementedError(f"{op} has no Triton implementation yet; use backend='torch'")
    if backend == "torch" or triton is None:
        return reference
    if backend == "triton" or all(t.is_cuda for t in tensors):
        return triton
    return reference
