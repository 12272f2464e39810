"""One stochastic denoising step and the log-prob of what it drew."""

from __future__ import annotations

import torch

from prdp_kernels.gaussian_log_prob.reference import log_density, per_row, transition_mean
from prdp_kernels.philox.reference import philox_normal


def denoise_step(
    model_output: torch.Tensor,
    sample: torch.Tensor,
    sample_coef: torch.Tensor,
    output_coef: torch.Tensor,
    std: torch.Tensor,
    noise: torch.Tensor | None,
    seeds: torch.Tensor | None,
    step: int | torch.Tensor,
    guidance_scale: float | None,
    reduction: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    mean = transition_mean(model_output, sample, sample_coef, output_coef, guidance_scale)
    if noise is None:
        noise = philox_normal(seeds, sample.shape[1:], step)
    prev_sample = mean + per_row(std, mean) * noise.to(mean.dtype)
    stochastic = std > 0
    # Of the rounded prev_sample, not of the noise: this is the value that gets stored and evaluated again.
    log_prob = log_density(prev_sample.detach(), mean, torch.where(stochastic, std, 1.0), reduction)
    return prev_sample, torch.where(stochastic, log_prob, 0.0)
