"""Triton building blocks that the kernels share: a tile of a row, fused multiply-add, and the reduction of a row.

A row is one latent, `pixels` elements of one plane (FLAT) or `channels` planes of `pixels` each. A program walks TILES tiles of
one row; how a row is cut depends on its size alone, so that its sum has the same bits in every batch.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
PARTIALS = tl.constexpr(128)  # partial sums read at a time


@triton.jit
def fma(x, y, z):
    """x y + z, rounded once. Written out wherever two kernels must get the same bits: a compiler may fuse or not."""
    if INTERPRETED:  # NumPy has no fused multiply-add; a product of two float32 is exact in float64
        return (x.to(tl.float64) * y.to(tl.float64) + z.to(tl.float64)).to(z.dtype)
    else:
        return tl.fma(x, y, z)


@triton.jit
def reciprocal(x):
    """1 / x to half an ulp, by a Newton step: Triton's own float32 division may be two ulps off. NaN for 0."""
    y = 1.0 / x
    return fma(y, fma(-x, y, tl.full((), 1.0, x.dtype)), y)


@triton.jit
def tiles_left(first, pixels, P_BLOCK: tl.constexpr, TILES: tl.constexpr):
    """How many of the TILES tiles from pixel `first` on hold any pixel."""
    return tl.minimum(tl.cdiv(pixels - first, P_BLOCK), TILES).to(tl.int32)


@triton.jit
def tile_mask(start, pixels, CHANNELS: tl.constexpr, FLAT: tl.constexpr, C_BLOCK: tl.constexpr, P_BLOCK: tl.constexpr):
    """(P_BLOCK,), or one that broadcasts to (C_BLOCK, P_BLOCK): which elements of the tile that begins at pixel `start` exist."""
    remaining = tl.minimum(pixels - start, P_BLOCK).to(tl.int32)
    inside = tl.arange(0, P_BLOCK) < remaining
    if FLAT:
        return inside
    elif CHANNELS == C_BLOCK:  # a mask that does not look at the channel leaves loads across channels whole
        return inside[None, :]
    else:
        return (tl.arange(0, C_BLOCK) < CHANNELS)[:, None] & inside[None, :]


@triton.jit
def tile_pointers(row_ptr, start, c_stride, p_stride, FLAT: tl.constexpr, C_BLOCK: tl.constexpr, P_BLOCK: tl.constexpr):
    """Pointers to that tile. `start` is int64 and joins the scalar pointer: offsets inside a tile fit 32 bits, or are int64."""
    if FLAT:
        return row_ptr + start + tl.arange(0, P_BLOCK)
    else:
        channel = tl.arange(0, C_BLOCK)[:, None].to(tl.int64)
        pixel = tl.arange(0, P_BLOCK)
        if P_BLOCK * p_stride > 2**31:  # of a view that has pixels as its slowest dimension
            pixel = pixel.to(tl.int64)
        return row_ptr + start * p_stride + channel * c_stride + (pixel * p_stride)[None, :]


@triton.jit
def guided_output(
    row_ptr, half, start, c_stride, p_stride, mask, scale,
    GUIDED: tl.constexpr, COMPUTE: tl.constexpr, FLAT: tl.constexpr, C_BLOCK: tl.constexpr, P_BLOCK: tl.constexpr,
):  # fmt: skip
    """m = m_uncond + s (m_cond - m_uncond), or m; the conditional half lies `half` elements after the unconditional one."""
    pointers = tile_pointers(row_ptr, start, c_stride, p_stride, FLAT, C_BLOCK, P_BLOCK)
    output = tl.load(pointers, mask=mask, other=0.0).to(COMPUTE)
    if GUIDED:
        cond = tl.load(pointers + half, mask=mask, other=0.0).to(COMPUTE)
        output = fma(scale, cond - output, output)
    return output


@triton.jit
def residual(prev_sample, sample, output, sample_coef, output_coef):
    """x_{t-1} - sample_coef x_t - output_coef m. Subtracting term by term, each rounded once at the size of what is left,
    keeps more digits than rounding mu first: x_t and x_{t-1} are nearly equal late in the chain."""
    return fma(-output_coef, output, fma(-sample_coef, sample, prev_sample))


@triton.jit
def finish_log_prob(
    squares, std, placeholder, log_prob_ptr, partial_ptr, semaphore_ptr, row, split, splits, size,
    MEAN: tl.constexpr, COMPUTE: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    """Write the log-prob of a row from `squares`, this program's sum of ((x - mu) / std)^2; SINGLE: it is the whole row's.

    Otherwise every program leaves its sum in partial_ptr (N, splits), and the one that arrives last at semaphore_ptr (N,), which
    holds zeros before and after, adds them up in the order of their place, never of their arrival: same bits twice.
    """
    if SINGLE:
        write_log_prob(squares.to(tl.float64), std, placeholder, log_prob_ptr, row, size, MEAN, COMPUTE)
    else:
        tl.store(partial_ptr + row * splits + split, squares)
        tl.debug_barrier()
        arrived = tl.atomic_add(semaphore_ptr + row, 1, sem="acq_rel", scope="gpu")
        if arrived == splits - 1:
            total = tl.full((), 0.0, tl.float64)
            for start in range(0, splits, PARTIALS):
                at = start + tl.arange(0, PARTIALS)
                # .cg: from L2, where the other programs' stores are, past an L1 that may be stale
                partials = tl.load(partial_ptr + row * splits + at, mask=at < splits, other=0.0, cache_modifier=".cg")
                total += tl.sum(partials.to(tl.float64))
            tl.store(semaphore_ptr + row, 0)
            write_log_prob(total, std, placeholder, log_prob_ptr, row, size, MEAN, COMPUTE)


@triton.jit
def write_log_prob(squares, std, placeholder, log_prob_ptr, row, size, MEAN: tl.constexpr, COMPUTE: tl.constexpr):
    """mean or sum of -z^2 / 2 - log std - log(2 pi) / 2; `placeholder` (a bool) writes 0 instead."""
    constant = tl.log(std).to(tl.float64) + 0.9189385332046727
    if MEAN:
        log_prob = -0.5 * squares / size.to(tl.float64) - constant
    else:
        log_prob = -0.5 * squares - size.to(tl.float64) * constant
    tl.store(log_prob_ptr + row, tl.where(placeholder, 0.0, log_prob).to(COMPUTE))
