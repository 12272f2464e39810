"""Log-prob of a stored transition, its gradient, or both, in one launch.

    m = m_uncond + s (m_cond - m_uncond),  r = x_{t-1} - sample_coef x_t - output_coef m
    log p = mean (or sum) of -r^2 / (2 std^2)  -  log std - log(2 pi) / 2          (the sum: the constants times C H W)
    d(w log p)/dm = w r output_coef / std^2  (/ C H W for the mean);   d/dm_uncond = (1 - s) that,  d/dm_cond = s that

Bytes moved an element, with b bytes of model output (twice under guidance, g = 2): forward 8 + g b, backward 8 + 2 g b, and the
same for log-prob and gradient together, where two launches would move 16 + 3 g b. Nothing else is read but three numbers a row.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from prdp_kernels import launch as launching
from prdp_kernels import layout, workspace
from prdp_kernels.tile import finish_log_prob, fma, guided_output, reciprocal, residual, tile_mask, tile_pointers, tiles_left

TRITON_DTYPE = {torch.float32: tl.float32, torch.float64: tl.float64}


@triton.jit(do_not_specialize=["rows", "splits"])
def log_prob_kernel(
    model_output_ptr,  # (rows or 2 rows, channels, pixels) any float
    sample_ptr,  # (rows, channels, pixels) float32 or float64
    prev_sample_ptr,  # (rows, channels, pixels)
    sample_coef_ptr,  # (rows,)
    output_coef_ptr,  # (rows,)
    std_ptr,  # (rows,)
    weight_ptr,  # (rows,) upstream gradient of each log-prob; unused without GRAD
    log_prob_ptr,  # out (rows,) COMPUTE; unused without LOG_PROB
    grad_ptr,  # out, like model_output; unused without GRAD
    partial_ptr,  # scratch (rows, splits) COMPUTE; unused when SINGLE
    semaphore_ptr,  # scratch (rows,) int32 zeros; unused when SINGLE
    guidance_scale: tl.float64,
    rows, splits, pixels,
    model_output_row, sample_row, prev_sample_row, grad_row,
    model_output_c, sample_c, prev_sample_c, grad_c,
    model_output_p: tl.constexpr, sample_p: tl.constexpr, prev_sample_p: tl.constexpr, grad_p: tl.constexpr,
    GUIDED: tl.constexpr, MEAN: tl.constexpr, LOG_PROB: tl.constexpr, GRAD: tl.constexpr, COMPUTE: tl.constexpr,
    SINGLE: tl.constexpr, FLAT: tl.constexpr,
    CHANNELS: tl.constexpr, C_BLOCK: tl.constexpr, P_BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // splits).to(tl.int64)
    split = (tl.program_id(0) % splits).to(tl.int64)
    size = tl.full((), pixels, tl.int64) * CHANNELS
    scale = tl.full((), guidance_scale, tl.float64).to(COMPUTE)

    sample_coef = tl.load(sample_coef_ptr + row).to(COMPUTE)
    output_coef = tl.load(output_coef_ptr + row).to(COMPUTE)
    std = tl.load(std_ptr + row).to(COMPUTE)
    inverse_std = reciprocal(std)
    if GRAD:
        slope = tl.load(weight_ptr + row).to(COMPUTE) * output_coef * inverse_std * inverse_std
        if MEAN:
            slope = slope / size.to(COMPUTE)
        half = rows.to(tl.int64) * grad_row

    model_output_ptr += row * model_output_row
    sample_ptr += row * sample_row
    prev_sample_ptr += row * prev_sample_row
    if FLAT:
        squares = tl.zeros((P_BLOCK,), COMPUTE)
    else:
        squares = tl.zeros((C_BLOCK, P_BLOCK), COMPUTE)

    first = split * (TILES * P_BLOCK)
    for tile in range(tiles_left(first, pixels, P_BLOCK, TILES)):
        start = first + tile * P_BLOCK
        mask = tile_mask(start, pixels, CHANNELS, FLAT, C_BLOCK, P_BLOCK)
        output = guided_output(
            model_output_ptr, rows.to(tl.int64) * model_output_row, start, model_output_c, model_output_p, mask, scale,
            GUIDED, COMPUTE, FLAT, C_BLOCK, P_BLOCK,
        )  # fmt: skip
        sample_at = tile_pointers(sample_ptr, start, sample_c, sample_p, FLAT, C_BLOCK, P_BLOCK)
        sample = tl.load(sample_at, mask=mask, other=0.0).to(COMPUTE)
        prev_at = tile_pointers(prev_sample_ptr, start, prev_sample_c, prev_sample_p, FLAT, C_BLOCK, P_BLOCK)
        prev_sample = tl.load(prev_at, mask=mask, other=0.0).to(COMPUTE)
        r = residual(prev_sample, sample, output, sample_coef, output_coef)
        if LOG_PROB:
            z = r * inverse_std
            squares = fma(z, z, squares)
        if GRAD:
            grad = r * slope
            grad_at = tile_pointers(grad_ptr + row * grad_row, start, grad_c, grad_p, FLAT, C_BLOCK, P_BLOCK)
            if GUIDED:
                tl.store(grad_at, ((1.0 - scale) * grad).to(grad_ptr.dtype.element_ty), mask=mask)
                tl.store(grad_at + half, (scale * grad).to(grad_ptr.dtype.element_ty), mask=mask)
            else:
                tl.store(grad_at, grad.to(grad_ptr.dtype.element_ty), mask=mask)

    if LOG_PROB:
        finish_log_prob(
            tl.sum(squares), std, False, log_prob_ptr, partial_ptr, semaphore_ptr, row, split, splits, size, MEAN, COMPUTE, SINGLE
        )


class Plan(NamedTuple):
    """What `launch` needs of a call that depends on metadata alone."""

    prepared: launching.Prepared | None  # None without rows
    rows: int
    scratch: int  # partial sums of all rows; 0 where one program does a row
    dtype: torch.dtype
    device: torch.device
    want_log_prob: bool
    grad_format: torch.memory_format
    copies: tuple[bool, ...] | None  # which tensors must be made contiguous; None if none


def launch(
    model_output: torch.Tensor,
    sample: torch.Tensor,
    prev_sample: torch.Tensor,
    sample_coef: torch.Tensor,
    output_coef: torch.Tensor,
    std: torch.Tensor,
    guidance_scale: float | None,
    reduction: str,
    *,
    weights: torch.Tensor | None = None,
    want_log_prob: bool = True,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(log_prob (N,), grad like model_output): the first if wanted, the second if there are weights (N,)."""
    tensors = (model_output, sample, prev_sample, sample_coef, output_coef, std, weights)
    options = (guidance_scale is not None, reduction, want_log_prob)
    key = launching.key_of("log_prob", options, tensors)
    plan = launching.PLANS.get(key)
    if plan is None:
        plan = launching.PLANS[key] = make_plan(tensors, *options)
    return run(plan, tensors, guidance_scale)


def make_plan(tensors: tuple[Any, ...], guided: bool, reduction: str, want_log_prob: bool) -> Plan:
    model_output, sample, prev_sample, *rows = tensors
    n = sample.shape[0]
    dtype = layout.result_dtype(model_output, sample, prev_sample)
    grad = None if rows[3] is None else layout.empty_like(model_output)
    grad_format = torch.contiguous_format if grad is None else layout.format_of(grad)
    if n == 0:
        return Plan(None, 0, 0, dtype, sample.device, want_log_prob, grad_format, None)
    read, strides, tile = layout.rows([model_output, sample, prev_sample, *([] if grad is None else [grad])])
    if tile.flat and not want_log_prob:
        tile = layout.elementwise_tile(tile.pixels)
    strides = [*strides, (0, 0, 1)][:4]
    copies = [new is not old for new, old in zip(read, tensors[:3], strict=False)]
    copies += [t is not None and not t.is_contiguous() for t in rows]
    single = tile.splits == 1 or not want_log_prob
    prepared = launching.Prepared(
        log_prob_kernel,
        n * tile.splits,
        (n, tile.splits, tile.pixels, *(row for row, _, _ in strides), *(channel for _, channel, _ in strides)),
        {
            "model_output_p": strides[0][2], "sample_p": strides[1][2], "prev_sample_p": strides[2][2], "grad_p": strides[3][2],
            "GUIDED": guided, "MEAN": reduction == "mean", "LOG_PROB": want_log_prob, "GRAD": grad is not None,
            "COMPUTE": TRITON_DTYPE[dtype], "SINGLE": single, "FLAT": tile.flat,
            "CHANNELS": tile.channels, "C_BLOCK": tile.c_block, "P_BLOCK": tile.p_block, "TILES": tile.tiles,
        },
        {"num_warps": tile.num_warps},
        sample.device,
    )  # fmt: skip
    scratch = 0 if single else n * tile.splits
    return Plan(prepared, n, scratch, dtype, sample.device, want_log_prob, grad_format, tuple(copies) if any(copies) else None)


def run(plan: Plan, tensors: tuple[Any, ...], guidance_scale: float | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The launch itself. tensors: as they were given, the weights last."""
    m, x, prev, a, b, std, weights = tensors
    log_prob = torch.empty(plan.rows, dtype=plan.dtype, device=plan.device) if plan.want_log_prob else None
    grad = None
    if weights is not None:
        grad = torch.empty(m.shape, dtype=m.dtype, device=plan.device, memory_format=plan.grad_format)
    if plan.prepared is None:
        return log_prob, grad
    if plan.copies is not None:
        m, x, prev, a, b, std, weights = (t.contiguous() if copy else t for t, copy in zip(tensors, plan.copies, strict=True))
    partials = semaphores = x  # where they are not used
    if plan.scratch:
        partials = torch.empty(plan.scratch, dtype=plan.dtype, device=plan.device)
        semaphores = workspace.semaphores(plan.rows, plan.device)
    plan.prepared.launch(
        (
            m, x, prev, a, b, std, std if weights is None else weights, x if log_prob is None else log_prob,
            x if grad is None else grad, partials, semaphores,
        ),
        (1.0 if guidance_scale is None else float(guidance_scale),),
    )  # fmt: skip
    return log_prob, grad
