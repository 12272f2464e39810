"""The PRDP loss of all groups, its gradient and its statistics in one launch; one program a group.

    lr = log_prob - ref,  delta = log_prob - old,  excess = delta - clip(delta, -eps, eps)
    d, dr = differences of mean_t(lr) and of the rewards,  shift = -(differences of mean_t(excess)),  u = d - dr / beta
    error = u, or u + shift where shift (2 u + shift) > 0;  loss = mean over groups of the mean over pairs dr > 0 of error^2
    grad[i, t] = sum over j of 2 error_ij / (groups pairs T), unclipped errors for every t, clipped ones for steps inside the clip

The gradient needs no pass over the pairs of its own: u and shift change sign with (i, j), the choice between them does not, so
that error_ji = -error_ij, and image i's share of pair (j, i) is what its row says anyway.

Bytes moved a step: 12 read and 4 written, and 8 read again for the gradient, which find the cache. All arithmetic is float64, as
in the reference: a step costs a dozen operations, a pair two dozen, and at beta 1e-5 the clip decides on the eleventh digit.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from prdp_kernels import layout, workspace
from prdp_kernels.dispatch import on_device

COLUMNS = tl.constexpr(16)  # numbers a group leaves for the statistics, nine in use
OTHERS = tl.constexpr(16)  # images j that one turn of the loop over pairs looks at


@triton.jit
def read_steps(log_probs_ptr, old_ptr, base, steps, start, kept, clip, B_BLOCK: tl.constexpr, T_BLOCK: tl.constexpr):
    """(log_prob - old_log_prob, log_prob, mask, offsets) of a (B_BLOCK, T_BLOCK) tile; removed images read as 0."""
    step = start + tl.arange(0, T_BLOCK)[None, :]
    at = base + tl.arange(0, B_BLOCK)[:, None].to(tl.int64) * steps + step
    mask = kept[:, None] & (step < steps)
    log_prob = tl.load(log_probs_ptr + at, mask=mask, other=0.0).to(tl.float64)
    delta = log_prob - tl.load(old_ptr + at, mask=mask, other=0.0).to(tl.float64)
    return delta, log_prob, mask, at


@triton.jit
def read_rewards(reward_ptr, group, images, image):
    """(reward, kept): a non-finite reward removes its image, and reads as 0."""
    reward = tl.load(reward_ptr + group * images + image, mask=image < images, other=0.0).to(tl.float64)
    kept = (image < images) & (tl.abs(reward) < float("inf"))  # false for NaN too
    return tl.where(kept, reward, 0.0), kept


@triton.jit(do_not_specialize=["groups", "images"])
def prdp_loss_kernel(
    log_probs_ptr,  # (groups, images, steps) any float
    old_ptr,  # (groups, images, steps)
    ref_ptr,  # (groups, images, steps)
    reward_ptr,  # (groups, images) any float; a non-finite one removes its image
    loss_ptr,  # out () float32 or float64
    grad_ptr,  # out (groups, images, steps)
    stats_ptr,  # out (8,)
    means_ptr,  # scratch (groups, 2, images) float64
    sums_ptr,  # scratch (groups, COLUMNS) float64
    arrived_ptr,  # scratch (1,) int32 zero
    clip_range: tl.float64,
    kl_weight: tl.float64,
    groups, images, units,
    UNIT: tl.constexpr, B_BLOCK: tl.constexpr, T_BLOCK: tl.constexpr,
):  # fmt: skip
    steps = units * UNIT  # says that rows begin at multiples of UNIT numbers, which decides how wide the loads are
    group = tl.program_id(0)
    base = group.to(tl.int64) * images * steps
    clip = tl.full((), clip_range, tl.float64)
    count = tl.full((), steps, tl.float64)
    dtype: tl.constexpr = grad_ptr.dtype.element_ty
    image = tl.arange(0, B_BLOCK)
    reward, kept = read_rewards(reward_ptr, group, images, image)

    # Means over the steps, of the log-ratio and of its excess over the clip.
    log_ratios = tl.zeros((B_BLOCK, T_BLOCK), tl.float64)
    excesses = tl.zeros((B_BLOCK, T_BLOCK), tl.float64)
    outside = tl.zeros((B_BLOCK, T_BLOCK), tl.int32)
    for start in range(0, steps, T_BLOCK):
        delta, log_prob, mask, at = read_steps(log_probs_ptr, old_ptr, base, steps, start, kept, clip, B_BLOCK, T_BLOCK)
        log_ratios += log_prob - tl.load(ref_ptr + at, mask=mask, other=0.0).to(tl.float64)
        # NaN is not inside the clip here, and not outside it below: it stays visible in loss and gradient.
        excesses += tl.where(tl.abs(delta) <= clip, 0.0, delta - tl.where(delta > 0, clip, -clip))
        outside += (tl.abs(delta) > clip).to(tl.int32)
    log_ratio = tl.sum(log_ratios, 1) / count
    excess = tl.sum(excesses, 1) / count

    # All pairs, OTHERS columns at a time: the means change sides through memory, so that any group fits the registers.
    means_ptr += group * 2 * images
    tl.store(means_ptr + image, log_ratio, mask=image < images)
    tl.store(means_ptr + images + image, excess, mask=image < images)
    tl.debug_barrier()
    pairs = tl.zeros((B_BLOCK,), tl.float64)
    squares = tl.zeros((B_BLOCK,), tl.float64)
    clipped_pairs = tl.zeros((B_BLOCK,), tl.float64)
    right = tl.zeros((B_BLOCK,), tl.float64)
    targets = tl.zeros((B_BLOCK,), tl.float64)
    through_all = tl.zeros((B_BLOCK,), tl.float64)
    through_inside = tl.zeros((B_BLOCK,), tl.float64)
    for first in range(0, images, OTHERS):
        other = first + tl.arange(0, OTHERS)
        other_reward, other_kept = read_rewards(reward_ptr, group, images, other)
        other_log_ratio = tl.load(means_ptr + other, mask=other < images, other=0.0)
        other_excess = tl.load(means_ptr + images + other, mask=other < images, other=0.0)
        d = log_ratio[:, None] - other_log_ratio[None, :]
        difference = reward[:, None] - other_reward[None, :]
        target = difference / kl_weight
        shift = other_excess[None, :] - excess[:, None]
        u = d - target
        clipped = (shift * (2 * u + shift) <= 0) == 0  # NaN takes the branch that shows it
        error = tl.where(clipped, u + shift, u)
        both = kept[:, None] & other_kept[None, :]
        slope = tl.where(both & (difference != 0), error, 0.0)
        through_all += tl.sum(tl.where(clipped, 0.0, slope), 1)
        through_inside += tl.sum(tl.where(clipped, slope, 0.0), 1)
        pair = both & (difference > 0)
        pairs += tl.sum(pair.to(tl.float64), 1)
        squares += tl.sum(tl.where(pair, error * error, 0.0), 1)
        clipped_pairs += tl.sum((clipped & pair).to(tl.float64), 1)
        right += tl.sum(tl.where(pair, tl.where(d > 0, 1.0, tl.where(d < 0, 0.0, 0.5 + 0.0 * d)), 0.0), 1)
        targets += tl.sum(tl.where(pair, target, 0.0), 1)
    all_pairs = tl.sum(pairs)
    weight = 1.0 / (groups * tl.maximum(all_pairs, 1.0))  # of a pair in the loss
    through_all *= 2 * weight / count
    through_inside *= 2 * weight / count

    for start in range(0, steps, T_BLOCK):
        delta, log_prob, mask, at = read_steps(log_probs_ptr, old_ptr, base, steps, start, kept, clip, B_BLOCK, T_BLOCK)
        grad = through_all[:, None] + tl.where(tl.abs(delta) > clip, 0.0, through_inside[:, None])
        exists = (image < images)[:, None] & (start + tl.arange(0, T_BLOCK)[None, :] < steps)
        tl.store(grad_ptr + at, grad.to(dtype), mask=exists)

    # The last group to finish adds all of them up, in their order.
    row = sums_ptr + group * COLUMNS
    tl.store(row + 0, tl.sum(squares) * weight)
    tl.store(row + 1, all_pairs)
    tl.store(row + 2, (all_pairs == 0).to(tl.float64))
    tl.store(row + 3, images - tl.sum(kept.to(tl.float64)))
    tl.store(row + 4, tl.sum(tl.sum(outside, 1)).to(tl.float64))
    tl.store(row + 5, tl.sum(clipped_pairs))
    tl.store(row + 6, tl.sum(log_ratio))
    tl.store(row + 7, tl.sum(right))
    tl.store(row + 8, tl.sum(targets))
    tl.debug_barrier()
    arrived = tl.atomic_add(arrived_ptr, 1, sem="acq_rel", scope="gpu")
    if arrived == groups - 1:
        column = tl.arange(0, COLUMNS)
        totals = tl.zeros((COLUMNS,), tl.float64)
        for number in range(groups):
            totals += tl.load(sums_ptr + number * COLUMNS + column, mask=column < 9, other=0.0, cache_modifier=".cg")
        tl.store(arrived_ptr, 0)
        every_pair = tl.maximum(tl.sum(tl.where(column == 1, totals, 0.0)), 1.0)
        all_images = tl.maximum(groups * images - tl.sum(tl.where(column == 3, totals, 0.0)), 1.0)
        by_steps = tl.where(column == 4, all_images * count, 1.0)
        by_images = tl.where(column == 6, all_images, 1.0)
        by_pairs = tl.where((column == 5) | (column == 7) | (column == 8), every_pair, 1.0)
        values = (totals / (by_steps * by_images * by_pairs)).to(dtype)
        tl.store(loss_ptr + column, values, mask=column == 0)
        tl.store(stats_ptr + column - 1, values, mask=(column > 0) & (column < 9))


def launch(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    ref_log_probs: torch.Tensor,
    rewards: torch.Tensor,
    clip_range: float,
    kl_weight: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss (), grad (G, B, T), stats (8,)), the last in the order of `reference.STATS`."""
    groups, images, steps = log_probs.shape
    dtype = layout.result_dtype(log_probs, old_log_probs, ref_log_probs, rewards)
    device = log_probs.device
    loss = torch.empty((), dtype=dtype, device=device)
    grad = torch.empty(log_probs.shape, dtype=dtype, device=device)
    stats = torch.empty(8, dtype=dtype, device=device)
    b_block = max(1 << (images - 1).bit_length(), 2)
    t_block = max(min(2048 // b_block, 1 << (steps - 1).bit_length()), 8)  # 8 elements a thread
    unit = math.gcd(steps, 4)
    with on_device(log_probs):
        prdp_loss_kernel[(groups,)](
            log_probs.contiguous(), old_log_probs.contiguous(), ref_log_probs.contiguous(), rewards.contiguous(),
            loss, grad, stats,
            torch.empty(groups * 2 * images, dtype=torch.float64, device=device),
            torch.empty(groups * COLUMNS.value, dtype=torch.float64, device=device),
            workspace.arrivals(1, device), float(clip_range), float(kl_weight), groups, images, steps // unit,
            UNIT=unit, B_BLOCK=b_block, T_BLOCK=t_block, num_warps=8,
        )  # fmt: skip
    return loss, grad, stats
