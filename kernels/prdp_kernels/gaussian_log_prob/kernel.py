"""Log-prob of a stored transition, its gradient, or both, in one launch.

    m = m_uncond + s (m_cond - m_uncond),  r = x_{t-1} - sample_coef x_t - output_coef m
    log p = mean (or sum) of -r^2 / (2 std^2)  -  log std - log(2 pi) / 2          (the sum: the constants times C H W)
    d(w log p)/dm = w r output_coef / std^2  (/ C H W for the mean);   d/dm_uncond = (1 - s) that,  d/dm_cond = s that

Bytes moved an element, with b bytes of model output (twice under guidance, g = 2): forward 8 + g b, backward 8 + 2 g b, and the
same for log-prob and gradient together, where two launches would move 16 + 3 g b. Nothing else is read but three numbers a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from prdp_kernels import layout, workspace
from prdp_kernels.dispatch import on_device
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
    arrived_ptr,  # scratch (rows,) int32 zeros; unused when SINGLE
    guidance_scale: tl.float64,
    rows, splits, pixels,
    model_output_row, model_output_c, model_output_p: tl.constexpr,
    sample_row, sample_c, sample_p: tl.constexpr,
    prev_sample_row, prev_sample_c, prev_sample_p: tl.constexpr,
    grad_row, grad_c, grad_p: tl.constexpr,
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
            tl.sum(squares), std, False, log_prob_ptr, partial_ptr, arrived_ptr, row, split, splits, size, MEAN, COMPUTE, SINGLE
        )


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
    n = sample.shape[0]
    dtype = layout.result_dtype(model_output, sample, prev_sample)
    log_prob = torch.empty(n, dtype=dtype, device=sample.device) if want_log_prob else None
    grad = layout.empty_like(model_output) if weights is not None else None
    if n == 0:
        return log_prob, grad
    tensors, strides, cut = layout.rows([model_output, sample, prev_sample, *([] if grad is None else [grad])])
    single = cut.splits == 1 or not want_log_prob
    partials = sample if single else torch.empty(n * cut.splits, dtype=dtype, device=sample.device)
    arrived = sample if single else workspace.arrivals(n, sample.device)
    with on_device(sample):
        log_prob_kernel[(n * cut.splits,)](
            *tensors[:3], sample_coef.contiguous(), output_coef.contiguous(), std.contiguous(),
            std if weights is None else weights.contiguous(), sample if log_prob is None else log_prob,
            sample if grad is None else grad, partials, arrived,
            1.0 if guidance_scale is None else float(guidance_scale),
            n, cut.splits, cut.pixels,
            *strides[0], *strides[1], *strides[2], *(strides[3] if grad is not None else (0, 0, 1)),
            GUIDED=guidance_scale is not None, MEAN=reduction == "mean", LOG_PROB=want_log_prob, GRAD=grad is not None,
            COMPUTE=TRITON_DTYPE[dtype], SINGLE=single, FLAT=cut.flat, CHANNELS=cut.channels, C_BLOCK=cut.c_block,
            P_BLOCK=cut.p_block, TILES=cut.tiles, num_warps=cut.num_warps,
        )  # fmt: skip
    return log_prob, grad
