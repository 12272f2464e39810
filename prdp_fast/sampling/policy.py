"""The policy: U-Net, guidance and one Gaussian step.

Rollout, reference pass and update all call it, so that they cannot drift apart.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import nn

from prdp_fast.records import TextEmbeddings
from prdp_fast.sampling.transitions import Transitions
from prdp_kernels import denoise_step, gaussian_log_prob, gaussian_log_prob_and_grad, philox_normal

Backend = Literal["auto", "triton", "torch"]


@dataclass(frozen=True)
class Policy:
    """p(x_{t-1} | x_t, prompt) under classifier-free guidance (PRDP, arXiv:2402.08714, eq. 4).

    The U-Net is an argument of every call: the trained, the frozen and the gathered copy share one policy.
    """

    transitions: Transitions
    guidance_scale: float | None
    backend: Backend = "auto"
    guidance_interval: tuple[int, int] | None = None  # guide at timesteps first <= t <= second only (arXiv:2404.07724)
    _tables: dict[tuple[torch.device, torch.dtype], tuple[torch.Tensor, ...]] = field(
        default_factory=dict, repr=False, compare=False
    )

    @cached_property
    def guided(self) -> torch.Tensor:
        """(T,) bool on the CPU: which steps evaluate the U-Net twice. Where none does, p(x_{t-1} | x_t, prompt) is the plain
        conditional model: the interval defines another policy, it approximates nothing."""
        timesteps = self.transitions.timesteps
        if self.guidance_scale is None:
            return torch.zeros_like(timesteps, dtype=torch.bool)
        low, high = self.guidance_interval or (int(timesteps.min()), int(timesteps.max()))
        return (low <= timesteps) & (timesteps <= high)

    @cached_property
    def _guided_steps(self) -> list[bool]:
        return self.guided.tolist()

    def evaluations(self, steps: torch.Tensor) -> int:
        """U-Net rows that one latent at each of these steps (CPU) costs: two where it is guided."""
        return len(steps) + int(self.guided[steps].sum())

    def coefficients(self, steps: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """(timesteps, sample_coef, output_coef, std) of each row, from step numbers (N,), on their device. Waits for nothing."""
        key = steps.device, dtype
        if key not in self._tables:
            table = self.transitions
            coefficients = (c.to(*key) for c in (table.sample_coef, table.output_coef, table.std))
            self._tables[key] = (table.timesteps.to(steps.device), *coefficients)
        return tuple(column[steps] for column in self._tables[key])

    def model_output(
        self, unet: nn.Module, latents: torch.Tensor, timesteps: torch.Tensor, embeddings: TextEmbeddings, *, guided: bool
    ) -> torch.Tensor:
        """The U-Net's raw output.

        Args:
            latents: (N, C, H, W) float32; cast to the U-Net's dtype at its door.
            timesteps: (N,) int64, the scheduler's timesteps.
            embeddings: N rows.
            guided: every row is, or none.
        Returns: (2N, C, H, W) unconditional half first, or (N, C, H, W) if not guided; the U-Net's dtype.
        """
        model_input = latents.to(embeddings.prompt_embeds.dtype)
        if guided:
            model_input = torch.cat([model_input, model_input])
            timesteps = torch.cat([timesteps, timesteps])
        return unet(model_input, timesteps, **conditioning(embeddings, guided=guided), return_dict=False)[0]

    def noise(self, seeds: torch.Tensor, latent_shape: tuple[int, ...]) -> torch.Tensor | None:
        """(N, T + 1, C, H, W) float32, all the noise of N trajectories, x_T's first; None where the step makes its own.

        Triton's step makes noise in registers. The reference spends a hundred small operations a call, which cost as much for
        one step as for all of them.
        """
        if self.backend == "triton" or (self.backend == "auto" and seeds.is_cuda):
            return None
        count = len(self.transitions) + 1
        steps = torch.arange(count, device=seeds.device).repeat(len(seeds))
        drawn = philox_normal(seeds.repeat_interleave(count), latent_shape, step=steps, backend=self.backend)
        return drawn.view(len(seeds), count, *latent_shape)

    def sample_step(
        self,
        unet: nn.Module,
        latents: torch.Tensor,
        step: int,
        embeddings: TextEmbeddings,
        seeds: torch.Tensor,
        noise: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take step number `step` with Philox noise keyed by (seeds, step + 1), given as `noise` or made here; step 0 of the key
        is x_T itself.

        Returns: x_{t-1} (N, C, H, W) float32 and its log-prob (N,) float32 nats, 0 for a deterministic step.
        """
        guided = self._guided_steps[step]
        steps = torch.full((len(latents),), step, device=latents.device)
        timesteps, sample_coef, output_coef, std = self.coefficients(steps, latents.dtype)
        output = self.model_output(unet, latents, timesteps, embeddings, guided=guided)
        return denoise_step(
            output, latents, sample_coef, output_coef, std,
            noise=noise, seeds=seeds if noise is None else None, step=step + 1,
            guidance_scale=self.guidance_scale if guided else None, backend=self.backend,
        )  # fmt: skip

    def log_prob(
        self,
        unet: nn.Module,
        latents: torch.Tensor,
        prev_latents: torch.Tensor,
        steps: torch.Tensor,
        embeddings: TextEmbeddings,
        *,
        guided: bool,
    ) -> torch.Tensor:
        """Log-prob of stored steps, differentiable in the U-Net's weights.

        Args:
            latents, prev_latents: (N, C, H, W) float32, x_t and x_{t-1} exactly as stored.
            steps: (N,) int64 numbers of stochastic steps, any mix, on the device of the latents.
            embeddings: N rows.
            guided: what `self.guided` says of all these steps.
        Returns: (N,) float32, nats, mean over C, H, W.
        """
        timesteps, sample_coef, output_coef, std = self.coefficients(steps, latents.dtype)
        output = self.model_output(unet, latents, timesteps, embeddings, guided=guided)
        return gaussian_log_prob(
            output, latents, prev_latents, sample_coef, output_coef, std,
            guidance_scale=self.guidance_scale if guided else None, backend=self.backend,
        )  # fmt: skip

    def weighted_log_prob(
        self,
        unet: nn.Module,
        latents: torch.Tensor,
        prev_latents: torch.Tensor,
        steps: torch.Tensor,
        embeddings: TextEmbeddings,
        *,
        guided: bool,
        weights: torch.Tensor,
        loss_scale: float = 1.0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """sum(weights * log_prob) of stored steps, a scalar to backpropagate, and the log-probs (N,), detached.

        The weights are known, so the gradient at the U-Net's output is made in the same pass as the log-probs.

        Args:
            weights: (N,) dL/dlog_prob, constants. The rest as in `log_prob`.
            loss_scale: what the scalar will be multiplied by before backward. Half-precision gradients are stored multiplied
                by it, since they may not be representable otherwise.
        """
        timesteps, sample_coef, output_coef, std = self.coefficients(steps, latents.dtype)
        output = self.model_output(unet, latents, timesteps, embeddings, guided=guided)
        log_prob, grad = gaussian_log_prob_and_grad(
            output.detach(), latents, prev_latents, sample_coef, output_coef, std, weights * loss_scale,
            guidance_scale=self.guidance_scale if guided else None, backend=self.backend,
        )  # fmt: skip
        return _Known.apply(output, grad, (weights * log_prob).sum(), loss_scale), log_prob


def conditioning(embeddings: TextEmbeddings, *, guided: bool) -> dict[str, Any]:
    """What a U-Net is told of the prompts: (2N, ...), the empty prompt's half first, or (N, ...) if not guided."""

    def both(negative: torch.Tensor | None, own: torch.Tensor) -> torch.Tensor:
        if not guided:
            return own
        assert negative is not None
        return torch.cat([negative.expand_as(own), own])

    told: dict[str, Any] = {"encoder_hidden_states": both(embeddings.negative_prompt_embeds, embeddings.prompt_embeds)}
    if embeddings.pooled_prompt_embeds is not None:
        assert embeddings.time_ids is not None
        pooled = both(embeddings.negative_pooled_prompt_embeds, embeddings.pooled_prompt_embeds)
        told["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": embeddings.time_ids.repeat(len(pooled), 1)}
    return told


class _Known(torch.autograd.Function):
    """A scalar whose gradient with respect to `output` is known: `grad`, already multiplied by `scale`."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, grad: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.save_for_backward(grad)
        ctx.scale = scale
        return value.clone()

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        # Divided first: upstream is the scale in all but an experiment, the factor 1, and grad neither over- nor underflows.
        return grad * (upstream / ctx.scale).to(grad.dtype), None, None, None
