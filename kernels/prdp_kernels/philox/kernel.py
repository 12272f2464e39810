"""Philox4x32-10 and Box-Muller in registers: four standard normals from one counter. See `reference.py` for the definition.

Bytes moved: 4 an element, written once. Some 80 integer and 60 float operations make four normals.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from prdp_kernels import launch as launching
from prdp_kernels import layout
from prdp_kernels.philox.reference import NORMAL_STREAM
from prdp_kernels.tile import fma, tile_mask, tile_pointers, tiles_left

STREAM = tl.constexpr(NORMAL_STREAM)


@triton.jit
def plus(x, y, constant: tl.constexpr):
    """x y + constant, rounded once: one step of a polynomial."""
    return fma(x, y, tl.full(x.shape, constant, tl.float32))


@triton.jit
def philox(seed, c0, c1, c2, c3):
    """The four words, uint32, of a counter of four words and a 64-bit key: Philox4x32-10, as in `reference.py`.

    Each round multiplies twice, 32 by 32 to 64 bits, and both halves of a product are used. Written as 64-bit products they are
    one machine instruction each; Triton's own `tl.philox` multiplies once for the high half and once more for the low one.
    Words that all elements share may be scalars: the first rounds then work on them once a program, not once an element.
    """
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        product0 = tl.mul(c0.to(tl.uint64), 0xD2511F53, sanitize_overflow=False)
        product1 = tl.mul(c2.to(tl.uint64), 0xCD9E8D57, sanitize_overflow=False)
        c0 = (product1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (product0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1, c3 = product1.to(tl.uint32), product0.to(tl.uint32)
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def radius_of(x):
    """sqrt(-2 log u1), u1 = (x + 1/2) 2^-32, of words, uint32.

    u1 2^32 = 2^(e + 32) m with 2/3 <= m < 4/3, so that -2 log u1 = -2 log m - e 2 log 2. With F = 2 - 2 m, which is exact,
    -2 log m = F + F^2 R(F): next to u1 = 1 nothing cancels. R is the minimax polynomial of degree 7, its error .44 u of the
    result (u = 2^-24); of every float32 that a word rounds to, the worst error of -2 log u1 is 1.5 u. u1 is never 0, infinite
    or subnormal: libdevice's logarithm carries those cases, and a multiplication for the -2.
    """
    v = x.to(tl.float32) + 0.5
    bits = v.to(tl.int32, bitcast=True)
    exponent = (bits - 0x4F2AAAAB) & -8388608  # e 2^23; the constant is the bits of (2/3) 2^32
    m = (bits - exponent).to(tl.float32, bitcast=True)  # m 2^32
    f = fma(m, tl.full(m.shape, -4.656612873077393e-10, tl.float32), tl.full(m.shape, 2.0, tl.float32))
    p = plus(tl.full(f.shape, 0.000547899865955, tl.float32), f, 0.00120222811186)
    p = plus(p, f, 0.00218684860617)
    p = plus(p, f, 0.005129988932)
    p = plus(p, f, 0.0125069795694)
    p = plus(p, f, 0.0312597733794)
    p = plus(p, f, 0.0833329953963)
    p = plus(p, f, 0.249999680403)
    square = fma(f * f, p, f)
    return tl.sqrt(fma(exponent.to(tl.float32), tl.full(f.shape, -1.652591659e-07, tl.float32), square))  # -2 log(2) 2^-23


@triton.jit
def reduced_sin_cos(y):
    """(n, sin r, cos r) of words, uint32, with the angle y 2^-32 2 pi = n pi/2 + r and |r| <= pi/4; n is right modulo 4.

    Adding 1.5 2^23 rounds to the nearest integer and leaves it in the low bits of the sum, without a conversion. pi/2 is taken
    off in two parts. The polynomials are minimax, their error .6 u (cosine) and .1 u (sine). Of every float32 that a word rounds
    to, sine and cosine are off by at most 2.2 u, but for the cosine at the one angle next to 3 pi/2, 7.2 u of 1e-8.
    """
    # One rounding of y, one of the product: the scale is a power of two times the float32 nearest to 2 pi, as in the reference.
    angle = y.to(tl.float32) * 1.4629180792671596e-09
    shifted = fma(angle, tl.full(angle.shape, 0.6366197723675814, tl.float32), tl.full(angle.shape, 12582912.0, tl.float32))
    quarters = shifted - 12582912.0
    r = fma(quarters, tl.full(angle.shape, -1.5707963705062866, tl.float32), angle)
    r = fma(quarters, tl.full(angle.shape, 4.371139000186243e-08, tl.float32), r)
    square = r * r
    p = plus(tl.full(r.shape, -0.000195172668409, tl.float32), square, 0.00833217791636)
    sine = fma(r * square, plus(p, square, -0.166666549402), r)
    p = plus(tl.full(r.shape, -0.00135918234578, tl.float32), square, 0.0416557748189)
    cosine = plus(plus(p, square, -0.499998847103), square, 1.0)
    return shifted.to(tl.uint32, bitcast=True), sine, cosine


@triton.jit
def sine_at(n, sine, cosine):
    """sin(n pi/2 + r) from sin r and cos r; the cosine is that of n + 1.

    The sign is xored into the sign bit: exact, two integer instructions. It is no select between v and -v. A compiler turns one
    into a predicated negation in place, and on an H200 (Triton 3.6.0) such code returned normals of the wrong sign, on one path
    of three. From the bits of an integer no compiler has a select to form again.
    """
    value = tl.where((n & 1) == 1, cosine, sine)
    return (value.to(tl.uint32, bitcast=True) ^ ((n << 30) & 0x80000000)).to(tl.float32, bitcast=True)


@triton.jit
def box_muller(x, y):
    """Two standard normals, float32, from two words, uint32."""
    radius = radius_of(x)
    n, sine, cosine = reduced_sin_cos(y)
    return radius * sine_at(n + 1, sine, cosine), radius * sine_at(n, sine, cosine)


@triton.jit
def four_normals(seed, step, block_low, block_high):
    """The normals of elements 4 b .. 4 b + 3 of a row, b a tensor of block numbers in two uint32 halves."""
    a, b, c, d = philox(seed, block_low, block_high, step, tl.full((), STREAM, tl.uint32))
    n0, n1 = box_muller(a, b)
    n2, n3 = box_muller(c, d)
    return n0, n1, n2, n3


@triton.jit
def one_normal(seed, step, block_low, block_high, word):
    """The normal of element 4 b + word of a row: one Box-Muller of the pair of words that it needs."""
    a, b, c, d = philox(seed, block_low, block_high, step, tl.full((), STREAM, tl.uint32))
    first = word < 2
    n, sine, cosine = reduced_sin_cos(tl.where(first, b, d))
    return radius_of(tl.where(first, a, c)) * sine_at(n + 1 - (word & 1), sine, cosine)


@triton.jit
def tile_normals(
    seed, step, start, pixels, FLAT: tl.constexpr, ALIGNED: tl.constexpr, C_BLOCK: tl.constexpr, P_BLOCK: tl.constexpr
):
    """Noise of the tile that begins at pixel `start`, a multiple of 4; the shape is that of `tile_mask`.

    ALIGNED: a plane is a multiple of 4 pixels (or FLAT), so every counter serves four neighbours. Else every element takes its
    own: four times the integers and twice the floats, for odd sizes in planes only.
    """
    if FLAT:
        block = (start >> 2).to(tl.int64)  # a multiple of P_BLOCK / 4: adding to its low half never carries
        low = block.to(tl.uint32) + tl.arange(0, P_BLOCK // 4).to(tl.uint32)
        n0, n1, n2, n3 = four_normals(seed, step, low, (block >> 32).to(tl.uint32))
        return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), (P_BLOCK,))
    else:
        plane = tl.arange(0, C_BLOCK)[:, None].to(tl.int64) * pixels + start
        if ALIGNED:
            block = (plane >> 2) + tl.arange(0, P_BLOCK // 4)[None, :]
            n0, n1, n2, n3 = four_normals(seed, step, block.to(tl.uint32), (block >> 32).to(tl.uint32))
            return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), (C_BLOCK, P_BLOCK))
        else:
            element = plane + tl.arange(0, P_BLOCK)[None, :]
            block = element >> 2
            return one_normal(seed, step, block.to(tl.uint32), (block >> 32).to(tl.uint32), element.to(tl.uint32) & 3)


@triton.jit
def row_step(step_ptr, step, row, STEP_ROWS: tl.constexpr):
    """The counter's third word, uint32: a number, or one of each row of which the low 32 bits count."""
    if STEP_ROWS:
        return tl.load(step_ptr + row).to(tl.uint32)
    else:
        return tl.full((), step, tl.int64).to(tl.uint32)


@triton.jit(do_not_specialize=["step", "splits"])
def philox_normal_kernel(
    seed_ptr,  # (rows,) int64
    step_ptr,  # (rows,) int64; unused without STEP_ROWS
    out_ptr,  # out (rows, size) float32
    step: tl.int64, splits, size,
    STEP_ROWS: tl.constexpr, P_BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // splits).to(tl.int64)
    split = (tl.program_id(0) % splits).to(tl.int64)
    seed = tl.load(seed_ptr + row)
    step = row_step(step_ptr, step, row, STEP_ROWS)
    first = split * (TILES * P_BLOCK)
    for tile in range(tiles_left(first, size, P_BLOCK, TILES)):
        start = first + tile * P_BLOCK
        normals = tile_normals(seed, step, start, size, True, True, 1, P_BLOCK)
        mask = tile_mask(start, size, 1, True, 1, P_BLOCK)
        tl.store(tile_pointers(out_ptr + row * size, start, 0, 1, True, 1, P_BLOCK), normals, mask=mask)


def launch(seeds: torch.Tensor, shape: Sequence[int], steps: torch.Tensor | None, step: int) -> torch.Tensor:
    """(N, *shape) float32; `steps` (N,) int64, or None for one `step`."""
    shape = tuple(shape)
    key = launching.key_of("philox_normal", shape, (seeds, steps))
    plan = launching.PLANS.get(key)
    if plan is None:
        plan = launching.PLANS[key] = make_plan(seeds, shape, steps)
    return run(plan, seeds, shape, steps, step)


class Plan(NamedTuple):
    """What `launch` needs of a call that depends on metadata alone."""

    prepared: launching.Prepared | None  # None without elements
    contiguous: bool


def make_plan(seeds: torch.Tensor, shape: tuple[int, ...], steps: torch.Tensor | None) -> Plan:
    size = math.prod(shape)
    if len(seeds) * size == 0:
        return Plan(None, True)
    tile = layout.elementwise_tile(size)
    prepared = launching.Prepared(
        philox_normal_kernel,
        len(seeds) * tile.splits,
        (tile.splits, tile.pixels),
        {"STEP_ROWS": steps is not None, "P_BLOCK": tile.p_block, "TILES": tile.tiles},
        {"num_warps": tile.num_warps},
        seeds.device,
    )
    return Plan(prepared, seeds.is_contiguous() and (steps is None or steps.is_contiguous()))


def run(plan: Plan, seeds: torch.Tensor, shape: tuple[int, ...], steps: torch.Tensor | None, step: int) -> torch.Tensor:
    """The launch itself."""
    out = torch.empty((seeds.shape[0], *shape), dtype=torch.float32, device=seeds.device)
    if plan.prepared is None:
        return out
    if not plan.contiguous:
        seeds, steps = seeds.contiguous(), None if steps is None else steps.contiguous()
    plan.prepared.launch((seeds, seeds if steps is None else steps, out), (step,))
    return out
