"""One denoising step in one launch: guidance, mean, noise from Philox in registers, the step, and its log-prob.

    m = m_uncond + s (m_cond - m_uncond),  x_{t-1} = sample_coef x_t + output_coef m + std noise
    log p = mean (or sum) of -(x_{t-1} - mu)^2 / (2 std^2)  -  log std - log(2 pi) / 2     of the x_{t-1} that is stored

Bytes moved an element, with b bytes of model output (twice under guidance, g = 2): 8 + g b, and 4 more for noise that is given.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from prdp_kernels import layout, workspace
from prdp_kernels.dispatch import on_device
from prdp_kernels.gaussian_log_prob.kernel import TRITON_DTYPE
from prdp_kernels.philox.kernel import row_step, tile_normals
from prdp_kernels.tile import finish_log_prob, fma, guided_output, reciprocal, residual, tile_mask, tile_pointers, tiles_left


@triton.jit(do_not_specialize=["step", "rows", "splits"])
def denoise_step_kernel(
    model_output_ptr,  # (rows or 2 rows, channels, pixels) any float
    sample_ptr,  # (rows, channels, pixels) float32 or float64
    sample_coef_ptr,  # (rows,)
    output_coef_ptr,  # (rows,)
    std_ptr,  # (rows,), 0 for a deterministic row
    noise_ptr,  # (rows, channels, pixels) any float; unused without NOISE
    seed_ptr,  # (rows,) int64; unused with NOISE
    step_ptr,  # (rows,) int64; unused without STEP_ROWS
    prev_sample_ptr,  # out (rows, channels, pixels) COMPUTE
    log_prob_ptr,  # out (rows,) COMPUTE
    partial_ptr,  # scratch (rows, splits) COMPUTE; unused when SINGLE
    arrived_ptr,  # scratch (rows,) int32 zeros; unused when SINGLE
    guidance_scale: tl.float64,
    step: tl.int64,
    rows, splits, pixels,
    model_output_row, model_output_c, model_output_p: tl.constexpr,
    sample_row, sample_c, sample_p: tl.constexpr,
    prev_sample_row, prev_sample_c, prev_sample_p: tl.constexpr,
    noise_row, noise_c, noise_p: tl.constexpr,
    GUIDED: tl.constexpr, MEAN: tl.constexpr, NOISE: tl.constexpr, STEP_ROWS: tl.constexpr, ALIGNED: tl.constexpr,
    COMPUTE: tl.constexpr, SINGLE: tl.constexpr, FLAT: tl.constexpr,
    CHANNELS: tl.constexpr, C_BLOCK: tl.constexpr, P_BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // splits).to(tl.int64)
    split = (tl.program_id(0) % splits).to(tl.int64)
    size = tl.full((), pixels, tl.int64) * CHANNELS
    scale = tl.full((), guidance_scale, tl.float64).to(COMPUTE)

    sample_coef = tl.load(sample_coef_ptr + row).to(COMPUTE)
    output_coef = tl.load(output_coef_ptr + row).to(COMPUTE)
    std = tl.load(std_ptr + row).to(COMPUTE)
    inverse_std = reciprocal(std)  # NaN in a deterministic row, whose log-prob is replaced in the end
    if not NOISE:
        seed = tl.load(seed_ptr + row)
        step = row_step(step_ptr, step, row, STEP_ROWS)

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
        if NOISE:
            noise_at = tile_pointers(noise_ptr + row * noise_row, start, noise_c, noise_p, FLAT, C_BLOCK, P_BLOCK)
            noise = tl.load(noise_at, mask=mask, other=0.0).to(COMPUTE)
        else:
            noise = tile_normals(seed, step, start, pixels, FLAT, ALIGNED, C_BLOCK, P_BLOCK).to(COMPUTE)
            noise = tl.where(mask, noise, 0.0)  # past the end of the row everything else is 0 already
        prev_sample = fma(sample_coef, sample, fma(output_coef, output, std * noise))
        prev_at = tile_pointers(prev_sample_ptr, start, prev_sample_c, prev_sample_p, FLAT, C_BLOCK, P_BLOCK)
        tl.store(prev_at, prev_sample, mask=mask)
        # Of the rounded x_{t-1}, not of the noise: this is the value that gets stored and evaluated again.
        z = residual(prev_sample, sample, output, sample_coef, output_coef) * inverse_std
        squares = fma(z, z, squares)

    finish_log_prob(
        tl.sum(squares), std, std == 0, log_prob_ptr, partial_ptr, arrived_ptr, row, split, splits, size, MEAN, COMPUTE, SINGLE
    )


def launch(
    model_output: torch.Tensor,
    sample: torch.Tensor,
    sample_coef: torch.Tensor,
    output_coef: torch.Tensor,
    std: torch.Tensor,
    noise: torch.Tensor | None,
    seeds: torch.Tensor | None,
    steps: torch.Tensor | None,
    step: int,
    guidance_scale: float | None,
    reduction: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(prev_sample like sample, log_prob (N,)); `steps` (N,) int64, or None for one `step`."""
    n = sample.shape[0]
    dtype = layout.result_dtype(model_output, sample)
    prev_sample = layout.empty_like(sample, dtype)
    log_prob = torch.empty(n, dtype=dtype, device=sample.device)
    if n == 0:
        return prev_sample, log_prob
    given = [] if noise is None else [noise]
    tensors, strides, cut = layout.rows([model_output, sample, prev_sample, *given], in_order=noise is None)
    single = cut.splits == 1
    with on_device(sample):
        denoise_step_kernel[(n * cut.splits,)](
            tensors[0], tensors[1], sample_coef.contiguous(), output_coef.contiguous(), std.contiguous(),
            sample if noise is None else tensors[3], std if seeds is None else seeds.contiguous(),
            std if steps is None else steps.contiguous(), tensors[2], log_prob,
            log_prob if single else torch.empty(n * cut.splits, dtype=dtype, device=sample.device),
            log_prob if single else workspace.arrivals(n, sample.device),
            1.0 if guidance_scale is None else float(guidance_scale), step,
            n, cut.splits, cut.pixels,
            *strides[0], *strides[1], *strides[2], *(strides[3] if given else (0, 0, 1)),
            GUIDED=guidance_scale is not None, MEAN=reduction == "mean", NOISE=noise is not None, STEP_ROWS=steps is not None,
            ALIGNED=cut.flat or cut.pixels % 4 == 0, COMPUTE=TRITON_DTYPE[dtype], SINGLE=single, FLAT=cut.flat,
            CHANNELS=cut.channels, C_BLOCK=cut.c_block, P_BLOCK=cut.p_block, TILES=cut.tiles, num_warps=cut.num_warps,
        )  # fmt: skip
    return prev_sample, log_prob
