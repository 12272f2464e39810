"""The policy: the denoiser, guidance and one Gaussian step.

Rollout, reference pass and update all call it, so that they cannot drift apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Protocol

import torch
from diffusers import SchedulerMixin
from torch import nn

from prdp_fast.config.recipe import SamplerSettings
from prdp_fast.core.errors import UserError
from prdp_fast.core.records import TextEmbeddings
from prdp_fast.sampling.flow import DEFAULT, SAMPLERS
from prdp_fast.sampling.transitions import Transitions
from prdp_kernels import denoise_step, gaussian_log_prob, gaussian_log_prob_and_grad, philox_normal

Backend = Literal["auto", "triton", "torch"]


# (denoiser, latents (N, C, H, W) float32, timesteps (N,), embeddings of N rows, guided=) -> (2N, C, H, W), unconditional half
# first, or (N, C, H, W) if not guided: `Family.predict`.
Predict = Callable[..., torch.Tensor]


@dataclass(eq=False)
class Policy:
    """p(x_{t-1} | x_t, prompt) under classifier-free guidance (PRDP, arXiv:2402.08714, eq. 4).

    The denoiser is an argument of every call: the trained, the frozen and the gathered copy share one policy.
    """

    transitions: Transitions
    guidance_scale: float | None
    predict: Predict
    backend: Backend = "auto"
    guidance_interval: tuple[int, int] | None = None  # guide at timesteps first <= t <= second only (arXiv:2404.07724)
    _tables: dict[tuple[torch.device, torch.dtype], tuple[torch.Tensor, ...]] = field(
        default_factory=dict, init=False, repr=False
    )

    @cached_property
    def guided(self) -> torch.Tensor:
        """(T,) bool on the CPU: which steps evaluate the denoiser twice. Where none does, p(x_{t-1} | x_t, prompt) is the plain
        conditional model: the interval defines another policy, it approximates nothing."""
        timesteps = self.transitions.timesteps
        if self.guidance_scale is None:
            return torch.zeros_like(timesteps, dtype=torch.bool)
        if self.guidance_interval is None:
            return torch.ones_like(timesteps, dtype=torch.bool)
        low, high = self.guidance_interval
        return (low <= timesteps) & (timesteps <= high)

    @cached_property
    def _guided_steps(self) -> list[bool]:
        return self.guided.tolist()

    def evaluations(self, steps: torch.Tensor) -> int:
        """denoiser rows that one latent at each of these steps (CPU, any shape) costs: two where it is guided."""
        return steps.numel() + int(self.guided[steps].sum())

    @property
    def trained_evaluations(self) -> torch.Tensor:
        """(S,) float64: the same of each of a trajectory's stochastic steps, on average over where its window may be."""
        return 1 + self.guided[self.transitions.possible_steps].double().mean(0)

    def coefficients(self, steps: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """(timesteps, sample_coef, output_coef, std) of each row, from step numbers (N,), on their device. Waits for nothing.

        Args: steps: with random windows, T + step is the step without noise.
        """
        key = steps.device, dtype
        if key not in self._tables:
            table = self.transitions
            columns = [table.sample_coef, table.output_coef, table.std]
            timesteps = table.timesteps
            if table.window is not None:
                columns = [torch.cat(pair) for pair in zip(columns, table.window.plain, strict=True)]
                timesteps = timesteps.repeat(2)
            self._tables[key] = (timesteps.to(steps.device), *(column.to(*key) for column in columns))
        return tuple(column[steps] for column in self._tables[key])

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
        denoiser: nn.Module,
        latents: torch.Tensor,
        step: int,
        embeddings: TextEmbeddings,
        seeds: torch.Tensor,
        noise: torch.Tensor | None = None,
        noisy: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take step number `step` with Philox noise keyed by (seeds, step + 1), given as `noise` or made here; step 0 of the key
        is x_T itself.

        Args: noisy: (N,) bool, with random windows: the trajectories in whose window the step is; None: it is in all.
        Returns: x_{t-1} (N, C, H, W) float32 and its log-prob (N,) float32 nats, 0 for a deterministic step.
        """
        guided = self._guided_steps[step]
        steps = torch.full((len(latents),), step, device=latents.device)
        if noisy is not None and self.transitions.window is not None:
            steps = steps + len(self.transitions) * ~noisy
        timesteps, sample_coef, output_coef, std = self.coefficients(steps, latents.dtype)
        output = self.predict(denoiser, latents, timesteps, embeddings, guided=guided)
        return denoise_step(
            output, latents, sample_coef, output_coef, std,
            noise=noise, seeds=seeds if noise is None else None, step=step + 1,
            guidance_scale=self.guidance_scale if guided else None, backend=self.backend,
        )  # fmt: skip

    def log_prob(
        self,
        denoiser: nn.Module,
        latents: torch.Tensor,
        prev_latents: torch.Tensor,
        steps: torch.Tensor,
        embeddings: TextEmbeddings,
        *,
        guided: bool,
    ) -> torch.Tensor:
        """Log-prob of stored steps, differentiable in the denoiser's weights.

        Args:
            latents, prev_latents: (N, C, H, W) float32, x_t and x_{t-1} exactly as stored.
            steps: (N,) int64 numbers of stochastic steps, any mix, on the device of the latents.
            embeddings: N rows.
            guided: what `self.guided` says of all these steps.
        Returns: (N,) float32, nats, mean over C, H, W.
        """
        timesteps, sample_coef, output_coef, std = self.coefficients(steps, latents.dtype)
        output = self.predict(denoiser, latents, timesteps, embeddings, guided=guided)
        return gaussian_log_prob(
            output, latents, prev_latents, sample_coef, output_coef, std,
            guidance_scale=self.guidance_scale if guided else None, backend=self.backend,
        )  # fmt: skip

    def weighted_log_prob(
        self,
        denoiser: nn.Module,
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

        The weights are known, so the gradient at the denoiser's output is made in the same pass as the log-probs.

        Args:
            weights: (N,) dL/dlog_prob, constants. The rest as in `log_prob`.
            loss_scale: what the scalar will be multiplied by before backward. Half-precision gradients are stored multiplied
                by it, since they may not be representable otherwise.
        """
        timesteps, sample_coef, output_coef, std = self.coefficients(steps, latents.dtype)
        output = self.predict(denoiser, latents, timesteps, embeddings, guided=guided)
        log_prob, grad = gaussian_log_prob_and_grad(
            output.detach(), latents, prev_latents, sample_coef, output_coef, std, weights * loss_scale,
            guidance_scale=self.guidance_scale if guided else None, backend=self.backend,
        )  # fmt: skip
        return PrecomputedGradient.apply(output, grad, (weights * log_prob).sum(), loss_scale), log_prob


class Scheduled(Protocol):
    """What a table of steps takes of a model: `Family`."""

    def scheduler(self, wanted: str | None = None) -> SchedulerMixin: ...
    def schedule_options(self, num_inference_steps: int) -> dict[str, Any]: ...


def build_transitions(model: Scheduled, sampler: SamplerSettings, scheduler: SchedulerMixin | None = None) -> Transitions:
    """The steps of a recipe or a command line on a model's schedule.

    Args: scheduler: one that is in memory already; None reads the model's.
    Raises: UserError naming the setting to change.
    """
    return Transitions.from_scheduler(
        scheduler or model.scheduler(sampler.scheduler), sampler.num_inference_steps, sampler.eta, sampler=sampler.method,
        noise_level=sampler.noise_level, window=sampler.stochastic_steps, **model.schedule_options(sampler.num_inference_steps),
    )  # fmt: skip


def flow_method(sampler: SamplerSettings) -> str:
    """In words: how a flow-matching model's noisy steps are taken."""
    method = sampler.method or DEFAULT
    noise = SAMPLERS[method].noise_level if sampler.noise_level is None else sampler.noise_level
    return f"{method} of noise level {noise:g}"


def build_policy(
    sampler: SamplerSettings,
    transitions: Transitions,
    predict: Predict,
    backend: Backend = "auto",
    *,
    setting: str = "sampler.guidance_interval",
) -> Policy:
    """The policy of a recipe or a command line.

    Args: setting: what the user calls the guidance interval.
    Raises: UserError if the interval holds none of the sampler's timesteps.
    """
    policy = Policy(transitions, sampler.guidance_scale, predict, backend, sampler.guidance_interval)
    if sampler.guidance_interval is not None and not policy.guided.any():
        raise UserError(
            f"{setting} {list(sampler.guidance_interval)} holds none of the timesteps {transitions.timesteps.tolist()}; widen "
            "it, or sample without guidance"
        )
    return policy


class PrecomputedGradient(torch.autograd.Function):
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
