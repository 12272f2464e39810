"""Philox4x32-10 and Box-Muller in registers: four standard normals from one counter. See `reference.py` for the definition.

Bytes moved: 4 an element, written once. Some 80 integer and 60 float operations make four normals.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from prdp_kernels import layout
from prdp_kernels.dispatch import on_device
from prdp_kernels.philox.reference import NORMAL_STREAM
from prdp_kernels.tile import fma, tile_mask, tile_pointers, tiles_left

STREAM = tl.constexpr(NORMAL_STREAM)


@triton.jit
def cos_sin(angle):
    """Of float32 angles in [0, 2 pi], to about an ulp: Cody-Waite reduction by pi/2 and the polynomials of Cephes' sinf, cosf.

    Written out because libdevice's sinf and cosf share no work and carry a path for huge arguments.
    """
    quarter = tl.floor(fma(angle, tl.full(angle.shape, 0.6366197723675814, tl.float32), tl.full(angle.shape, 0.5, tl.float32)))
    r = fma(quarter, tl.full(angle.shape, -1.5707963705062866, tl.float32), angle)
    r = fma(quarter, tl.full(angle.shape, 4.371139000186243e-08, tl.float32), r)
    r2 = r * r
    sine = fma(r * r2, ((-1.9515295891e-4 * r2 + 8.3321608736e-3) * r2 - 1.6666654611e-1), r)
    cosine = fma(r2 * r2, ((2.443315711809948e-5 * r2 - 1.388731625493765e-3) * r2 + 4.166664568298827e-2), 1.0 - 0.5 * r2)
    n = quarter.to(tl.int32)
    swap = (n & 1) == 1
    c, s = tl.where(swap, sine, cosine), tl.where(swap, cosine, sine)
    return tl.where(((n + 1) & 2) == 2, -c, c), tl.where((n & 2) == 2, -s, s)


@triton.jit
def box_muller(x, y):
    """Two standard normals, float32, from two words, uint32."""
    u1 = (x.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    angle = y.to(tl.float32) * 2.3283064365386963e-10 * 6.283185307179586
    radius = tl.sqrt(-2.0 * tl.log(u1))
    c, s = cos_sin(angle)
    return radius * c, radius * s


@triton.jit
def four_normals(seed, step, block_low, block_high):
    """The normals of elements 4 b .. 4 b + 3 of a row, b a tensor of block numbers in two uint32 halves."""
    zero = block_low * 0
    c3 = zero + STREAM
    a, b, c, d = tl.philox(seed, block_low, zero + block_high, zero + step, c3)
    n0, n1 = box_muller(a, b)
    n2, n3 = box_muller(c, d)
    return n0, n1, n2, n3


@triton.jit
def tile_normals(
    seed, step, start, pixels, FLAT: tl.constexpr, ALIGNED: tl.constexpr, C_BLOCK: tl.constexpr, P_BLOCK: tl.constexpr
):
    """Noise of the tile that begins at pixel `start`, a multiple of 4; the shape is that of `tile_mask`.

    ALIGNED: a plane is a multiple of 4 pixels (or FLAT), so every counter serves four neighbours. Else every element takes its
    own: four times the arithmetic, for odd sizes in planes only.
    """
    if FLAT:
        block = (start // 4).to(tl.int64)  # a multiple of P_BLOCK / 4: adding to its low half never carries
        low = block.to(tl.uint32) + tl.arange(0, P_BLOCK // 4).to(tl.uint32)
        n0, n1, n2, n3 = four_normals(seed, step, low, (block >> 32).to(tl.uint32))
        return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), (P_BLOCK,))
    else:
        plane = tl.arange(0, C_BLOCK)[:, None].to(tl.int64) * pixels + start
        if ALIGNED:
            block = plane // 4 + tl.arange(0, P_BLOCK // 4)[None, :]
            n0, n1, n2, n3 = four_normals(seed, step, block.to(tl.uint32), (block >> 32).to(tl.uint32))
            return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), (C_BLOCK, P_BLOCK))
        else:
            element = plane + tl.arange(0, P_BLOCK)[None, :]
            block = element // 4
            n0, n1, n2, n3 = four_normals(seed, step, block.to(tl.uint32), (block >> 32).to(tl.uint32))
            word = element % 4
            return tl.where(word < 2, tl.where(word == 0, n0, n1), tl.where(word == 2, n2, n3))


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


def launch(seeds: torch.Tensor, shape: list[int], steps: torch.Tensor | None, step: int) -> torch.Tensor:
    """(N, *shape) float32; `steps` (N,) int64, or None for one `step`."""
    out = torch.empty((len(seeds), *shape), dtype=torch.float32, device=seeds.device)
    if out.numel() == 0:
        return out
    cut = layout.rows([out.view(len(seeds), -1)]).cut
    seeds = seeds.contiguous()
    with on_device(seeds):
        philox_normal_kernel[(len(seeds) * cut.splits,)](
            seeds, seeds if steps is None else steps.contiguous(), out, step, cut.splits, cut.pixels,
            STEP_ROWS=steps is not None, P_BLOCK=cut.p_block, TILES=cut.tiles, num_warps=cut.num_warps,
        )  # fmt: skip
    return out
