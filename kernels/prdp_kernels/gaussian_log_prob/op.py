"""Log-prob of a stored transition, differentiable in the model output."""

from __future__ import annotations

import torch

from prdp_kernels import checks, dispatch
from prdp_kernels.gaussian_log_prob import reference


def gaussian_log_prob(
    model_output: torch.Tensor,
    sample: torch.Tensor,
    prev_sample: torch.Tensor,
    sample_coef: torch.Tensor,
    output_coef: torch.Tensor,
    std: torch.Tensor,
    *,
    guidance_scale: float | None = None,
    reduction: str = "mean",
    backend: str = "auto",
) -> torch.Tensor:
    """log p(x_{t-1} | x_t) in nats, (N,) float32 (float64 if any of the first three arguments is).

    mu = sample_coef x_t + output_coef m,  m = m_uncond + s (m_cond - m_uncond)
    log p = mean (or sum) over C,H,W of  -(x_{t-1} - mu)^2 / (2 std^2) - log std - log(2 pi) / 2

    model_output: (N, C, H, W), or (2N, C, H, W) with the unconditional half first when `guidance_scale` is given; any float
        dtype. Gradients come back in it, to both halves.
    sample, prev_sample: x_t and x_{t-1}, (N, C, H, W) float32 or float64.
    sample_coef, output_coef, std: (N,) floating, rounded to the dtype of the result; std > 0.

    Raises: TypeError, ValueError for arguments of the wrong type, shape or device, and for std <= 0 on the CPU. On CUDA the
    values of std are not read, which would wait for the device: a step with std 0 has no density, and gives NaN or infinity.
    """
    op = "gaussian_log_prob"
    checks.transition(op, model_output, sample, sample_coef, output_coef, std, guidance_scale, reduction)
    checks.tensors(op, prev_sample=prev_sample)
    checks.latent_dtype(op, prev_sample=prev_sample)
    checks.shape(op, sample.shape, prev_sample=prev_sample)
    checks.same_device(op, sample=sample, prev_sample=prev_sample)
    if std.device.type == "cpu" and not (std > 0).all():
        raise ValueError(
            f"{op}: std must be positive, got {std.min().item():g}; a deterministic step has no density, leave it out"
        )
    run = dispatch.choose(op, backend, sample, reference=reference.gaussian_log_prob)
    return run(model_output, sample, prev_sample, sample_coef, output_coef, std, guidance_scale, reduction)
