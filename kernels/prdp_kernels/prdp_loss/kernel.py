"""The PRDP loss of all groups, its gradient and its statistics in one launch.

    lr = log_prob - ref,  delta = log_prob - old,  excess = delta - clip(delta, -eps, eps)
    d, dr = differences of mean_t(lr) and of the rewards,  shift = -(differences of mean_t(excess)),  u = d - dr / beta
    error = u, or u + shift where shift (2 u + shift) > 0;  loss = mean over groups of the mean over pairs dr > 0 of error^2
    grad[i, t] = sum over j of 2 error_ij / (groups pairs T), unclipped errors for every t, clipped ones for steps inside the clip

The steps of a group are split over programs when one tile or two do not hold them. Each leaves its sums over time; the program of
the group that arrives last adds them up, goes over the pairs and writes the gradient. The last group adds up all groups.

The gradient needs no pass over the pairs of its own: u and shift change sign with (i, j), the choice between them does not, so
that error_ji = -error_ij, and image i's share of pair (j, i) is what its row says anyway.

Bytes moved a step: 12 read, and with the gradient 4 written; where the gradient waits for other tiles, 4 more written and 4 read,
which find the cache (whether the step is outside the clip).

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

COLUMNS = tl.constexpr(16)  # numbers a group leaves for the loss and the statistics, nine in use
OTHERS = tl.constexpr(16)  # images j that one turn of the loop over pairs looks at
GROUPS = tl.constexpr(64)  # groups that one turn of the last loop adds up


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
def finish_group(
    log_ratios, excesses, outside, is_outside, reward_ptr, loss_ptr, grad_ptr, stats_ptr, means_ptr, sums_ptr,
    semaphore_ptr, kl_weight, group, groups, images, steps,
    GRAD: tl.constexpr, ONE_TILE: tl.constexpr, B_BLOCK: tl.constexpr, T_BLOCK: tl.constexpr,
):  # fmt: skip
    """Pairs, gradient and statistics of a group from its sums over time: log_ratios, excesses (B_BLOCK,) float64 and outside,
    the number of clipped steps. is_outside (B_BLOCK, T_BLOCK): which ones, if ONE_TILE; else grad_ptr holds 1 for them."""
    dtype: tl.constexpr = loss_ptr.dtype.element_ty
    image = tl.arange(0, B_BLOCK)
    reward, kept = read_rewards(reward_ptr, group, images, image)
    count = tl.full((), steps, tl.float64)
    # A removed image may hold anything; its means read as 0.
    log_ratio, excess = tl.where(kept, log_ratios / count, 0.0), tl.where(kept, excesses / count, 0.0)
    outside = tl.where(kept, outside, 0)
    inverse_kl_weight = 1.0 / kl_weight

    if B_BLOCK <= OTHERS:
        through_all, through_inside, squares, targets, counts = of_pairs(
            reward, kept, log_ratio, excess, reward, kept, log_ratio, excess, kl_weight, inverse_kl_weight
        )
    else:
        # OTHERS columns at a time: the means change sides through memory, so that any group fits the registers.
        means_ptr += group.to(tl.int64) * 2 * images
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

    pairs = (counts & 127).to(tl.float64)
    right = tl.where((counts >> 22) > 0, float("nan"), 0.5 * ((counts >> 14) & 255).to(tl.float64))
    all_pairs = tl.sum(pairs)
    weight = 1.0 / (groups * tl.maximum(all_pairs, 1.0))  # of a pair in the loss
    if GRAD:
        slope = 2 * weight / count
        at_outside = (through_all * slope).to(dtype)[:, None]
        at_inside = (through_all * slope + through_inside * slope).to(dtype)[:, None]
        grad_ptr += group.to(tl.int64) * images * steps
        if ONE_TILE:
            step = tl.arange(0, T_BLOCK)[None, :]
            at = image[:, None].to(tl.int64) * steps + step
            exists = (image < images)[:, None] & (step < steps)
            tl.store(grad_ptr + at, tl.where(is_outside, at_outside, at_inside), mask=exists)
        else:
            for start in range(0, steps, T_BLOCK):
                step = start + tl.arange(0, T_BLOCK)[None, :]
                at = image[:, None].to(tl.int64) * steps + step
                exists = (image < images)[:, None] & (step < steps)
                # .cg: from L2, where the other programs' stores are, past an L1 that may be stale
                flag = tl.load(grad_ptr + at, mask=exists, other=0.0, cache_modifier=".cg")
                tl.store(grad_ptr + at, tl.where(flag != 0, at_outside, at_inside), mask=exists)

    # A row of numbers of this group, by one reduction over its images.
    column = tl.arange(0, COLUMNS)
    of_image = column[None, :]
    table = tl.where(of_image == 0, squares[:, None], 0.0)
    table = tl.where(of_image == 1, pairs[:, None], table)
    table = tl.where(of_image == 3, ((image < images) & (kept == 0)).to(tl.float64)[:, None], table)
    table = tl.where(of_image == 4, outside.to(tl.float64)[:, None], table)
    table = tl.where(of_image == 5, ((counts >> 7) & 127).to(tl.float64)[:, None], table)
    table = tl.where(of_image == 6, log_ratio[:, None], table)
    table = tl.where(of_image == 7, right[:, None], table)
    table = tl.where(of_image == 8, targets[:, None], table)
    row = tl.sum(table, 0)
    row = tl.where(column == 0, row * weight, tl.where(column == 2, (all_pairs == 0).to(tl.float64), row))
    tl.store(sums_ptr + group * COLUMNS + column, row)
    # The last group to finish adds all of them up, in their order.
    tl.debug_barrier()
    arrived = tl.atomic_add(semaphore_ptr, 1, sem="acq_rel", scope="gpu")
    if arrived == groups - 1:
        totals = tl.zeros((COLUMNS,), tl.float64)
        for first in range(0, groups, GROUPS):
            number = first + tl.arange(0, GROUPS)[:, None]
            rows_of = sums_ptr + number * COLUMNS + column[None, :]
            totals += tl.sum(tl.load(rows_of, mask=number < groups, other=0.0, cache_modifier=".cg"), 0)
        tl.store(semaphore_ptr, 0)
        every_pair = tl.maximum(tl.sum(tl.where(column == 1, totals, 0.0)), 1.0)
        all_images = tl.maximum(groups * images - tl.sum(tl.where(column == 3, totals, 0.0)), 1.0)
        of = tl.where((column == 5) | (column == 7) | (column == 8), every_pair, 1.0)
        of = tl.where(column == 6, all_images, tl.where(column == 4, all_images * count, of))
        values = (totals / of).to(dtype)
        tl.store(loss_ptr + column, values, mask=column == 0)
        tl.store(stats_ptr + column - 1, values, mask=(column > 0) & (column < 9))


@triton.jit(do_not_specialize=["groups", "images", "slices", "tiles"])
def prdp_loss_kernel(
    log_probs_ptr,  # (groups, images, steps) any float
    old_ptr,  # (groups, images, steps)
    ref_ptr,  # (groups, images, steps)
    reward_ptr,  # (groups, images) any float; a non-finite one removes its image
    loss_ptr,  # out () float32 or float64
    grad_ptr,  # out (groups, images, steps) in the dtype of the loss; unused without GRAD
    stats_ptr,  # out (8,)
    scratch_ptr,  # float64: sums (groups, COLUMNS), means (groups, 2, images), and if SPLIT sums (groups, slices, 3, B_BLOCK)
    semaphore_ptr,  # scratch (1 + groups,) int32 zeros; one without SPLIT
    clip_range: tl.float64,
    kl_weight: tl.float64,
    groups, images, units, slices, tiles,
    UNIT: tl.constexpr, B_BLOCK: tl.constexpr, T_BLOCK: tl.constexpr,
    GRAD: tl.constexpr, ONE_TILE: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    steps = units * UNIT  # says that rows begin at multiples of UNIT numbers, which decides how wide the loads are
    group = tl.program_id(0) // slices
    base = group.to(tl.int64) * images * steps
    clip = tl.full((), clip_range, tl.float64)
    kl_weight = tl.full((), kl_weight, tl.float64)
    dtype: tl.constexpr = loss_ptr.dtype.element_ty
    image = tl.arange(0, B_BLOCK)
    sums_ptr = scratch_ptr
    means_ptr = scratch_ptr + groups.to(tl.int64) * COLUMNS

    # Sums over the steps of this program: of the log-ratio, of its excess over the clip, and of the steps outside it.
    log_ratios = tl.zeros((B_BLOCK, T_BLOCK), tl.float64)
    excesses = tl.zeros((B_BLOCK, T_BLOCK), tl.float64)
    outsides = tl.zeros((B_BLOCK, T_BLOCK), tl.int32)
    is_outside = tl.zeros((B_BLOCK, T_BLOCK), tl.int1)
    first = (tl.program_id(0) % slices) * tiles * T_BLOCK
    for start in range(first, tl.minimum(first + tiles * T_BLOCK, steps), T_BLOCK):
        step = start + tl.arange(0, T_BLOCK)[None, :]
        at = base + image[:, None].to(tl.int64) * steps + step
        mask = (image < images)[:, None] & (step < steps)
        log_prob = tl.load(log_probs_ptr + at, mask=mask, other=0.0).to(tl.float64)
        delta = log_prob - tl.load(old_ptr + at, mask=mask, other=0.0).to(tl.float64)
        log_ratios += log_prob - tl.load(ref_ptr + at, mask=mask, other=0.0).to(tl.float64)
        # NaN minus anything is NaN, and is not outside the clip: it stays visible in loss and gradient.
        excesses += delta - tl.minimum(tl.maximum(delta, -clip), clip)
        is_outside = tl.abs(delta) > clip
        outsides += is_outside.to(tl.int32)
        if GRAD and not ONE_TILE:
            tl.store(grad_ptr + at, is_outside.to(tl.float32).to(dtype), mask=mask)
    log_ratio, excess, outside = tl.sum(log_ratios, 1), tl.sum(excesses, 1), tl.sum(outsides, 1)

    if SPLIT:
        partial_ptr = means_ptr + groups.to(tl.int64) * 2 * images + group.to(tl.int64) * slices * 3 * B_BLOCK
        mine = partial_ptr + (tl.program_id(0) % slices) * 3 * B_BLOCK
        tl.store(mine + image, log_ratio)
        tl.store(mine + B_BLOCK + image, excess)
        tl.store(mine + 2 * B_BLOCK + image, outside.to(tl.float64))
        tl.debug_barrier()
        arrived = tl.atomic_add(semaphore_ptr + 1 + group, 1, sem="acq_rel", scope="gpu")
        if arrived == slices - 1:
            tl.store(semaphore_ptr + 1 + group, 0)
            log_ratio = tl.zeros((B_BLOCK,), tl.float64)
            excess = tl.zeros((B_BLOCK,), tl.float64)
            outside = tl.zeros((B_BLOCK,), tl.int32)
            for number in range(slices):  # in the order of the steps, whatever came last
                theirs = partial_ptr + number * 3 * B_BLOCK + image
                log_ratio += tl.load(theirs, cache_modifier=".cg")
                excess += tl.load(theirs + B_BLOCK, cache_modifier=".cg")
                outside += tl.load(theirs + 2 * B_BLOCK, cache_modifier=".cg").to(tl.int32)
            finish_group(
                log_ratio, excess, outside, is_outside, reward_ptr, loss_ptr, grad_ptr, stats_ptr, means_ptr,
                sums_ptr, semaphore_ptr, kl_weight, group, groups, images, steps, GRAD, ONE_TILE, B_BLOCK, T_BLOCK,
            )  # fmt: skip
    else:
        if GRAD and not ONE_TILE:
            tl.debug_barrier()  # what one thread wrote of a step, another may read
        finish_group(
            log_ratio, excess, outside, is_outside, reward_ptr, loss_ptr, grad_ptr, stats_ptr, means_ptr,
            sums_ptr, semaphore_ptr, kl_weight, group, groups, images, steps, GRAD, ONE_TILE, B_BLOCK, T_BLOCK,
        )  # fmt: skip


ELEMENTS = 2048  # steps times images of a tile
SLICES = 16  # programs of a group at most, each of at least two tiles


class Plan(NamedTuple):
    """What `launch` needs of a call that depends on metadata alone."""

    prepared: launching.Prepared
    scratch: int  # float64 numbers
    semaphores: int
    dtype: torch.dtype
    contiguous: bool


def launch(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    ref_log_probs: torch.Tensor,
    rewards: torch.Tensor,
    clip_range: float,
    kl_weight: float,
    *,
    want_grad: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """(loss (), grad (G, B, T) if wanted, stats (8,)), the last in the order of `reference.STATS`."""
    tensors = (log_probs, old_log_probs, ref_log_probs, rewards)
    key = launching.key_of("prdp_loss", (want_grad,), tensors)
    plan = launching.PLANS.get(key)
    if plan is None:
        plan = launching.PLANS[key] = make_plan(tensors, want_grad)
    return run(plan, tensors, clip_range, kl_weight, want_grad)


def make_plan(tensors: tuple[torch.Tensor, ...], want_grad: bool) -> Plan:
    groups, images, steps = tensors[0].shape
    b_block = max(1 << (images - 1).bit_length(), 2)
    t_block = max(min(ELEMENTS // b_block, 1 << (steps - 1).bit_length()), 8)
    tiles = -(-steps // t_block)  # of a program: all, if there are no more than two; else at least two
    if tiles > 2:
        tiles = max(2, -(-tiles // SLICES))
    slices = -(-steps // (tiles * t_block))
    unit = math.gcd(steps, 4)
    prepared = launching.Prepared(
        prdp_loss_kernel,
        groups * slices,
        (groups, images, steps // unit, slices, tiles),
        {
            "UNIT": unit, "B_BLOCK": b_block, "T_BLOCK": t_block,
            "GRAD": want_grad, "ONE_TILE": steps <= t_block, "SPLIT": slices > 1,
        },
        # Left to itself, ptxas spills a word of some variants to fit twice the programs on a multiprocessor.
        {"num_warps": 8 if b_block * t_block > 512 else 4, "maxnreg": 255},
        tensors[0].device,
    )  # fmt: skip
    scratch = groups * (COLUMNS.value + 2 * images + (slices * 3 * b_block if slices > 1 else 0))
    contiguous = all(t.is_contiguous() for t in tensors)
    return Plan(prepared, scratch, 1 + groups if slices > 1 else 1, layout.result_dtype(*tensors), contiguous)


def run(
    plan: Plan, tensors: tuple[Any, ...], clip_range: float, kl_weight: float, want_grad: bool
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """The launch itself. tensors: as they were given."""
    device = tensors[0].device
    loss = torch.empty((), dtype=plan.dtype, device=device)
    grad = torch.empty(tensors[0].shape, dtype=plan.dtype, device=device) if want_grad else None
    stats = torch.empty(8, dtype=plan.dtype, device=device)
    scratch = torch.empty(plan.scratch, dtype=torch.float64, device=device)
    if not plan.contiguous:
        tensors = tuple([t.contiguous() for t in tensors])
    semaphores = workspace.semaphores(plan.semaphores, device)
    plan.prepared.launch(
        (*tensors, loss, loss if grad is None else grad, stats, scratch, semaphores), (float(clip_range), float(kl_weight))
    )
    return loss, grad, stats
