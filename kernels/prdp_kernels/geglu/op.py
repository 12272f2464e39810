"""The gated activation of a transformer's feed-forward layer."""

from __future__ import annotations

from typing import Any

import torch

from prdp_kernels import checks, dispatch
from prdp_kernels import launch as launching
from prdp_kernels.geglu import reference


def geglu(x: torch.Tensor, *, backend: str = "auto") -> torch.Tensor:
    """h gelu(gate) of x = [h, gate]: (..., 2 width) -> (..., width) in the dtype of x, differentiable.

    gelu is exact, by the error function. Computed in float32 (float64 if x is), and rounded once.

    Args: x: (..., 2 width) any float dtype: the hidden half first, as in diffusers' GEGLU.
    Raises: TypeError, ValueError for an argument of the wrong type or shape.
    Source: Shazeer, GLU Variants Improve Transformer (arXiv:2002.05202) eq. 5.
    """
    op = "geglu"
    if launching.known(op, backend, (), (x,)) is not None:
        return _Geglu.apply(x)
    checks.tensors(op, x=x)
    checks.floating(op, x=x)
    if x.dim() < 1 or x.shape[-1] % 2 or x.shape[-1] == 0:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}, expected (..., 2 width)")
    return dispatch.choose(op, backend, x, reference=reference.geglu, triton=_triton)(x)


def _kernel() -> Any:
    from prdp_kernels.geglu import kernel  # imports triton

    return kernel


class _Geglu(torch.autograd.Function):
    """The eager road to the kernels; what torch.ops registers below, without its layers of Python."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return _kernel().forward(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:
        return _kernel().backward(dy, *ctx.saved_tensors)


def _triton(x: torch.Tensor) -> torch.Tensor:
    return _Geglu.apply(x) if launching.plain((x,)) else _forward(x)


_forward = dispatch.define(
    "geglu(Tensor x) -> Tensor",
    launch=lambda x: _kernel().forward(x),
    fake=lambda x: x.new_empty((*x.shape[:-1], x.shape[-1] // 2)),
)
_backward_op = dispatch.define(
    "geglu_backward(Tensor dy, Tensor x) -> Tensor",
    launch=lambda dy, x: _kernel().backward(dy, x),
    fake=lambda dy, x: torch.empty_like(x, memory_format=torch.contiguous_format),
)


def _setup_context(ctx: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:
    return _backward_op(dy, *ctx.saved_tensors)


torch.library.register_autograd("prdp_kernels::geglu", _backward, setup_context=_setup_context, lib=dispatch.LIBRARY)
