"""What one would write today in plain torch, without a kernel: the opponents of the benchmark.

The chains follow ddpo-pytorch's `ddim_step_with_logprob` and TRL's copy of it: chunk, guidance, mean, noise by torch.randn,
elementwise log-prob, mean. Where those are slower than they need be, the chain here is not: coefficients are a ready table,
mu is one linear combination instead of x_0, epsilon and a direction, per-row factors stay (N, 1, 1, 1), and constants are Python
numbers. Half-precision outputs are widened first, as in the operators: guidance in bf16 would be off by 1e-2, and computing
another function is no contest.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


def transition_mean(
    model_output: torch.Tensor,
    sample: torch.Tensor,
    sample_coef: torch.Tensor,
    output_coef: torch.Tensor,
    guidance_scale: float | None,
) -> torch.Tensor:
    m = model_output.float()
    if guidance_scale is not None:
        uncond, cond = m.chunk(2)
        m = uncond + guidance_scale * (cond - uncond)
    return sample_coef.view(-1, 1, 1, 1) * sample + output_coef.view(-1, 1, 1, 1) * m


def log_density(prev_sample: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    std = std.view(-1, 1, 1, 1)
    log_prob = -((prev_sample - mean) ** 2) / (2 * std**2) - torch.log(std) - HALF_LOG_2PI
    return log_prob.mean(dim=(1, 2, 3))


def gaussian_log_prob(
    model_output: torch.Tensor,
    sample: torch.Tensor,
    prev_sample: torch.Tensor,
    sample_coef: torch.Tensor,
    output_coef: torch.Tensor,
    std: torch.Tensor,
    guidance_scale: float | None,
) -> torch.Tensor:
    mean = transition_mean(model_output, sample, sample_coef, output_coef, guidance_scale)
    return log_density(prev_sample, mean, std)


def denoise_step(
    model_output: torch.Tensor,
    sample: torch.Tensor,
    sample_coef: torch.Tensor,
    output_coef: torch.Tensor,
    std: torch.Tensor,
    guidance_scale: float | None,
    noise: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """noise: drawn here when None, which is what is timed; given, so that the result can be compared."""
    mean = transition_mean(model_output, sample, sample_coef, output_coef, guidance_scale)
    if noise is None:
        noise = torch.randn(sample.shape, device=sample.device, dtype=sample.dtype)
    prev_sample = mean + std.view(-1, 1, 1, 1) * noise
    return prev_sample, log_density(prev_sample, mean, std)


def generator_per_row(seeds: list[int], shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """(N, *shape) normals whose rows depend on their seed alone: a generator per row, as diffusers' `randn_tensor` draws them."""
    rows = [torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), device=device) for seed in seeds]
    return torch.stack(rows)


def randn(n: int, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """(N, *shape) normals from the one generator of the device: no row of its own, the least that torch can do."""
    return torch.randn((n, *shape), device=device)


def prdp_loss(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    ref_log_probs: torch.Tensor,
    rewards: torch.Tensor,
    clip_range: float,
    kl_weight: float,
) -> torch.Tensor:
    """The loss as its formula stands (arXiv 2402.08714, Appendix G); (G, B, T) and (G, B), all float32."""
    lr, old = log_probs - ref_log_probs, old_log_probs - ref_log_probs
    clipped = torch.clamp(lr, old - clip_range, old + clip_range)
    mean_lr, mean_clipped = lr.mean(2), clipped.mean(2)
    dr = rewards.unsqueeze(2) - rewards.unsqueeze(1)
    error = mean_lr.unsqueeze(2) - mean_lr.unsqueeze(1) - dr / kl_weight
    clipped_error = mean_clipped.unsqueeze(2) - mean_clipped.unsqueeze(1) - dr / kl_weight
    pair = dr > 0
    worst = torch.maximum(error**2, clipped_error**2) * pair
    return (worst.sum((1, 2)) / pair.sum((1, 2)).clamp(min=1)).mean()


def group_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """As diffusers' ResnetBlock2D has it between its convolutions, 32 groups."""
    return functional.silu(functional.group_norm(x + shift[:, :, None, None], 32, weight, bias))


def geglu(x: torch.Tensor) -> torch.Tensor:
    hidden, gate = x.chunk(2, dim=-1)
    return hidden * functional.gelu(gate)
