"""One denoising step in one launch: guidance, mean, noise from Philox in registers, the step, and its log-prob.

    m = m_uncond + s (m_cond - m_uncond),  x_{t-1} = sample_coef x_t + output_coef m + std noise
    log p = mean (or sum) of -(x_{t-1} - mu)^2 / (2 std^2)  -  log std - log(2 pi) / 2     of the x_{t-1} that is stored

Bytes moved an element, with b bytes of model output (twice under guidance, g = 2): 8 + g b, and 4 more for noise that is given.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from prdp_kernels import launch as launching
from prdp_kernels import layout, workspace
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
    semaphore_ptr,  # scratch (rows,) int32 zeros; unused when SINGLE
    guidance_scale: tl.float64,
    step: tl.int64,
    rows, splits, pixels,
    model_output_row, sample_row, prev_sample_row, noise_row,
    model_output_c, sample_c, prev_sample_c, noise_c,
    model_output_p: tl.constexpr, sample_p: tl.constexpr, prev_sample_p: tl.constexpr, noise_p: tl.constexpr,
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
        tl.sum(squares), std, std == 0, log_prob_ptr, partial_ptr, semaphore_ptr, row, split, splits, size, MEAN, COMPUTE, SINGLE
    )


class Plan(NamedTuple):
    """What `launch` needs of a call that depends on metadata alone."""

    prepared: launching.Prepared | None  # None without rows
    rows: int
    scratch: int  # partial sums of all rows; 0 where one program does a row
    dtype: torch.dtype
    device: torch.device
    format: torch.memory_format  # of prev_sample
    copies: tuple[bool, ...] | None  # which tensors must be made contiguous; None if none


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
    tensors = (model_output, sample, sample_coef, output_coef, std, noise, seeds, steps)
    options = (guidance_scale is not None, reduction)
    key = launching.key_of("denoise_step", options, tensors)
    plan = launching.PLANS.get(key)
    if plan is None:
        plan = launching.PLANS[key] = make_plan(tensors, *options)
    return run(plan, tensors, step, guidance_scale)


def make_plan(tensors: tuple[Any, ...], guided: bool, reduction: str) -> Plan:
    model_output, sample, *rows = tensors
    noise, seeds, steps = rows[3:]
    n = sample.shape[0]
    dtype = layout.result_dtype(model_output, sample)
    prev_sample = layout.empty_like(sample, dtype)
    if n == 0:
        return Plan(None, 0, 0, dtype, sample.device, layout.format_of(prev_sample), None)
    given = [model_output, sample, *([] if noise is None else [noise])]
    read, strides, tile = layout.rows([*given, prev_sample], in_order=noise is None)
    strides = [strides[0], strides[1], strides[-1], (0, 0, 1) if noise is None else strides[2]]
    copied = [new is not old for new, old in zip(read, given, strict=False)]
    copies = [*copied[:2], *(not t.is_contiguous() for t in rows[:3]), noise is not None and copied[2]]
    copies += [t is not None and not t.is_contiguous() for t in (seeds, steps)]
    prepared = launching.Prepared(
        denoise_step_kernel,
        n * tile.splits,
        (n, tile.splits, tile.pixels, *(row for row, _, _ in strides), *(channel for _, channel, _ in strides)),
        {
            "model_output_p": strides[0][2], "sample_p": strides[1][2], "prev_sample_p": strides[2][2], "noise_p": strides[3][2],
            "GUIDED": guided, "MEAN": reduction == "mean", "NOISE": noise is not None, "STEP_ROWS": steps is not None,
            "ALIGNED": tile.flat or tile.pixels % 4 == 0, "COMPUTE": TRITON_DTYPE[dtype], "SINGLE": tile.splits == 1,
            "FLAT": tile.flat, "CHANNELS": tile.channels, "C_BLOCK": tile.c_block, "P_BLOCK": tile.p_block,
            "TILES": tile.tiles,
        },
        {"num_warps": tile.num_warps},
        sample.device,
    )  # fmt: skip
    scratch = 0 if tile.splits == 1 else n * tile.splits
    return Plan(prepared, n, scratch, dtype, sample.device, layout.format_of(prev_sample), tuple(copies) if any(copies) else None)


def run(plan: Plan, tensors: tuple[Any, ...], step: int, guidance_scale: float | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The launch itself. tensors: as they were given."""
    m, x, a, b, std, noise, seeds, steps = tensors
    prev_sample = torch.empty(x.shape, dtype=plan.dtype, device=plan.device, memory_format=plan.format)
    log_prob = torch.empty(plan.rows, dtype=plan.dtype, device=plan.device)
    if plan.prepared is None:
        return prev_sample, log_prob
    if plan.copies is not None:
        copied = (t.contiguous() if copy else t for t, copy in zip(tensors, plan.copies, strict=True))
        m, x, a, b, std, noise, seeds, steps = copied
    partials = semaphores = log_prob  # where they are not used
    if plan.scratch:
        partials = torch.empty(plan.scratch, dtype=plan.dtype, device=plan.device)
        semaphores = workspace.semaphores(plan.rows, plan.device)
    plan.prepared.launch(
        (
            m, x, a, b, std, x if noise is None else noise, std if seeds is None else seeds, std if steps is None else steps,
            prev_sample, log_prob, partials, semaphores,
        ),
        (1.0 if guidance_scale is None else float(guidance_scale), step),
    )  # fmt: skip
    return prev_sample, log_prob
