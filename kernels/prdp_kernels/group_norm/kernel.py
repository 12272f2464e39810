"""Group norm, channels-last, with an added row (the time embedding's) before it and SiLU after it: two launches each way.

    h = x + shift,  xhat = (h - mean) rstd,  z = xhat weight + bias,  y = z sigmoid(z) or z

Backward, from g = dy dz/dz' (z' the activation's input), with m = channels of a group x pixels:

    A[n, c] = sum over pixels of g,  B[n, c] = sum over pixels of g xhat
    dweight = sum_n B,  dbias = sum_n A,  a = sum over the group of weight A,  b = sum over the group of weight B
    dx = rstd (weight g - (a + xhat b) / m),  dshift[n, c] = sum over pixels of dx, which needs no pass: sum xhat is known

Bytes moved an element of w bytes: forward 3 w (read twice, written once), backward 5 w (x and dy read twice, dx written). What
plain torch moves for the same in NCHW: conversions to and from the layout of the convolutions, the sum with the time embedding,
norm and SiLU, each read and written on its own.

Why channels-last. Tensor-core convolutions want it, and torch's own group norm gives it up: it copies to NCHW and stays there.

A program's tile is P_BLOCK pixels x C_BLOCK channels: a warp reads whole 128-byte lines, however wide a group is. The first
kernel leaves sums per channel and chunk of pixels; the program of a row that arrives last adds them up, chunk by chunk in their
order, channels into groups: the same bits twice. Squares are summed about the channel's first element of the chunk, so that a
mean far from zero costs no digits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from prdp_kernels import launch as launching
from prdp_kernels import workspace


@triton.jit
def sigmoid(z):
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def place(pixels, chunk, slices, c_blocks, CHANNELS: tl.constexpr, C_BLOCK: tl.constexpr):
    """(row, chunk, its first pixel and the one after its last, channels, which of them exist) of this program.

    Neighbours share a chunk: they read the other halves of the same lines.
    """
    program = tl.program_id(0)
    slice = (program // c_blocks) % slices
    first = slice * chunk
    channel = (program % c_blocks) * C_BLOCK + tl.arange(0, C_BLOCK)
    row = (program // (slices * c_blocks)).to(tl.int64)
    return row, slice, first, tl.minimum(first + chunk, pixels), channel, channel < CHANNELS


@triton.jit
def tile(row, start, last, pixels, channel, exists, CHANNELS: tl.constexpr, P_BLOCK: tl.constexpr):
    """(offsets, which of them exist) of P_BLOCK pixels of a row from `start` on, up to `last`: (P_BLOCK, C_BLOCK)."""
    pixel = start + tl.arange(0, P_BLOCK)
    at = row * pixels * CHANNELS + pixel.to(tl.int64)[:, None] * CHANNELS + channel[None, :]
    return at, (pixel < last)[:, None] & exists[None, :]


@triton.jit
def finish_moments(
    shift_ptr, mean_ptr, rstd_ptr, means_ptr, partial_ptr, eps, row, pixels, chunk, slices,
    CHANNELS: tl.constexpr, GROUP: tl.constexpr, G_TILE: tl.constexpr, GROUP_BLOCK: tl.constexpr,
    SHIFT: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Mean and 1 / std of every group of a row from what its chunks left, partial_ptr (slices, 2, channels)."""
    groups: tl.constexpr = CHANNELS // GROUP
    member = tl.arange(0, GROUP_BLOCK)[None, :]
    for first_group in range(0, groups, G_TILE):
        group = first_group + tl.arange(0, G_TILE)
        mask = (group < groups)[:, None] & (member < GROUP)
        channel_of = group[:, None] * GROUP + member
        shift = tl.zeros((G_TILE, GROUP_BLOCK), COMPUTE)
        if SHIFT:
            shift = tl.load(shift_ptr + row * CHANNELS + channel_of, mask=mask, other=0.0).to(COMPUTE)
        # Of each group, about the mean of its first channel and chunk.
        about = tl.load(partial_ptr + group * GROUP, mask=group < groups, other=0.0, cache_modifier=".cg")
        if SHIFT:
            about += tl.load(shift_ptr + row * CHANNELS + group * GROUP, mask=group < groups, other=0.0).to(COMPUTE)
        total = tl.zeros((G_TILE, GROUP_BLOCK), COMPUTE)
        spread = tl.zeros((G_TILE, GROUP_BLOCK), COMPUTE)
        for number in range(slices):
            theirs = partial_ptr + number * 2 * CHANNELS + channel_of
            of_chunk = tl.minimum(chunk, pixels - number * chunk).to(COMPUTE)
            mean = tl.load(theirs, mask=mask, other=0.0, cache_modifier=".cg") + shift
            distance = tl.where(mask, mean - about[:, None], 0.0)
            total += of_chunk * distance
            spread += of_chunk * distance * distance
            spread += tl.load(theirs + CHANNELS, mask=mask, other=0.0, cache_modifier=".cg")
        size = pixels.to(COMPUTE)
        tl.store(means_ptr + row * CHANNELS + channel_of, about[:, None] + total / size, mask=mask)
        size *= GROUP
        offset = tl.sum(total, 1) / size
        variance = tl.maximum(tl.sum(spread, 1) / size - offset * offset, 0.0)
        tl.store(mean_ptr + row * groups + group, about + offset, mask=group < groups)
        rstd = 1.0 / tl.sqrt(variance + tl.full((), eps, tl.float64).to(COMPUTE))
        tl.store(rstd_ptr + row * groups + group, rstd, mask=group < groups)


@triton.jit
def moments_kernel(
    x_ptr,  # (N, pixels, channels) any float
    shift_ptr,  # (N, channels) any float; unused without SHIFT
    mean_ptr,  # out (N, groups) COMPUTE
    rstd_ptr,  # out (N, groups) COMPUTE
    means_ptr,  # out (N, channels) COMPUTE, of x + shift over the pixels
    partial_ptr,  # scratch (N, slices, 2, channels) COMPUTE: mean and sum of squares about it
    semaphore_ptr,  # scratch (N,) int32 zeros
    eps: tl.float64,
    pixels, chunk, slices, c_blocks,
    CHANNELS: tl.constexpr, GROUP: tl.constexpr, C_BLOCK: tl.constexpr, P_BLOCK: tl.constexpr,
    G_TILE: tl.constexpr, GROUP_BLOCK: tl.constexpr, SHIFT: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    row, slice, first, last, channel, exists = place(pixels, chunk, slices, c_blocks, CHANNELS, C_BLOCK)
    pivot_at = (row * pixels + first) * CHANNELS + channel
    pivot = tl.load(x_ptr + pivot_at, mask=exists, other=0.0).to(COMPUTE)
    sums = tl.zeros((P_BLOCK, C_BLOCK), COMPUTE)
    squares = tl.zeros((P_BLOCK, C_BLOCK), COMPUTE)
    for start in range(first, last, P_BLOCK):
        at, inside = tile(row, start, last, pixels, channel, exists, CHANNELS, P_BLOCK)
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(COMPUTE)
        x = tl.where(inside, x - pivot[None, :], 0.0)
        sums += x
        squares += x * x
    count = (last - first).to(COMPUTE)
    offset = tl.sum(sums, 0) / count
    partial_ptr += row * slices * 2 * CHANNELS
    mine = partial_ptr + slice * 2 * CHANNELS + channel
    tl.store(mine, pivot + offset, mask=exists)
    tl.store(mine + CHANNELS, tl.maximum(tl.sum(squares, 0) - count * offset * offset, 0.0), mask=exists)

    tl.debug_barrier()
    arrived = tl.atomic_add(semaphore_ptr + row, 1, sem="acq_rel", scope="gpu")
    if arrived == slices * c_blocks - 1:
        tl.store(semaphore_ptr + row, 0)
        finish_moments(
            shift_ptr, mean_ptr, rstd_ptr, means_ptr, partial_ptr, eps, row, pixels, chunk, slices,
            CHANNELS, GROUP, G_TILE, GROUP_BLOCK, SHIFT, COMPUTE,
        )  # fmt: skip


@triton.jit
def of_channels(
    weight_ptr, bias_ptr, shift_ptr, mean_ptr, rstd_ptr, row, channel, exists,
    CHANNELS: tl.constexpr, GROUP: tl.constexpr, SHIFT: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """(weight, bias, mean - shift, rstd) of each channel: xhat is (x - (mean - shift)) rstd."""
    weight = tl.load(weight_ptr + channel, mask=exists, other=0.0).to(COMPUTE)
    bias = tl.load(bias_ptr + channel, mask=exists, other=0.0).to(COMPUTE)
    group = row * (CHANNELS // GROUP) + channel // GROUP
    mean = tl.load(mean_ptr + group, mask=exists, other=0.0)
    rstd = tl.load(rstd_ptr + group, mask=exists, other=0.0)
    if SHIFT:
        mean -= tl.load(shift_ptr + row * CHANNELS + channel, mask=exists, other=0.0).to(COMPUTE)
    return weight, bias, mean, rstd


@triton.jit
def normalize_kernel(
    x_ptr,  # (N, pixels, channels) any float
    weight_ptr,  # (channels,) any float
    bias_ptr,  # (channels,) any float
    shift_ptr,  # (N, channels) any float; unused without SHIFT
    mean_ptr,  # (N, groups) COMPUTE
    rstd_ptr,  # (N, groups) COMPUTE
    y_ptr,  # out (N, pixels, channels) in the dtype of x
    pixels, chunk, slices, c_blocks,
    CHANNELS: tl.constexpr, GROUP: tl.constexpr, C_BLOCK: tl.constexpr, P_BLOCK: tl.constexpr,
    SHIFT: tl.constexpr, SILU: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    row, _, first, last, channel, exists = place(pixels, chunk, slices, c_blocks, CHANNELS, C_BLOCK)
    weight, bias, mean, rstd = of_channels(
        weight_ptr, bias_ptr, shift_ptr, mean_ptr, rstd_ptr, row, channel, exists, CHANNELS, GROUP, SHIFT, COMPUTE
    )
    for start in range(first, last, P_BLOCK):
        at, inside = tile(row, start, last, pixels, channel, exists, CHANNELS, P_BLOCK)
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(COMPUTE)
        y = (x - mean[None, :]) * (rstd * weight)[None, :] + bias[None, :]
        if SILU:
            y = y * sigmoid(y)
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def upstream(x, dy, weight, bias, mean, rstd, SILU: tl.constexpr):
    """(g, xhat): the gradient before the activation, and the normalised input."""
    xhat = (x - mean[None, :]) * rstd[None, :]
    if SILU:
        z = xhat * weight[None, :] + bias[None, :]
        s = sigmoid(z)
        dy = dy * s * (1.0 + z * (1.0 - s))
    return dy, xhat


@triton.jit
def finish_sums(
    weight_ptr, mean_ptr, rstd_ptr, means_ptr, sums_ptr, of_groups_ptr, dshift_ptr, partial_ptr, row, pixels, slices,
    CHANNELS: tl.constexpr, GROUP: tl.constexpr, G_TILE: tl.constexpr, GROUP_BLOCK: tl.constexpr,
    SHIFT: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """A and B of every channel of a row, a / m and b / m of its groups, and dshift, from partial_ptr (slices, 2, channels)."""
    groups: tl.constexpr = CHANNELS // GROUP
    member = tl.arange(0, GROUP_BLOCK)[None, :]
    for first_group in range(0, groups, G_TILE):
        group = first_group + tl.arange(0, G_TILE)
        mask = (group < groups)[:, None] & (member < GROUP)
        channel_of = group[:, None] * GROUP + member
        plain_of = tl.zeros((G_TILE, GROUP_BLOCK), COMPUTE)
        scaled_of = tl.zeros((G_TILE, GROUP_BLOCK), COMPUTE)
        for number in range(slices):
            theirs = partial_ptr + number * 2 * CHANNELS + channel_of
            plain_of += tl.load(theirs, mask=mask, other=0.0, cache_modifier=".cg")
            scaled_of += tl.load(theirs + CHANNELS, mask=mask, other=0.0, cache_modifier=".cg")
        tl.store(sums_ptr + row * 2 * CHANNELS + channel_of, plain_of, mask=mask)
        tl.store(sums_ptr + row * 2 * CHANNELS + CHANNELS + channel_of, scaled_of, mask=mask)
        size = pixels.to(COMPUTE) * GROUP
        weight_of = tl.load(weight_ptr + channel_of, mask=mask, other=0.0).to(COMPUTE)
        a = tl.sum(weight_of * plain_of, 1) / size
        b = tl.sum(weight_of * scaled_of, 1) / size
        tl.store(of_groups_ptr + row * 2 * groups + group, a, mask=group < groups)
        tl.store(of_groups_ptr + row * 2 * groups + groups + group, b, mask=group < groups)
        if SHIFT:
            group_mean = tl.load(mean_ptr + row * groups + group, mask=group < groups, other=0.0)
            group_rstd = tl.load(rstd_ptr + row * groups + group, mask=group < groups, other=0.0)
            mean_of = tl.load(means_ptr + row * CHANNELS + channel_of, mask=mask, other=0.0)
            mean_xhat = (mean_of - group_mean[:, None]) * group_rstd[:, None]
            inner = weight_of * plain_of - pixels.to(COMPUTE) * (a[:, None] + mean_xhat * b[:, None])
            tl.store(dshift_ptr + row * CHANNELS + channel_of, group_rstd[:, None] * inner, mask=mask)


@triton.jit
def sums_kernel(
    x_ptr,  # (N, pixels, channels) any float
    dy_ptr,  # (N, pixels, channels) in the dtype of x
    weight_ptr, bias_ptr,  # (channels,) any float
    shift_ptr,  # (N, channels) any float; unused without SHIFT
    mean_ptr, rstd_ptr,  # (N, groups) COMPUTE
    means_ptr,  # (N, channels) COMPUTE
    sums_ptr,  # out (N, 2, channels) COMPUTE: A and B
    of_groups_ptr,  # out (N, 2, groups) COMPUTE: a / m and b / m
    dshift_ptr,  # out (N, channels) COMPUTE; unused without SHIFT
    partial_ptr,  # scratch (N, slices, 2, channels) COMPUTE
    semaphore_ptr,  # scratch (N,) int32 zeros
    pixels, chunk, slices, c_blocks,
    CHANNELS: tl.constexpr, GROUP: tl.constexpr, C_BLOCK: tl.constexpr, P_BLOCK: tl.constexpr,
    G_TILE: tl.constexpr, GROUP_BLOCK: tl.constexpr, SHIFT: tl.constexpr, SILU: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    row, slice, first, last, channel, exists = place(pixels, chunk, slices, c_blocks, CHANNELS, C_BLOCK)
    weight, bias, mean, rstd = of_channels(
        weight_ptr, bias_ptr, shift_ptr, mean_ptr, rstd_ptr, row, channel, exists, CHANNELS, GROUP, SHIFT, COMPUTE
    )
    plain = tl.zeros((P_BLOCK, C_BLOCK), COMPUTE)
    scaled = tl.zeros((P_BLOCK, C_BLOCK), COMPUTE)
    for start in range(first, last, P_BLOCK):
        at, inside = tile(row, start, last, pixels, channel, exists, CHANNELS, P_BLOCK)
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(COMPUTE)
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(COMPUTE)
        g, xhat = upstream(x, dy, weight, bias, mean, rstd, SILU)
        plain += g
        scaled += g * xhat
    partial_ptr += row * slices * 2 * CHANNELS
    mine = partial_ptr + slice * 2 * CHANNELS + channel
    tl.store(mine, tl.sum(plain, 0), mask=exists)
    tl.store(mine + CHANNELS, tl.sum(scaled, 0), mask=exists)

    tl.debug_barrier()
    arrived = tl.atomic_add(semaphore_ptr + row, 1, sem="acq_rel", scope="gpu")
    if arrived == slices * c_blocks - 1:
        tl.store(semaphore_ptr + row, 0)
        finish_sums(
            weight_ptr, mean_ptr, rstd_ptr, means_ptr, sums_ptr, of_groups_ptr, dshift_ptr, partial_ptr, row, pixels, slices,
            CHANNELS, GROUP, G_TILE, GROUP_BLOCK, SHIFT, COMPUTE,
        )  # fmt: skip


@triton.jit
def gradient_kernel(
    x_ptr,  # (N, pixels, channels) any float
    dy_ptr,  # (N, pixels, channels) in the dtype of x
    weight_ptr, bias_ptr,  # (channels,) any float
    shift_ptr,  # (N, channels) any float; unused without SHIFT
    mean_ptr, rstd_ptr,  # (N, groups) COMPUTE
    of_groups_ptr,  # (N, 2, groups) COMPUTE: a / m and b / m
    dx_ptr,  # out (N, pixels, channels) in the dtype of x
    pixels, chunk, slices, c_blocks,
    CHANNELS: tl.constexpr, GROUP: tl.constexpr, C_BLOCK: tl.constexpr, P_BLOCK: tl.constexpr,
    SHIFT: tl.constexpr, SILU: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    row, _, first, last, channel, exists = place(pixels, chunk, slices, c_blocks, CHANNELS, C_BLOCK)
    weight, bias, mean, rstd = of_channels(
        weight_ptr, bias_ptr, shift_ptr, mean_ptr, rstd_ptr, row, channel, exists, CHANNELS, GROUP, SHIFT, COMPUTE
    )
    groups: tl.constexpr = CHANNELS // GROUP
    of_group = of_groups_ptr + row * 2 * groups + channel // GROUP
    a = tl.load(of_group, mask=exists, other=0.0)
    b = tl.load(of_group + groups, mask=exists, other=0.0)
    for start in range(first, last, P_BLOCK):
        at, inside = tile(row, start, last, pixels, channel, exists, CHANNELS, P_BLOCK)
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(COMPUTE)
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(COMPUTE)
        g, xhat = upstream(x, dy, weight, bias, mean, rstd, SILU)
        dx = rstd[None, :] * (weight[None, :] * g - (a[None, :] + xhat * b[None, :]))
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)


TILE = 4096  # elements of a tile: 16 a thread of eight warps, two 16-byte loads of bf16
C_BLOCK = 64  # channels of a tile: a line of 128 bytes of bf16. Every width of SD's and SDXL's U-Nets is a multiple
SLICES = 16  # chunks of a row whose sums the last program adds up, one after another
ELEMENTS = 4096  # of a tile in which it does so


class Plan(NamedTuple):
    """What a call needs that depends on metadata alone."""

    moments: launching.Prepared
    normalize: launching.Prepared
    sums: launching.Prepared
    gradient: launching.Prepared
    scratch: int
    compute: torch.dtype


def next_power(n: int) -> int:
    return 1 << (n - 1).bit_length()


def plan_of(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, shift: torch.Tensor | None, groups: int, silu: bool
) -> Plan:
    key = launching.key_of("group_norm", (groups, silu), (x, weight, bias, shift))
    plan = launching.PLANS.get(key)
    if plan is None:
        plan = launching.PLANS[key] = make_plan(x, weight, shift is not None, groups, silu)
    return plan


def make_plan(x: torch.Tensor, weight: torch.Tensor, shift: bool, groups: int, silu: bool) -> Plan:
    rows, channels = x.shape[:2]
    pixels = x.shape[2] * x.shape[3]
    compute = torch.float64 if torch.float64 in (x.dtype, weight.dtype) else torch.float32
    group = channels // groups
    c_block = C_BLOCK if channels % C_BLOCK == 0 else min(C_BLOCK, next_power(channels))
    p_block = max(1, min(TILE // c_block, next_power(pixels)))
    if compute == torch.float64:
        p_block = max(1, p_block // 2)
    c_blocks = -(-channels // c_block)
    warps = max(1, min(8, p_block * c_block // 512))
    group_block = next_power(group)
    g_tile = max(1, min(next_power(groups), ELEMENTS // group_block))
    shape = {"CHANNELS": channels, "GROUP": group, "C_BLOCK": c_block, "P_BLOCK": p_block}
    last = {"G_TILE": g_tile, "GROUP_BLOCK": group_block}
    kind = {"COMPUTE": tl.float64 if compute == torch.float64 else tl.float32}

    def prepared(kernel: Any, most: int, constants: dict[str, Any]) -> tuple[launching.Prepared, int]:
        """most: chunks a row is cut into at most, each of whole tiles."""
        chunk = p_block * -(-pixels // (p_block * most))
        slices = -(-pixels // chunk)
        numbers = (pixels, chunk, slices, c_blocks)
        grid = rows * slices * c_blocks
        return launching.Prepared(kernel, grid, numbers, constants, {"num_warps": warps}, x.device), slices

    moments, slices = prepared(moments_kernel, SLICES, shape | last | {"SHIFT": shift} | kind)
    sums, _ = prepared(sums_kernel, SLICES, shape | last | {"SHIFT": shift, "SILU": silu} | kind)
    tiles = -(-pixels // p_block)
    normalize, _ = prepared(normalize_kernel, tiles, shape | {"SHIFT": shift, "SILU": silu} | kind)
    gradient, _ = prepared(gradient_kernel, tiles, shape | {"SHIFT": shift, "SILU": silu} | kind)
    return Plan(moments, normalize, sums, gradient, rows * slices * 2 * channels, compute)


def channels_last(x: torch.Tensor) -> torch.Tensor:
    """x with its pixels outside its channels in memory; itself if it lies so already."""
    return x.contiguous(memory_format=torch.channels_last)


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    shift: torch.Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y like x in channels-last, mean (N, groups), rstd (N, groups), means of the channels (N, channels))."""
    x, weight, bias = channels_last(x), weight.contiguous(), bias.contiguous()
    shift = None if shift is None else shift.contiguous()
    y = torch.empty_like(x, memory_format=torch.channels_last)
    rows, channels = x.shape[:2]
    plan = plan_of(x, weight, bias, shift, groups, silu)
    mean, rstd, means = (torch.empty((rows, n), dtype=plan.compute, device=x.device) for n in (groups, groups, channels))
    if x.numel() == 0:
        return y, mean, rstd, means
    partial = torch.empty(plan.scratch, dtype=plan.compute, device=x.device)
    semaphores = workspace.semaphores(rows, x.device)
    given = x if shift is None else shift
    plan.moments.launch((x, given, mean, rstd, means, partial, semaphores), (float(eps),))
    plan.normalize.launch((x, weight, bias, given, mean, rstd, y), ())
    return y, mean, rstd, means


def backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    shift: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    means: torch.Tensor,
    groups: int,
    silu: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dx like x in channels-last, dweight, dbias (channels,) and dshift (N, channels) in their dtypes).

    Without a shift, dshift is empty."""
    dy, x = channels_last(dy.to(x.dtype)), channels_last(x)
    weight, bias = weight.contiguous(), bias.contiguous()
    shift = None if shift is None else shift.contiguous()
    dx = torch.empty_like(x, memory_format=torch.channels_last)
    rows, channels = x.shape[:2]
    plan = plan_of(x, weight, bias, shift, groups, silu)
    if x.numel() == 0:
        dshift = x.new_empty(0) if shift is None else torch.zeros_like(shift)
        return dx, torch.zeros_like(weight), torch.zeros_like(bias), dshift
    sums = torch.empty((rows, 2, channels), dtype=plan.compute, device=x.device)
    of_groups = torch.empty((rows, 2, groups), dtype=plan.compute, device=x.device)
    dshift = x.new_empty(0) if shift is None else torch.empty((rows, channels), dtype=plan.compute, device=x.device)
    partial = torch.empty(plan.scratch, dtype=plan.compute, device=x.device)
    semaphores = workspace.semaphores(rows, x.device)
    given = x if shift is None else shift
    plan.sums.launch(
        (x, dy, weight, bias, given, mean, rstd, means, sums, of_groups, sums if shift is None else dshift, partial, semaphores),
        (),
    )
    plan.gradient.launch((x, dy, weight, bias, given, mean, rstd, of_groups, dx), ())
    dbias, dweight = sums.sum(0)
    return dx, dweight.to(weight.dtype), dbias.to(bias.dtype), dshift if shift is None else dshift.to(shift.dtype)
