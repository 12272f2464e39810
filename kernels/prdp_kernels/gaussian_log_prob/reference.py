"""log N(prev_sample; mu, std^2) of a transition that is linear in the latent and the model output."""

from __future__ import annotations

import math

import torch

from prdp_kernels.layout import result_dtype


def per_row(coef: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(N,) -> (N, 1, ..., 1) in the dtype of `like`."""
    return coef.to(like.dtype).reshape(-1, *[1] * (like.dim() - 1))


def transition_mean(
    model_output: torch.Tensor,
    sample: torch.Tensor,
    sample_coef: torch.Tensor,
    output_coef: torch.Tensor,
    guidance_scale: float | None,
) -> torch.Tensor:
    """mu = sample_coef x_t + output_coef m, with m = m_uncond + s (m_cond - m_uncond) under guidance; no clipping of x_0."""
    dtype = result_dtype(model_output, sample)
    m, sample = model_output.to(dtype), sample.to(dtype)
    if guidance_scale is not None:
        uncond, cond = m.chunk(2)
        m = uncond + guidance_scale * (cond - uncond)
    return per_row(sample_coef, sample) * sample + per_row(output_coef, sample) * m


def log_density(prev_sample: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, reduction: str) -> torch.Tensor:
    """(N,) mean or sum over a row of -(x - mu)^2 / (2 std^2) - log std - log(2 pi) / 2; std > 0.

    Elements are computed in the dtype of `mean`. The row is reduced in float64, which makes the result independent of the
    order of summation, hence of batch shape and thread count, to one rounding: the stepwise clip compares these to 1e-6.
    """
    z = ((prev_sample.to(mean.dtype) - mean) / per_row(std, mean)).flatten(1)
    constant = std.to(mean.dtype).double().log() + 0.5 * math.log(2 * math.pi)
    if reduction == "mean":
        return (-0.5 * z.square().mean(1, dtype=torch.float64) - constant).to(mean.dtype)
    return (-0.5 * z.square().sum(1, dtype=torch.float64) - z.shape[1] * constant).to(mean.dtype)


def gaussian_log_prob(
    model_output: torch.Tensor,
    sample: torch.Tensor,
    prev_sample: torch.Tensor,
    sample_coef: torch.Tensor,
    output_coef: torch.Tensor,
    std: torch.Tensor,
    guidance_scale: float | None,
    reduction: str,
) -> torch.Tensor:
    sample = sample.to(result_dtype(model_output, sample, prev_sample))
    mean = transition_mean(model_output, sample, sample_coef, output_coef, guidance_scale)
    return log_density(prev_sample, mean, std, reduction)


def gaussian_log_prob_and_grad(
    model_output: torch.Tensor,
    sample: torch.Tensor,
    prev_sample: torch.Tensor,
    sample_coef: torch.Tensor,
    output_coef: torch.Tensor,
    std: torch.Tensor,
    weights: torch.Tensor,
    guidance_scale: float | None,
    reduction: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """d(w log p)/dm = w (x_{t-1} - mu) output_coef / std^2, over the number of elements for the mean."""
    sample = sample.to(result_dtype(model_output, sample, prev_sample))
    mean = transition_mean(model_output, sample, sample_coef, output_coef, guidance_scale)
    slope = weights.to(mean.dtype) * output_coef.to(mean.dtype) / std.to(mean.dtype) ** 2
    if reduction == "mean":
        slope = slope / sample.shape[1:].numel()
    grad = per_row(slope, mean) * (prev_sample - mean)
    if guidance_scale is not None:
        grad = torch.cat([(1 - guidance_scale) * grad, guidance_scale * grad])
    return log_density(prev_sample, mean, std, reduction), grad.to(model_output.dtype)
