"""Steps of flow-matching models: stochastic samplers whose step is linear in the latent and the model output.

With noise level sigma, x = (1 - sigma) x0 + sigma eps and v = eps - x0, so that x0 = x - sigma v and eps = x + (1 - sigma) v. A
step from sigma to a smaller sigma' is x' = sample_coef x + output_coef v + std xi. The noise levels are read from the scheduler
after `set_timesteps`: diffusers shifts a static schedule twice on the way, and nobody should do that again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from prdp_fast.core.errors import UserError

Columns = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # sample_coef, output_coef and std, (T,) float64 each
Diffusion = Literal["flow", "dance"]

# Beside it a float32 noise level is 1: the schedule's own arithmetic rounds by as much.
ROUNDING = 1e-6


def ode_columns(sigma: torch.Tensor) -> Columns:
    """x' = x - (sigma - sigma') v, the steps of the probability-flow ODE. sigma: (T + 1,) float64 noise levels."""
    return torch.ones_like(sigma[1:]), sigma.diff(), torch.zeros_like(sigma[1:])


def squared_diffusion(sigma: torch.Tensor, noise: float, kind: Diffusion) -> torch.Tensor:
    """(T,) g^2 of the reverse SDE dx = (v + g^2 (x + (1 - sigma) v) / (2 sigma)) dsigma + g dw at the start of each step.

    Flow-GRPO's is noise^2 sigma / (1 - sigma), infinite at sigma = 1, where it takes the next noise level for sigma in 1 - sigma.
    DanceGRPO's is noise^2.
    """
    start = sigma[:-1]
    if kind == "dance":
        return torch.full_like(start, noise**2)
    return noise**2 * start / (1 - torch.where(start > 1 - ROUNDING, sigma[1:], start))


def sde_columns(sigma: torch.Tensor, noise: float, kind: Diffusion) -> Columns:
    """One Euler-Maruyama step of the reverse SDE: Flow-GRPO (arXiv:2505.05470) and DanceGRPO (arXiv:2505.07818).

    First order in sigma - sigma': it leaves more noise than sigma' on the latent. A step to sigma' = 0 would leave noise on the
    image, and is the ODE's.
    """
    start, delta = sigma[:-1], -sigma.diff()
    square = squared_diffusion(sigma, noise, kind)
    columns = (
        1 - square * delta / (2 * start), -delta * (1 + square * (1 - start) / (2 * start)), (square * delta).sqrt()
    )  # fmt: skip
    return merged(columns, ode_columns(sigma), sigma[1:] > 0)


def kept_columns(sigma: torch.Tensor, kept: torch.Tensor | float) -> Columns:
    """Rebuild the latent at sigma' from the predicted x0 and a mixture of the predicted noise and new noise:

        x' = (1 - sigma') x0 + sigma' (kept eps + sqrt(1 - kept^2) xi)

    which has the variance that the model expects at sigma', however long the step is.

    Args: kept: (T,) or one number, the share of the predicted noise, 0 to 1. With 1 it is the ODE's step.
    """
    start, end = sigma[:-1], sigma[1:]
    kept = torch.as_tensor(kept, dtype=sigma.dtype)
    fresh = (1 - kept.square()).clamp(min=0).sqrt()
    return 1 - end * (1 - kept), (1 - start) * end * kept - start * (1 - end), end * fresh


def cps_columns(sigma: torch.Tensor, noise: float) -> Columns:
    """Coefficients-preserving sampling (Flow-CPS, arXiv:2509.05952): keeps cos(noise pi / 2) of the predicted noise."""
    return kept_columns(sigma, math.cos(noise * math.pi / 2))


def exact_columns(sigma: torch.Tensor, noise: float, kind: Diffusion) -> Columns:
    """The reverse SDE solved exactly with the predicted x0 frozen: the noise in the latent is an Ornstein-Uhlenbeck process, of
    which exp(-integral of g^2 / (2 sigma^2) from sigma' to sigma) is kept. At sigma = 1 Flow-GRPO's g keeps nothing."""
    start, end = sigma[:-1], sigma[1:]
    if kind == "dance":
        kept = torch.exp(-(noise**2) / 2 * (1 / end - 1 / start))  # 0 where end is 0
    else:
        kept = (end * (1 - start).clamp(min=0) / (start * (1 - end))) ** (noise**2 / 2)
    return kept_columns(sigma, kept)


@dataclass(frozen=True)
class Sampler:
    """A way to take noisy steps."""

    columns: Callable[[torch.Tensor, float], Columns]
    noise_level: float  # default
    highest: float = math.inf  # noise level


SAMPLERS = {
    "flow_sde": Sampler(partial(sde_columns, kind="flow"), 0.7),
    "dance_sde": Sampler(partial(sde_columns, kind="dance"), 0.3),
    "cps": Sampler(cps_columns, 0.8, 1.0),
    "exact": Sampler(partial(exact_columns, kind="flow"), 0.7),
    "exact_dance": Sampler(partial(exact_columns, kind="dance"), 0.3),
}
DEFAULT = "flow_sde"


def merged(noisy: Columns, plain: Columns, keep: torch.Tensor) -> Columns:
    """The noisy step where `keep`, (T,) bool, is true; else the plain one."""
    first, second, third = (torch.where(keep, *pair) for pair in zip(noisy, plain, strict=True))
    return first, second, third


def flow_columns(
    scheduler: FlowMatchEulerDiscreteScheduler, steps: int, sampler: str | None, noise_level: float | None
) -> tuple[Columns, Columns]:
    """The noisy steps and the ODE's steps of a schedule.

    Args:
        scheduler: after `set_timesteps`.
        sampler: a key of SAMPLERS; None: Flow-SDE.
        noise_level: None: the sampler's default.
    Raises: UserError naming the setting to change.
    """
    if sampler is not None and sampler not in SAMPLERS:
        raise UserError(f"sampler.method is {sampler!r}; expected one of {', '.join(SAMPLERS)}, or null for {DEFAULT}")
    method = SAMPLERS[sampler or DEFAULT]
    noise = method.noise_level if noise_level is None else noise_level
    if not 0 < noise <= method.highest or math.isinf(noise):
        most = f" and at most {method.highest:g}" if method.highest < math.inf else ""
        raise UserError(
            f"sampler.noise_level is {noise:g}; expected above 0{most} for {sampler or DEFAULT}: without noise a step has no "
            "density and nothing can be trained"
        )
    sigma = read_sigmas(scheduler, steps)
    columns = method.columns(sigma, noise)
    if not all(bool(column.float().isfinite().all()) for column in columns):
        raise UserError(
            f"sampler.noise_level is {noise:g}, with which float32 cannot hold the steps of {sampler or DEFAULT}; lower it "
            f"(the default is {method.noise_level:g})"
        )
    return columns, ode_columns(sigma)


def read_sigmas(scheduler: FlowMatchEulerDiscreteScheduler, steps: int) -> torch.Tensor:
    """(T + 1,) float64, the scheduler's own noise levels, last one included. Raises: UserError if no sampler can use them."""
    sigma = scheduler.sigmas.to("cpu", torch.float64)
    name = type(scheduler).__name__
    if len(sigma) != steps + 1:
        raise UserError(f"{name} made {len(sigma)} noise levels for {steps} steps; expected {steps + 1}: correct its sigmas")
    if not bool(sigma.isfinite().all()) or sigma.max() > 1 + ROUNDING or sigma.min() < 0:
        wrong = next(float(value) for value in sigma if not 0 <= value <= 1 + ROUNDING)
        raise UserError(
            f"{name} has a noise level of {wrong:g}; expected 1 to 0: correct shift, shift_terminal or the model's mu and sigmas"
        )
    rises = (sigma.diff() >= 0).nonzero()
    if len(rises):
        step = int(rises[0])
        raise UserError(
            f"{name}: step {step} of {steps} goes from noise level {float(sigma[step]):g} to {float(sigma[step + 1]):g}; "
            "expected levels that fall at every step: correct scheduler_config.json, or lower sampler.num_inference_steps"
        )
    return sigma.clamp(max=1)


def check_flow_settings(scheduler: FlowMatchEulerDiscreteScheduler, steps: int, eta: float, mu: float | None) -> None:
    """Raises: UserError for a setting with which no sampler can step."""
    name, config = type(scheduler).__name__, scheduler.config
    if config.invert_sigmas:
        raise UserError(
            f"{name}: invert_sigmas=True counts noise from 0 to 1; expected levels that fall from 1 to 0: set invert_sigmas="
            "False in scheduler_config.json"
        )
    if config.use_dynamic_shifting and mu is None:
        raise UserError(
            f"{name}: use_dynamic_shifting=True needs mu, which the model's family makes from the size of its latents, and this "
            "one does not; set use_dynamic_shifting=False and shift in scheduler_config.json"
        )
    if not 1 <= steps <= config.num_train_timesteps:
        raise UserError(
            f"sampler.num_inference_steps is {steps}; expected 1 to {config.num_train_timesteps}, the model's training timesteps"
        )
    if eta != 1:
        raise UserError(f"sampler.eta is {eta:g}, but {name} has no eta; leave it at 1 and set sampler.noise_level")


def set_flow_timesteps(
    scheduler: FlowMatchEulerDiscreteScheduler, steps: int, mu: float | None, sigmas: Sequence[float] | None
) -> None:
    """As the family's pipeline calls `set_timesteps`. Raises: UserError if the scheduler refuses."""
    options: dict[str, Any] = {} if mu is None else {"mu": mu}
    if sigmas is not None:
        options["sigmas"] = list(sigmas)
    try:
        scheduler.set_timesteps(steps, **options)
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(
            f"{type(scheduler).__name__} refuses sampler.num_inference_steps {steps} ({' '.join(str(error).split())}); correct "
            "its scheduler_config.json, or take another number of steps"
        ) from None
