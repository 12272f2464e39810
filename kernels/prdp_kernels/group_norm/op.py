"""Group norm of a residual block: the time embedding added before it, SiLU after it, channels-last."""

from __future__ import annotations

from typing import Any

import torch

from prdp_kernels import checks, dispatch
from prdp_kernels import launch as launching
from prdp_kernels.group_norm import reference


def group_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    eps: float = 1e-5,
    *,
    shift: torch.Tensor | None = None,
    silu: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """silu(group_norm(x + shift)): (N, C, H, W) in the dtype of x, channels-last with Triton, differentiable in all tensors.

    Computed in float32 (float64 if x or weight is), and rounded once; plain torch rounds the sum, the norm and the activation.

    Args:
        x: (N, C, H, W) any float dtype; read without a copy if it is channels-last.
        weight, bias: (C,) floating. groups: divides C. eps: > 0, added to the variance.
        shift: (N, C) floating, added to every pixel: the projected time embedding, and the bias of the convolution before.
        silu: y sigmoid(y) after the norm.
    Raises: TypeError, ValueError for arguments of the wrong type, shape or device.
    Source: Wu and He, Group Normalization (arXiv:1803.08494) eq. 1 to 6; the order of operations is diffusers' ResnetBlock2D.
    """
    op = "group_norm"
    if type(groups) is int and type(silu) is bool and eps > 0:
        if launching.known(op, backend, (groups, silu), (x, weight, bias, shift)) is not None:
            return _GroupNorm.apply(x, weight, bias, shift, groups, float(eps), silu)
    checks.tensors(op, x=x, weight=weight, bias=bias)
    checks.floating(op, x=x, weight=weight, bias=bias)
    if x.dim() != 4:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}, expected (N, C, H, W)")
    channels = x.shape[1]
    if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1 or channels % groups:
        raise ValueError(f"{op}: groups is {groups!r}, expected a divisor of the {channels} channels of x")
    if not eps > 0:
        raise ValueError(f"{op}: eps is {eps!r}, expected a number > 0")
    checks.shape(op, (channels,), weight=weight, bias=bias)
    checks.same_device(op, x=x, weight=weight, bias=bias)
    if shift is not None:
        checks.tensors(op, shift=shift)
        checks.floating(op, shift=shift)
        checks.shape(op, x.shape[:2], shift=shift)
        checks.same_device(op, x=x, shift=shift)
    run = dispatch.choose(op, backend, x, reference=reference.group_norm, triton=_triton)
    return run(x, weight, bias, shift, groups, float(eps), silu)


def _kernel() -> Any:
    from prdp_kernels.group_norm import kernel  # imports triton

    return kernel


class _GroupNorm(torch.autograd.Function):
    """The eager road to the kernels; what torch.ops registers below, without its layers of Python."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> torch.Tensor:
        y, *moments = _kernel().forward(*args)
        ctx.save_for_backward(*args[:4], *moments)
        ctx.groups, ctx.silu = args[4], args[6]
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dx, dweight, dbias, dshift = _kernel().backward(dy, *ctx.saved_tensors, ctx.groups, ctx.silu)
        return dx, dweight, dbias, None if ctx.saved_tensors[3] is None else dshift, None, None, None


def _triton(*args: Any) -> torch.Tensor:
    return _GroupNorm.apply(*args) if launching.plain(args[:4]) else _forward(*args)[0]


def _fake_forward(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, shift: Any, groups: int, *_: Any) -> Any:
    compute = torch.float64 if torch.float64 in (x.dtype, weight.dtype) else torch.float32
    rows, channels = x.shape[:2]
    moments = [x.new_empty((rows, n), dtype=compute) for n in (groups, groups, channels)]
    return torch.empty_like(x, memory_format=torch.channels_last), *moments


def _fake_backward(dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, shift: Any, *_: Any) -> Any:
    dshift = x.new_empty(0) if shift is None else torch.empty_like(shift, memory_format=torch.contiguous_format)
    own = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (weight, bias))
    return torch.empty_like(x, memory_format=torch.channels_last), *own, dshift


_forward = dispatch.define(
    "group_norm(Tensor x, Tensor weight, Tensor bias, Tensor? shift, int groups, float eps, bool silu) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    launch=lambda *args: _kernel().forward(*args),
    fake=_fake_forward,
)
_backward_op = dispatch.define(
    "group_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor bias, Tensor? shift, Tensor mean, Tensor rstd, "
    "Tensor means, int groups, bool silu) -> (Tensor, Tensor, Tensor, Tensor)",
    launch=lambda *args: _kernel().backward(*args),
    fake=_fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:4], *output[1:])
    ctx.groups, ctx.silu = inputs[4], inputs[6]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
    dx, dweight, dbias, dshift = _backward_op(dy, *ctx.saved_tensors, ctx.groups, ctx.silu)
    return dx, dweight, dbias, None if ctx.saved_tensors[3] is None else dshift, None, None, None


torch.library.register_autograd("prdp_kernels::group_norm", _backward, setup_context=_setup_context, lib=dispatch.LIBRARY)
