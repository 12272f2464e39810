"""One step of the sampler: guidance, mean, noise and log-prob."""

from __future__ import annotations

from typing import Any

import torch

from prdp_kernels import checks, dispatch, layout
from prdp_kernels import launch as launching
from prdp_kernels.denoise_step import reference


def denoise_step(
    model_output: torch.Tensor,
    sample: torch.Tensor,
    sample_coef: torch.Tensor,
    output_coef: torch.Tensor,
    std: torch.Tensor,
    *,
    noise: torch.Tensor | None = None,
    seeds: torch.Tensor | None = None,
    step: int | torch.Tensor = 0,
    guidance_scale: float | None = None,
    reduction: str = "mean",
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw x_{t-1} = mu + std noise: (prev_sample (N, C, H, W), log_prob (N,) in nats), both float32, or float64 if
    `model_output` or `sample` is. For sampling: no gradient is recorded (`gaussian_log_prob` has one).

    model_output, sample, sample_coef, output_coef, std, guidance_scale, reduction: as in `gaussian_log_prob`, and the log-prob
        is the one it gives for the returned prev_sample. A row with std 0 is deterministic: prev_sample = mu, and its log_prob
        is 0, a placeholder outside the density.
    noise: (N, C, H, W) floating; or
    seeds, step: (N,) int64 and an int or (N,) int64: the noise is philox_normal(seeds, (C, H, W), step=step).

    Raises: TypeError, ValueError for arguments of the wrong type, shape or device, for both or neither of noise and seeds, and
    for std < 0 on the CPU (on CUDA the values of std are not read, which would wait for the device).
    """
    op = "denoise_step"
    per_row = isinstance(step, torch.Tensor)
    if checks.is_guidance(guidance_scale) and (per_row or (type(step) is int and 0 <= step < 2**32)):
        tensors = (model_output, sample, sample_coef, output_coef, std, noise, seeds, step if per_row else None)
        plan = launching.known(op, backend, (guidance_scale is not None, reduction), tensors)
        if plan is not None:
            return _kernel().run(plan, tensors, 0 if per_row else step, guidance_scale)
    checks.transition(op, model_output, sample, sample_coef, output_coef, std, guidance_scale, reduction)
    if (noise is None) == (seeds is None):
        raise ValueError(f"{op}: give exactly one of noise and seeds, got {'neither' if noise is None else 'both'}")
    if noise is not None:
        checks.tensors(op, noise=noise)
        checks.floating(op, noise=noise)
        checks.shape(op, sample.shape, noise=noise)
        checks.same_device(op, sample=sample, noise=noise)
    else:
        checks.tensors(op, seeds=seeds)
        checks.int64(op, seeds=seeds)
        checks.shape(op, sample.shape[:1], seeds=seeds)
        checks.same_device(op, sample=sample, seeds=seeds)
        checks.step(op, step, seeds)
    if checks.can_read_values(std) and not (std >= 0).all():
        raise ValueError(f"{op}: std must not be negative or NaN, got {std.min().item():g}")
    run = dispatch.choose(op, backend, sample, reference=reference.denoise_step, triton=_triton)
    with torch.no_grad():
        return run(model_output, sample, sample_coef, output_coef, std, noise, seeds, step, guidance_scale, reduction)


def _triton(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    *tensors, step, guidance_scale, reduction = args
    steps, step = (step, 0) if isinstance(step, torch.Tensor) else (None, step)
    run = _launch if launching.plain((*tensors, steps)) else _op
    return run(*tensors, steps, step, guidance_scale, reduction)


def _kernel() -> Any:
    from prdp_kernels.denoise_step import kernel  # imports triton

    return kernel


def _launch(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return _kernel().launch(*args)


def _fake(model_output: torch.Tensor, sample: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = layout.result_dtype(model_output, sample)
    return layout.empty_like(sample, dtype), sample.new_empty(sample.shape[0], dtype=dtype)


_op = dispatch.define(
    "denoise_step(Tensor model_output, Tensor sample, Tensor sample_coef, Tensor output_coef, Tensor std, Tensor? noise, "
    "Tensor? seeds, Tensor? steps, int step, float? guidance_scale, str reduction) -> (Tensor, Tensor)",
    launch=_launch,
    fake=_fake,
)
