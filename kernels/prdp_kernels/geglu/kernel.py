"""h gelu(gate) of the two halves of a feed-forward projection, and its gradient, one launch each.

    y = h c gate,  c = (1 + erf(gate / sqrt 2)) / 2
    dh = dy c gate,  dgate = dy h (c + gate exp(-gate^2 / 2) / sqrt(2 pi))

Bytes moved a token and hidden unit of w bytes: forward 3 w (h, gate, y), backward 5 w (dy, h, gate, dh, dgate). Plain torch moves
5 w and 13 w: gelu and product are two operations, their gradients three, and a fourth puts the halves together again. It also
keeps gelu(gate) for the backward, besides the projection.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from prdp_kernels import launch as launching

HALF_ROOT = tl.constexpr(0.7071067811865476)  # 1 / sqrt 2
DENSITY = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)


@triton.jit
def geglu_kernel(
    x_ptr,  # (tokens, 2 width): h, then gate
    y_ptr,  # out (tokens, width)
    tokens, units, blocks,
    UNIT: tl.constexpr, T_BLOCK: tl.constexpr, W_BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    width = units * UNIT  # says that rows begin at multiples of UNIT elements, which decides how wide the loads are
    token = (tl.program_id(0) // blocks).to(tl.int64) * T_BLOCK + tl.arange(0, T_BLOCK)[:, None]
    column = (tl.program_id(0) % blocks) * W_BLOCK + tl.arange(0, W_BLOCK)[None, :]
    inside = (token < tokens) & (column < width)
    at = x_ptr + token * (2 * width) + column
    h = tl.load(at, mask=inside, other=0.0).to(COMPUTE)
    gate = tl.load(at + width, mask=inside, other=0.0).to(COMPUTE)
    y = h * (gate * (0.5 + 0.5 * tl.erf(gate * HALF_ROOT)))
    tl.store(y_ptr + token * width + column, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def geglu_gradient_kernel(
    x_ptr,  # (tokens, 2 width): h, then gate
    dy_ptr,  # (tokens, width)
    dx_ptr,  # out (tokens, 2 width)
    tokens, units, blocks,
    UNIT: tl.constexpr, T_BLOCK: tl.constexpr, W_BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    width = units * UNIT
    token = (tl.program_id(0) // blocks).to(tl.int64) * T_BLOCK + tl.arange(0, T_BLOCK)[:, None]
    column = (tl.program_id(0) % blocks) * W_BLOCK + tl.arange(0, W_BLOCK)[None, :]
    inside = (token < tokens) & (column < width)
    at = token * (2 * width) + column
    h = tl.load(x_ptr + at, mask=inside, other=0.0).to(COMPUTE)
    gate = tl.load(x_ptr + at + width, mask=inside, other=0.0).to(COMPUTE)
    dy = tl.load(dy_ptr + token * width + column, mask=inside, other=0.0).to(COMPUTE)
    share = 0.5 + 0.5 * tl.erf(gate * HALF_ROOT)
    slope = share + gate * (DENSITY * tl.exp(-0.5 * gate * gate))
    dtype = dx_ptr.dtype.element_ty
    tl.store(dx_ptr + at, (dy * (gate * share)).to(dtype), mask=inside)
    tl.store(dx_ptr + at + width, (dy * h * slope).to(dtype), mask=inside)


TILE = 2048  # elements: 16 a thread of four warps
COLUMNS = 128


class Plan(NamedTuple):
    """What a call needs that depends on metadata alone."""

    forward: launching.Prepared
    backward: launching.Prepared


def plan_of(x: torch.Tensor) -> Plan:
    key = launching.key_of("geglu", (), (x,))
    plan = launching.PLANS.get(key)
    if plan is None:
        plan = launching.PLANS[key] = make_plan(x)
    return plan


def make_plan(x: torch.Tensor) -> Plan:
    width = x.shape[-1] // 2
    tokens = x.numel() // (2 * width)
    w_block = min(COLUMNS, 1 << (width - 1).bit_length())
    t_block = min(TILE // w_block, 1 << (tokens - 1).bit_length())
    blocks = -(-width // w_block)
    unit = next(unit for unit in (8, 4, 2, 1) if width % unit == 0)
    constants = {"UNIT": unit, "T_BLOCK": t_block, "W_BLOCK": w_block}
    constants["COMPUTE"] = tl.float64 if x.dtype == torch.float64 else tl.float32
    numbers, grid = (tokens, width // unit, blocks), -(-tokens // t_block) * blocks
    warps = {"num_warps": max(1, min(4, t_block * w_block // 512))}
    return Plan(
        *(launching.Prepared(fn, grid, numbers, constants, warps, x.device) for fn in (geglu_kernel, geglu_gradient_kernel))
    )


def forward(x: torch.Tensor) -> torch.Tensor:
    """(..., 2 width) -> (..., width), contiguous."""
    x = x.contiguous()
    y = torch.empty((*x.shape[:-1], x.shape[-1] // 2), dtype=x.dtype, device=x.device)
    if y.numel():
        plan_of(x).forward.launch((x, y), ())
    return y


def backward(dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """(..., width), (..., 2 width) -> (..., 2 width), contiguous."""
    x, dy = x.contiguous(), dy.to(x.dtype).contiguous()
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if dy.numel():
        plan_of(x).backward.launch((x, dy, dx), ())
    return dx
