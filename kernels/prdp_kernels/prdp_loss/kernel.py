"""The PRDP loss of all groups, its gradient and its statistics, in one launch or, for large groups, in three.

    lr = log_prob - ref,  delta = log_prob - old,  excess = delta - clip(delta, -eps, eps)
    d, dr = differences of mean_t(lr) and of the rewards,  shift = -(differences of mean_t(excess)),  u = d - dr / beta
    error = u, or u + shift where shift (2 u + shift) > 0;  loss = mean over groups of the mean over pairs dr > 0 of error^2
    grad[i, t] = sum over j of 2 error_ij / (groups pairs T), unclipped errors for every t, clipped ones for steps inside the clip

A group that fits two tiles is one program's: sums over time, pairs, gradient. The program that arrives last adds up all groups.

A larger group would keep one program busy while the others wait. Its work is spread over launches instead, and the boundary
between two launches does what a semaphore a group did:

1. sums: a program a slice of the steps leaves, of each image, its sums over time;
2. pairs: a program of eight images adds up the slices, goes over its images' pairs, and leaves for each image the two numbers
   that its gradient is made of. The last program adds up all of them;
3. gradient: elementwise, from these two numbers and whether the step is outside the clip. Through autograd this launch is the
   backward, with the upstream gradient folded in: the forward then writes nothing of the size of its inputs.

The gradient needs no pass over the pairs of its own: u and shift change sign with (i, j), the choice between them does not, so
that error_ji = -error_ij, and image i's share of pair (j, i) is what its row says anyway.

Bytes moved a step: 12 read, and with the gradient 4 written. In two tiles and in three launches the gradient looks at log_prob
and old once more, 8 bytes, which find the cache if all groups fit it.

Where float64 is needed. lr and delta are differences of numbers that may be 4e4 and agree to many digits; the clip compares delta
with 1e-6, and a step on its edge must be seen to be there: the differences and their sums over time are float64. At beta 1e-5, u
is near 1e5 and shift near 1e-6, so that a branch is decided on the eleventh digit: all of the pairs is float64. All else is not.
Counts are int32, and the gradient of a step is one of two numbers of its image, each rounded once to the dtype of the result: a
step costs a select and no float64. What float64 costs on a data-centre GPU is conversions (a quarter of a thread's rate or less)
and divisions; there is one division a program left, and three an image.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from prdp_kernels import launch as launching
from prdp_kernels import layout, workspace
from prdp_kernels.tile import fma

COLUMNS = tl.constexpr(16)  # numbers a program leaves for the loss and the statistics, nine in use
OTHERS = tl.constexpr(16)  # images j that one turn of the loop over pairs looks at
ROWS = tl.constexpr(64)  # programs that one turn of the last loop adds up


@triton.jit
def read_rewards(reward_ptr, group, images, image):
    """(reward, kept): a non-finite reward removes its image, and reads as 0."""
    reward = tl.load(reward_ptr + group * images + image, mask=image < images, other=0.0).to(tl.float64)
    kept = (image < images) & (tl.abs(reward) < float("inf"))  # false for NaN too
    return tl.where(kept, reward, 0.0), kept


@triton.jit
def quotient(x, y, inverse):
    """x / y from inverse = 1 / y, to half an ulp or next to it: three operations where a division takes thirty."""
    q = x * inverse
    y = tl.full(x.shape, y, tl.float64)
    return fma(fma(-q, y, x), tl.full(x.shape, inverse, tl.float64), q)


@triton.jit
def is_clipped(delta, clip):
    """Whether a step is outside the clip, which both edges are not. NaN is not: it stays visible in loss and gradient."""
    return tl.abs(delta) > clip


@triton.jit
def excess_of(delta, clip):
    """What of a step lies beyond the clip. NaN minus anything is NaN."""
    return delta - tl.minimum(tl.maximum(delta, -clip), clip)


@triton.jit
def weight_of(groups, all_pairs):
    """Of a pair in the loss, from the pairs of its group."""
    return 1.0 / (groups * tl.maximum(all_pairs, 1.0))


@triton.jit
def of_pairs(
    reward, kept, log_ratio, excess, other_reward, other_kept, other_log_ratio, other_excess, kl_weight, inverse_kl_weight
):
    """Of images i (rows) and j (columns), summed over j: (slope through every step, slope through steps inside the clip, squared
    errors, targets, counts). Slopes are of all pairs, the rest of those that i wins.

    counts holds four, none of which outgrows its bits with 128 images: from bit 0 the pairs, from 7 those that take the clipped
    branch, from 14 twice the pairs in the right order (d = 0 counts half), from 22 those whose d is NaN."""
    d = log_ratio[:, None] - other_log_ratio[None, :]
    difference = reward[:, None] - other_reward[None, :]
    target = quotient(difference, kl_weight, inverse_kl_weight)
    shift = other_excess[None, :] - excess[:, None]
    u = d - target
    clipped = (shift * (2 * u + shift) <= 0) == 0  # NaN takes the branch that shows it
    error = tl.where(clipped, u + shift, u)
    both = kept[:, None] & other_kept[None, :]
    slope = tl.where(both & (difference != 0), error, 0.0)
    pair = both & (difference > 0)
    counts = tl.where(clipped, 1 + (1 << 7), 1) + tl.where(d > 0, 2 << 14, tl.where(d == 0, 1 << 14, 0))
    counts = tl.where(pair, counts + tl.where(d != d, 1 << 22, 0), 0)
    return (
        tl.sum(tl.where(clipped, 0.0, slope), 1), tl.sum(tl.where(clipped, slope, 0.0), 1),
        tl.sum(tl.where(pair, error * error, 0.0), 1), tl.sum(tl.where(pair, target, 0.0), 1), tl.sum(counts, 1),
    )  # fmt: skip


@triton.jit
def gradients_of(through_all, through_inside, weight, count, dtype: tl.constexpr):
    """(gradient of a step outside the clip, of one inside) of each image, each rounded once to the dtype of the loss."""
    slope = 2 * weight / count
    return (through_all * slope).to(dtype), (through_all * slope + through_inside * slope).to(dtype)


@triton.jit
def add_up(
    squares, targets, counts, weight, without_pair, removed, outside, log_ratio, loss_ptr, stats_ptr, sums_ptr, semaphore_ptr,
    number, numbers, all_images, steps, STATS: tl.constexpr,
):  # fmt: skip
    """Loss and statistics of all programs, by the one that arrives last; `number` of `numbers` leaves a row of numbers for it.

    Of the program's images: squares, targets, counts as `of_pairs` gives them, removed (bool), outside (int32), log_ratio. Of
    its group: weight, of a pair in the loss; without_pair, which one program of the group says."""
    dtype: tl.constexpr = loss_ptr.dtype.element_ty
    # By one reduction over the images.
    column = tl.arange(0, COLUMNS)
    of_image = column[None, :]
    table = tl.where(of_image == 0, squares[:, None], 0.0)
    if STATS:
        right = tl.where((counts >> 22) > 0, float("nan"), 0.5 * ((counts >> 14) & 255).to(tl.float64))
        table = tl.where(of_image == 1, (counts & 127).to(tl.float64)[:, None], table)
        table = tl.where(of_image == 3, removed.to(tl.float64)[:, None], table)
        table = tl.where(of_image == 4, outside.to(tl.float64)[:, None], table)
        table = tl.where(of_image == 5, ((counts >> 7) & 127).to(tl.float64)[:, None], table)
        table = tl.where(of_image == 6, log_ratio[:, None], table)
        table = tl.where(of_image == 7, right[:, None], table)
        table = tl.where(of_image == 8, targets[:, None], table)
    row = tl.sum(table, 0)
    row = tl.where(column == 0, row * weight, tl.where(column == 2, without_pair.to(tl.float64), row))
    tl.store(sums_ptr + number * COLUMNS + column, row)
    # The last to finish adds all of them up, in the order of their place.
    tl.debug_barrier()
    arrived = tl.atomic_add(semaphore_ptr, 1, sem="acq_rel", scope="gpu")
    if arrived == numbers - 1:
        totals = tl.zeros((COLUMNS,), tl.float64)
        for first in range(0, numbers, ROWS):
            at = first + tl.arange(0, ROWS)[:, None]
            # .cg: from L2, where the other programs' stores are, past an L1 that may be stale
            rows_of = sums_ptr + at * COLUMNS + column[None, :]
            totals += tl.sum(tl.load(rows_of, mask=at < numbers, other=0.0, cache_modifier=".cg"), 0)
        tl.store(semaphore_ptr, 0)
        every_pair = tl.maximum(tl.sum(tl.where(column == 1, totals, 0.0)), 1.0)
        every_image = tl.maximum(all_images - tl.sum(tl.where(column == 3, totals, 0.0)), 1.0)
        of = tl.where((column == 5) | (column == 7) | (column == 8), every_pair, 1.0)
        of = tl.where(column == 6, every_image, tl.where(column == 4, every_image * steps, of))
        values = (totals / of).to(dtype)
        tl.store(loss_ptr + column, values, mask=column == 0)
        if STATS:
            tl.store(stats_ptr + column - 1, values, mask=(column > 0) & (column < 9))


@triton.jit(do_not_specialize=["groups", "images"])
def prdp_loss_kernel(
    log_probs_ptr,  # (groups, images, steps) any float
    old_ptr,  # (groups, images, steps)
    ref_ptr,  # (groups, images, steps)
    reward_ptr,  # (groups, images) any float; a non-finite one removes its image
    loss_ptr,  # out () float32 or float64
    grad_ptr,  # out (groups, images, steps) in the dtype of the loss; unused without GRAD
    stats_ptr,  # out (8,); unused without GRAD
    scratch_ptr,  # float64: sums (groups, COLUMNS), means (groups, 2, images)
    semaphore_ptr,  # scratch (1,) int32 zero
    clip_range: tl.float64,
    kl_weight: tl.float64,
    groups, images, units,
    UNIT: tl.constexpr, B_BLOCK: tl.constexpr, T_BLOCK: tl.constexpr, GRAD: tl.constexpr, ONE_TILE: tl.constexpr,
):  # fmt: skip
    """A program a group, all of it. GRAD: the gradient and the statistics too."""
    steps = units * UNIT  # says that rows begin at multiples of UNIT numbers, which decides how wide the loads are
    group = tl.program_id(0)
    base = group.to(tl.int64) * images * steps
    clip = tl.full((), clip_range, tl.float64)
    kl_weight = tl.full((), kl_weight, tl.float64)
    dtype: tl.constexpr = loss_ptr.dtype.element_ty
    image = tl.arange(0, B_BLOCK)

    # Sums over the steps: of the log-ratio, of its excess over the clip, and of the steps outside it.
    log_ratios = tl.zeros((B_BLOCK, T_BLOCK), tl.float64)
    excesses = tl.zeros((B_BLOCK, T_BLOCK), tl.float64)
    outsides = tl.zeros((B_BLOCK, T_BLOCK), tl.int32)
    is_outside = tl.zeros((B_BLOCK, T_BLOCK), tl.int1)
    for start in range(0, steps, T_BLOCK):
        step = start + tl.arange(0, T_BLOCK)[None, :]
        at = base + image[:, None].to(tl.int64) * steps + step
        mask = (image < images)[:, None] & (step < steps)
        log_prob = tl.load(log_probs_ptr + at, mask=mask, other=0.0).to(tl.float64)
        delta = log_prob - tl.load(old_ptr + at, mask=mask, other=0.0).to(tl.float64)
        log_ratios += log_prob - tl.load(ref_ptr + at, mask=mask, other=0.0).to(tl.float64)
        excesses += excess_of(delta, clip)
        is_outside = is_clipped(delta, clip)
        outsides += is_outside.to(tl.int32)

    reward, kept = read_rewards(reward_ptr, group, images, image)
    count = tl.full((), steps, tl.float64)
    # A removed image may hold anything; its means read as 0.
    log_ratio = tl.where(kept, tl.sum(log_ratios, 1) / count, 0.0)
    excess = tl.where(kept, tl.sum(excesses, 1) / count, 0.0)
    outside = tl.where(kept, tl.sum(outsides, 1), 0)
    inverse_kl_weight = 1.0 / kl_weight
    if B_BLOCK <= OTHERS:
        through_all, through_inside, squares, targets, counts = of_pairs(
            reward, kept, log_ratio, excess, reward, kept, log_ratio, excess, kl_weight, inverse_kl_weight
        )
    else:
        # OTHERS columns at a time: the means change sides through memory, so that any group fits the registers.
        means_ptr = scratch_ptr + groups.to(tl.int64) * COLUMNS + group.to(tl.int64) * 2 * images
        tl.store(means_ptr + image, log_ratio, mask=image < images)
        tl.store(means_ptr + images + image, excess, mask=image < images)
        tl.debug_barrier()
        through_all = tl.zeros((B_BLOCK,), tl.float64)
        through_inside = tl.zeros((B_BLOCK,), tl.float64)
        squares = tl.zeros((B_BLOCK,), tl.float64)
        targets = tl.zeros((B_BLOCK,), tl.float64)
        counts = tl.zeros((B_BLOCK,), tl.int32)
        for first in range(0, images, OTHERS):
            other = first + tl.arange(0, OTHERS)
            other_reward, other_kept = read_rewards(reward_ptr, group, images, other)
            other_log_ratio = tl.load(means_ptr + other, mask=other < images, other=0.0)
            other_excess = tl.load(means_ptr + images + other, mask=other < images, other=0.0)
            more = of_pairs(
                reward, kept, log_ratio, excess, other_reward, other_kept, other_log_ratio, other_excess, kl_weight,
                inverse_kl_weight,
            )  # fmt: skip
            through_all += more[0]
            through_inside += more[1]
            squares += more[2]
            targets += more[3]
            counts += more[4]

    all_pairs = tl.sum((counts & 127).to(tl.float64))
    weight = weight_of(groups, all_pairs)
    if GRAD:
        at_outside, at_inside = gradients_of(through_all, through_inside, weight, count, dtype)
        if ONE_TILE:
            step = tl.arange(0, T_BLOCK)[None, :]
            at = base + image[:, None].to(tl.int64) * steps + step
            exists = (image < images)[:, None] & (step < steps)
            tl.store(grad_ptr + at, tl.where(is_outside, at_outside[:, None], at_inside[:, None]), mask=exists)
        else:
            for start in range(0, steps, T_BLOCK):
                step = start + tl.arange(0, T_BLOCK)[None, :]
                at = base + image[:, None].to(tl.int64) * steps + step
                exists = (image < images)[:, None] & (step < steps)
                delta = tl.load(log_probs_ptr + at, mask=exists, other=0.0).to(tl.float64)
                delta -= tl.load(old_ptr + at, mask=exists, other=0.0).to(tl.float64)
                grad = tl.where(is_clipped(delta, clip), at_outside[:, None], at_inside[:, None])
                tl.store(grad_ptr + at, grad, mask=exists)

    removed = (image < images) & (kept == 0)
    add_up(
        squares, targets, counts, weight, all_pairs == 0, removed, outside, log_ratio, loss_ptr, stats_ptr, scratch_ptr,
        semaphore_ptr, group, groups, groups * images, count, GRAD,
    )  # fmt: skip


@triton.jit(do_not_specialize=["images", "slices", "tiles"])
def prdp_loss_sums_kernel(
    log_probs_ptr,  # (groups, images, steps) any float
    old_ptr,  # (groups, images, steps)
    ref_ptr,  # (groups, images, steps)
    partial_ptr,  # out (groups, 3, slices, B_BLOCK) float64: sums of log-ratios, of excesses, of clipped steps
    clip_range: tl.float64,
    images, units, slices, tiles,
    UNIT: tl.constexpr, B_BLOCK: tl.constexpr, T_BLOCK: tl.constexpr, STATS: tl.constexpr,
):  # fmt: skip
    """A program a slice of a group's steps, `tiles` tiles. The number of clipped steps is for the statistics alone."""
    steps = units * UNIT
    group, slice_ = (tl.program_id(0) // slices).to(tl.int64), tl.program_id(0) % slices
    clip = tl.full((), clip_range, tl.float64)
    image = tl.arange(0, B_BLOCK)
    # Each tile is summed by itself: few programs have two, and sums of whole tiles would take registers that others need to load.
    log_ratio = tl.zeros((B_BLOCK,), tl.float64)
    excess = tl.zeros((B_BLOCK,), tl.float64)
    outside = tl.zeros((B_BLOCK,), tl.int32)
    first = slice_ * tiles * T_BLOCK
    for start in range(first, tl.minimum(first + tiles * T_BLOCK, steps), T_BLOCK):
        step = start + tl.arange(0, T_BLOCK)[None, :]
        at = group * images * steps + image[:, None].to(tl.int64) * steps + step
        mask = (image < images)[:, None] & (step < steps)
        log_prob = tl.load(log_probs_ptr + at, mask=mask, other=0.0).to(tl.float64)
        delta = log_prob - tl.load(old_ptr + at, mask=mask, other=0.0).to(tl.float64)
        log_ratio += tl.sum(log_prob - tl.load(ref_ptr + at, mask=mask, other=0.0).to(tl.float64), 1)
        excess += tl.sum(excess_of(delta, clip), 1)
        outside += tl.sum(is_clipped(delta, clip).to(tl.int32), 1)
    partial_ptr += (group * 3 * slices + slice_) * B_BLOCK
    tl.store(partial_ptr + image, log_ratio)
    tl.store(partial_ptr + slices * B_BLOCK + image, excess)
    if STATS:
        tl.store(partial_ptr + 2 * slices * B_BLOCK + image, outside.to(tl.float64))


@triton.jit
def sum_of_slices(partial_ptr, image, slices, B_BLOCK: tl.constexpr, S_BLOCK: tl.constexpr):
    """Of each image, its sums of all slices added up, in an order that the sizes alone decide."""
    total = tl.zeros(image.shape, tl.float64)
    for start in range(0, slices, S_BLOCK):
        at = start + tl.arange(0, S_BLOCK)[:, None]
        mask = (at < slices) & (image < B_BLOCK)[None, :]
        total += tl.sum(tl.load(partial_ptr + at * B_BLOCK + image[None, :], mask=mask, other=0.0), 0)
    return total


@triton.jit(do_not_specialize=["groups", "images", "steps", "slices", "blocks"])
def prdp_loss_pairs_kernel(
    reward_ptr,  # (groups, images) any float
    partial_ptr,  # (groups, 3, slices, B_BLOCK) float64, and behind them scratch: sums (groups, blocks, COLUMNS)
    loss_ptr,  # out () float32 or float64
    slopes_ptr,  # out (groups, images, 2) in the dtype of the loss: the gradient of a step outside the clip, and inside
    stats_ptr,  # out (8,); unused without STATS
    semaphore_ptr,  # scratch (1,) int32 zero
    kl_weight: tl.float64,
    groups, images, steps, slices, blocks,
    B_BLOCK: tl.constexpr, I_BLOCK: tl.constexpr, S_BLOCK: tl.constexpr, STATS: tl.constexpr,
):  # fmt: skip
    """A program I_BLOCK images i of a group, against all its images j."""
    group, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    kl_weight = tl.full((), kl_weight, tl.float64)
    image, other = block * I_BLOCK + tl.arange(0, I_BLOCK), tl.arange(0, B_BLOCK)
    reward, kept = read_rewards(reward_ptr, group, images, image)
    other_reward, other_kept = read_rewards(reward_ptr, group, images, other)
    sums_ptr = partial_ptr + groups.to(tl.int64) * 3 * slices * B_BLOCK
    partial_ptr += group.to(tl.int64) * 3 * slices * B_BLOCK
    count = tl.full((), steps, tl.float64)
    log_ratios = sum_of_slices(partial_ptr, other, slices, B_BLOCK, S_BLOCK)
    excesses = sum_of_slices(partial_ptr + slices * B_BLOCK, other, slices, B_BLOCK, S_BLOCK)
    other_log_ratio = tl.where(other_kept, log_ratios / count, 0.0)
    other_excess = tl.where(other_kept, excesses / count, 0.0)
    # Taken from the others, not added up again: an image has one mean, or equal images would be none.
    is_image = image[:, None] == other[None, :]
    log_ratio = tl.sum(tl.where(is_image, other_log_ratio[None, :], 0.0), 1)
    excess = tl.sum(tl.where(is_image, other_excess[None, :], 0.0), 1)
    outside = tl.zeros((I_BLOCK,), tl.int32)
    if STATS:
        outside = sum_of_slices(partial_ptr + 2 * slices * B_BLOCK, image, slices, B_BLOCK, S_BLOCK).to(tl.int32)
        outside = tl.where(kept, outside, 0)

    through_all, through_inside, squares, targets, counts = of_pairs(
        reward, kept, log_ratio, excess, other_reward, other_kept, other_log_ratio, other_excess, kl_weight, 1.0 / kl_weight
    )
    wins = tl.zeros((B_BLOCK,), tl.int32)  # all pairs of the group, some images i at a time
    for first in range(0, B_BLOCK, 4096 // B_BLOCK):
        winner, is_winner = read_rewards(reward_ptr, group, images, first + tl.arange(0, min(4096 // B_BLOCK, B_BLOCK)))
        wins += tl.sum(((winner[:, None] > other_reward[None, :]) & is_winner[:, None] & other_kept[None, :]).to(tl.int32), 0)
    all_pairs = tl.sum(wins).to(tl.float64)
    weight = weight_of(groups, all_pairs)
    at_outside, at_inside = gradients_of(through_all, through_inside, weight, count, loss_ptr.dtype.element_ty)
    slopes_ptr += 2 * (group.to(tl.int64) * images + image)
    tl.store(slopes_ptr, at_outside, mask=image < images)
    tl.store(slopes_ptr + 1, at_inside, mask=image < images)
    removed = (image < images) & (kept == 0)
    add_up(
        squares, targets, counts, weight, (all_pairs == 0) & (block == 0), removed, outside, log_ratio, loss_ptr, stats_ptr,
        sums_ptr, semaphore_ptr, tl.program_id(0), groups * blocks, groups * images, count, STATS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["cuts"])
def prdp_loss_grad_kernel(
    log_probs_ptr,  # (rows, steps) any float
    old_ptr,  # (rows, steps)
    slopes_ptr,  # (rows, 2) float32 or float64
    upstream_ptr,  # () in their dtype; unused without SCALED
    grad_ptr,  # out (rows, steps) any float
    clip_range: tl.float64,
    units, cuts,
    UNIT: tl.constexpr, T_BLOCK: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """A program T_BLOCK steps of an image. Rounded as `upstream * gradient` is, and then to the dtype of grad_ptr."""
    steps = units * UNIT
    row = (tl.program_id(0) // cuts).to(tl.int64)
    step = (tl.program_id(0) % cuts) * T_BLOCK + tl.arange(0, T_BLOCK)
    mask = step < steps
    clip = tl.full((), clip_range, tl.float64)
    delta = tl.load(log_probs_ptr + row * steps + step, mask=mask, other=0.0).to(tl.float64)
    delta -= tl.load(old_ptr + row * steps + step, mask=mask, other=0.0).to(tl.float64)
    at_outside, at_inside = tl.load(slopes_ptr + 2 * row), tl.load(slopes_ptr + 2 * row + 1)
    if SCALED:
        upstream = tl.load(upstream_ptr)
        at_outside, at_inside = upstream * at_outside, upstream * at_inside
    grad = tl.where(is_clipped(delta, clip), at_outside, at_inside)
    tl.store(grad_ptr + row * steps + step, grad.to(grad_ptr.dtype.element_ty), mask=mask)


ELEMENTS = 2048  # steps times images of a tile
TILES = 2  # of a group that is one program's
SLICES = 32  # programs that add up the steps of a larger group, at most
IMAGES = 8  # of a program that goes over pairs
STEPS = 1024  # of a program that writes the gradient

Result = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


class Plan(NamedTuple):
    """What `launch` needs of a call that depends on metadata alone."""

    prepared: tuple[launching.Prepared, ...]  # one launch, or sums, pairs and, if wanted, the gradient
    scratch: int  # float64 numbers
    want_grad: bool  # and statistics
    dtype: torch.dtype
    device: torch.device
    contiguous: bool


class GradPlan(NamedTuple):
    """The same of `launch_grad`."""

    prepared: launching.Prepared
    contiguous: bool


def tiling(images: int, steps: int) -> tuple[int, int, int]:
    """(B_BLOCK, T_BLOCK, tiles) of a group: of its size and nothing else, so that a group has the same bits in every batch."""
    b_block = max(1 << (images - 1).bit_length(), 2)
    t_block = max(min(ELEMENTS // b_block, 1 << (steps - 1).bit_length()), 8)
    return b_block, t_block, -(-steps // t_block)


def launch(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    ref_log_probs: torch.Tensor,
    rewards: torch.Tensor,
    clip_range: float,
    kl_weight: float,
    *,
    want: str = "all",
) -> Result:
    """(loss (), grad (G, B, T), stats (8,), slopes (G, B, 2)), with None for what is not there.

    want: "loss"; "all", the gradient too, and the statistics in the order of `reference.STATS`; or "backward", which gives the
    gradient or, where that is a launch of its own, the slopes that `launch_grad` writes it from."""
    tensors = (log_probs, old_log_probs, ref_log_probs, rewards)
    key = launching.key_of("prdp_loss", (want,), tensors)
    plan = launching.PLANS.get(key)
    if plan is None:
        plan = launching.PLANS[key] = make_plan(tensors, want)
    return run(plan, tensors, clip_range, kl_weight)


def make_plan(tensors: tuple[torch.Tensor, ...], want: str) -> Plan:
    groups, images, steps = tensors[0].shape
    b_block, t_block, tiles = tiling(images, steps)
    unit = math.gcd(steps, 4)
    dtype, device = layout.result_dtype(*tensors), tensors[0].device
    contiguous = all(t.is_contiguous() for t in tensors)
    # Left to itself, ptxas spills a word of some variants to fit twice the programs on a multiprocessor.
    options = {"num_warps": 8 if b_block * t_block > 512 else 4, "maxnreg": 255}
    if tiles <= TILES:
        whole = launching.Prepared(
            prdp_loss_kernel,
            groups,
            (groups, images, steps // unit),
            {"UNIT": unit, "B_BLOCK": b_block, "T_BLOCK": t_block, "GRAD": want != "loss", "ONE_TILE": tiles == 1},
            options,
            device,
        )
        return Plan((whole,), groups * (COLUMNS.value + 2 * images), want != "loss", dtype, device, contiguous)
    of_slice = -(-tiles // SLICES)
    slices = -(-tiles // of_slice)
    sums = launching.Prepared(
        prdp_loss_sums_kernel,
        groups * slices,
        (images, steps // unit, slices, of_slice),
        {"UNIT": unit, "B_BLOCK": b_block, "T_BLOCK": t_block, "STATS": want == "all"},
        options,
        device,
    )
    i_block = min(IMAGES, b_block)
    blocks = -(-images // i_block)
    pairs = launching.Prepared(
        prdp_loss_pairs_kernel,
        groups * blocks,
        (groups, images, steps, slices, blocks),
        {
            "B_BLOCK": b_block, "I_BLOCK": i_block, "S_BLOCK": min(ELEMENTS // b_block, 1 << (slices - 1).bit_length()),
            "STATS": want == "all",
        },
        {"num_warps": 8 if b_block >= 64 else 4, "maxnreg": 255},
        device,
    )  # fmt: skip
    gradient = (prepare_grad(tensors[0], scaled=False),) if want == "all" else ()
    scratch = groups * (3 * slices * b_block + blocks * COLUMNS.value)
    return Plan((sums, pairs, *gradient), scratch, want == "all", dtype, device, contiguous)


def prepare_grad(log_probs: torch.Tensor, *, scaled: bool) -> launching.Prepared:
    groups, images, steps = log_probs.shape
    unit = math.gcd(steps, 4)
    t_block = min(STEPS, 1 << (steps - 1).bit_length())
    cuts = -(-steps // t_block)
    return launching.Prepared(
        prdp_loss_grad_kernel,
        groups * images * cuts,
        (steps // unit, cuts),
        {"UNIT": unit, "T_BLOCK": t_block, "SCALED": scaled},
        {"num_warps": max(1, t_block // 256)},
        log_probs.device,
    )


def run(plan: Plan, tensors: tuple[Any, ...], clip_range: float, kl_weight: float) -> Result:
    """The launches themselves. tensors: as they were given."""
    dtype, device, shape = plan.dtype, plan.device, tensors[0].shape
    clip_range, kl_weight = float(clip_range), float(kl_weight)
    loss = torch.empty((), dtype=dtype, device=device)
    grad = torch.empty(shape, dtype=dtype, device=device) if plan.want_grad else None
    stats = torch.empty(8, dtype=dtype, device=device) if plan.want_grad else None
    scratch = torch.empty(plan.scratch, dtype=torch.float64, device=device)
    if not plan.contiguous:
        tensors = tuple([t.contiguous() for t in tensors])
    semaphores = workspace.semaphores(1, device)
    unused = loss  # stands where nothing is written
    stats_or = unused if stats is None else stats
    if len(plan.prepared) == 1:
        plan.prepared[0].launch(
            (*tensors, loss, unused if grad is None else grad, stats_or, scratch, semaphores), (clip_range, kl_weight)
        )
        return loss, grad, stats, None
    log_probs, old, ref, rewards = tensors
    slopes = torch.empty((shape[0], shape[1], 2), dtype=dtype, device=device)
    sums, pairs, *gradient = plan.prepared
    sums.launch((log_probs, old, ref, scratch), (clip_range,))
    pairs.launch((rewards, scratch, loss, slopes, stats_or, semaphores), (kl_weight,))
    for prepared in gradient:
        prepared.launch((log_probs, old, slopes, unused, grad), (clip_range,))
    return loss, grad, stats, slopes


def launch_grad(
    log_probs: torch.Tensor, old_log_probs: torch.Tensor, slopes: torch.Tensor, upstream: torch.Tensor, clip_range: float
) -> torch.Tensor:
    """upstream times the gradient of the loss, like log_probs, from the slopes that `launch` returned."""
    tensors = (log_probs, old_log_probs, slopes, upstream)
    key = launching.key_of("prdp_loss_grad", (), tensors)
    plan = launching.PLANS.get(key)
    if plan is None:
        contiguous = log_probs.is_contiguous() and old_log_probs.is_contiguous()
        plan = launching.PLANS[key] = GradPlan(prepare_grad(log_probs, scaled=True), contiguous)
    grad = torch.empty(log_probs.shape, dtype=log_probs.dtype, device=log_probs.device)
    if not plan.contiguous:
        log_probs, old_log_probs = log_probs.contiguous(), old_log_probs.contiguous()
    plan.prepared.launch((log_probs, old_log_probs, slopes, upstream, grad), (float(clip_range),))
    return grad
