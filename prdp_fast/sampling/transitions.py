"""One table for every scheduler: each step of DDPM and DDIM is linear in the latent and the model output.

    x_{t-1} = sample_coef[t] * x_t + output_coef[t] * m + std[t] * noise

The table is computed once, in float64, from the scheduler's own `alphas_cumprod`, `timesteps`, prediction type and final
alpha, and steps exactly as diffusers does (DDIM counts back by num_train_timesteps // T, DDPM goes to the next timestep).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler, SchedulerMixin

from prdp_fast.core.errors import UserError

# DDPM clamps its last variance to 1e-20 "because we always take the log"; such a step adds no noise and has no density.
NO_NOISE = 1e-9
# What diffusers' DDPMScheduler writes in place of a terminal alpha of 0, "so that the first sigma is not inf".
NO_SIGNAL = 2.0**-24


@dataclass(frozen=True)
class Transitions:
    """The T steps of one sampling schedule, first step first."""

    timesteps: torch.Tensor  # (T,) int64, what the denoiser is told
    sample_coef: torch.Tensor  # (T,) float64
    output_coef: torch.Tensor  # (T,) float64
    std: torch.Tensor  # (T,) float64; exactly 0 for a deterministic step
    init_noise_sigma: float  # standard deviation of x_T

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def stochastic(self) -> torch.Tensor:
        """(S,) int64: the steps that have a density. The others are taken, and are no part of any log-prob."""
        return torch.nonzero(self.std > 0).flatten()

    @classmethod
    def from_scheduler(cls, scheduler: SchedulerMixin, num_inference_steps: int, eta: float = 1.0) -> Transitions:
        """Build the table.

        Args:
            scheduler: DDPMScheduler (variance fixed_small, fixed_small_log or fixed_large) or DDIMScheduler; epsilon-,
                v- or sample-prediction; leading, trailing or linspace spacing. It is not changed.
            num_inference_steps: T, at most the scheduler's training timesteps.
            eta: DDIM's share of noise, 0 < eta <= 1. DDPM has none; 1 is its only value.
        Raises: UserError naming the setting to change, if a step is not such a linear Gaussian, or divides by zero.
        Source: DDPM (arXiv:2006.11239) eqs. 6, 7; DDIM (arXiv:2010.02502) eqs. 12, 16.
        """
        name, config = type(scheduler).__name__, scheduler.config
        check_settings(scheduler, num_inference_steps, eta)
        scheduler = copy.deepcopy(scheduler)  # set_timesteps changes a scheduler; leave the caller's alone
        try:
            scheduler.set_timesteps(num_inference_steps)
        except (ValueError, TypeError) as error:
            raise UserError(
                f"{name} refuses sampler.num_inference_steps {num_inference_steps} ({' '.join(str(error).split())}); correct "
                "its scheduler_config.json, or take another number of steps"
            ) from None
        timesteps = scheduler.timesteps.to("cpu", torch.int64)
        alphas = scheduler.alphas_cumprod.to("cpu", torch.float64)
        check_timesteps(timesteps, config, name, num_inference_steps)
        alpha = alphas[timesteps]
        if isinstance(scheduler, DDPMScheduler):
            columns = ddpm_columns(config, timesteps, alphas)
        else:
            final = scheduler.final_alpha_cumprod.to("cpu", torch.float64)
            columns = ddim_columns(config, timesteps, alphas, final, num_inference_steps, eta)
        sample_coef, output_coef, std = columns
        check_steps(timesteps, alpha, columns, config, name)
        std = torch.where(std > NO_NOISE, std, 0.0)
        if not bool((std > 0).any()):
            raise UserError(
                f"{name} with {num_inference_steps} steps adds no noise at any step; raise sampler.num_inference_steps"
                + (f", or sampler.eta, which is {eta}" if eta < 1 else "")
            )
        return cls(timesteps, sample_coef, output_coef, std, float(scheduler.init_noise_sigma))


def check_settings(scheduler: SchedulerMixin, num_inference_steps: int, eta: float) -> None:
    """Raises: UserError naming the setting that makes a step no Gaussian with a mean linear in the model output."""
    name = type(scheduler).__name__
    if not isinstance(scheduler, (DDPMScheduler, DDIMScheduler)):
        raise UserError(
            f"scheduler {name} has no Gaussian step that PRDP can train; "
            "use DDPMScheduler or DDIMScheduler (both load from the same configuration)"
        )
    config = scheduler.config
    for setting in ("clip_sample", "thresholding"):
        if getattr(config, setting, False):
            raise UserError(
                f"{name}: {setting}=True makes the step's mean non-linear in the model output; set {setting}=False "
                "in scheduler_config.json"
            )
    trained = config.num_train_timesteps
    if not 1 <= num_inference_steps <= trained:
        raise UserError(
            f"sampler.num_inference_steps is {num_inference_steps}; expected 1 to {trained}, the model's training timesteps"
        )
    if not 0 < eta <= 1:
        raise UserError(
            f"sampler.eta is {eta}; expected 0 < eta <= 1: without noise a step has no density and nothing can be trained"
        )
    if isinstance(scheduler, DDPMScheduler) and eta != 1:
        raise UserError(f"sampler.eta is {eta}, but DDPMScheduler has no eta; leave it at 1 or use DDIMScheduler")


Pair = tuple[torch.Tensor, torch.Tensor]  # coefficients of (x_t, model output), (T,) float64 each
Columns = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # sample_coef, output_coef and std, (T,) float64 each


def x0_and_epsilon(config: Any, alpha: torch.Tensor) -> tuple[Pair, Pair]:
    """What the model predicts, as combinations of (x_t, model output). alpha: (T,) alphas_cumprod at the timesteps."""
    root_alpha, root_beta = alpha.sqrt(), (1 - alpha).sqrt()
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    match config.prediction_type:
        case "epsilon":
            return (1 / root_alpha, -root_beta / root_alpha), (zero, one)
        case "v_prediction":
            return (root_alpha, -root_beta), (root_beta, root_alpha)
        case "sample":
            return (zero, one), (1 / root_beta, -root_alpha / root_beta)
    raise UserError(f"the scheduler's prediction_type is {config.prediction_type!r}; expected epsilon, v_prediction or sample")


def ddpm_columns(config: Any, timesteps: torch.Tensor, alphas: torch.Tensor) -> Columns:
    """DDPM goes from each timestep to the next one of the schedule, eqs. 6 and 7. alphas: alphas_cumprod."""
    alpha = alphas[timesteps]
    beta = 1 - alpha
    x0, _ = x0_and_epsilon(config, alpha)
    previous = torch.cat([timesteps[1:], torch.tensor([-1])])
    alpha_prev = torch.where(previous >= 0, alphas[previous.clamp(min=0)], 1.0)
    step_alpha = alpha / alpha_prev
    x0_coef = alpha_prev.sqrt() * (1 - step_alpha) / beta
    sample_coef = step_alpha.sqrt() * (1 - alpha_prev) / beta + x0_coef * x0[0]
    output_coef = x0_coef * x0[1]
    match config.variance_type:
        case "fixed_small" | "fixed_small_log":
            variance = (1 - alpha_prev) / beta * (1 - step_alpha)
        case "fixed_large":
            variance = 1 - step_alpha
        case other:
            raise UserError(f"DDPMScheduler: variance_type is {other!r}; expected fixed_small, fixed_small_log or fixed_large")
    std = variance.clamp(min=0).sqrt()
    std[timesteps == 0] = 0  # diffusers adds no noise at t = 0
    return sample_coef, output_coef, std


def ddim_columns(
    config: Any, timesteps: torch.Tensor, alphas: torch.Tensor, final: torch.Tensor, num_inference_steps: int, eta: float
) -> Columns:
    """DDIM counts back by num_train_timesteps // T, eqs. 12 and 16. final: alphas_cumprod beyond the last step."""
    alpha = alphas[timesteps]
    beta = 1 - alpha
    x0, epsilon = x0_and_epsilon(config, alpha)
    previous = timesteps - config.num_train_timesteps // num_inference_steps
    alpha_prev = torch.where(previous >= 0, alphas[previous.clamp(min=0)], final)
    variance = (1 - alpha_prev) / beta * (1 - alpha / alpha_prev)
    std = eta * variance.clamp(min=0).sqrt()
    direction = (1 - alpha_prev - std.square()).clamp(min=0).sqrt()
    sample_coef = alpha_prev.sqrt() * x0[0] + direction * epsilon[0]
    output_coef = alpha_prev.sqrt() * x0[1] + direction * epsilon[1]
    return sample_coef, output_coef, std


def check_timesteps(timesteps: torch.Tensor, config: Any, name: str, steps: int) -> None:
    """Raises: UserError if a timestep is none that the model was trained at."""
    trained = config.num_train_timesteps
    outside = timesteps[(timesteps < 0) | (timesteps >= trained)]
    if len(outside):
        raise UserError(
            f"{name}: sampler.num_inference_steps {steps} with timestep_spacing {config.timestep_spacing!r} and steps_offset "
            f"{getattr(config, 'steps_offset', 0)} asks for timestep {int(outside[0])}; expected 0 to {trained - 1}: take "
            "another num_inference_steps, or correct scheduler_config.json"
        )


def check_steps(timesteps: torch.Tensor, alpha: torch.Tensor, table: tuple[torch.Tensor, ...], config: Any, name: str) -> None:
    """Refuse a schedule with a step that divides by zero.

    Args:
        alpha: (T,) float64, alphas_cumprod at the timesteps.
        table: sample_coef, output_coef and std, (T,) float64 each.
    Raises: UserError naming the step and the setting that makes it so.
    """
    sound = torch.stack([column.float().isfinite() for column in table]).all(0)  # the denoiser's latents are float32
    sound &= (alpha >= 0) & (alpha <= 1)
    prediction, spacing = config.prediction_type, config.timestep_spacing
    rescaled = getattr(config, "rescale_betas_zero_snr", False)
    if prediction == "epsilon" and rescaled:
        sound &= alpha > NO_SIGNAL
    if bool(sound.all()):
        return
    step = int((~sound).nonzero()[0])
    value = float(alpha[step])
    where = f"{name}: step {step} of {len(timesteps)} (timestep {int(timesteps[step])}) divides by zero"
    if prediction == "epsilon" and 0 <= value <= NO_SIGNAL:
        cause = "rescale_betas_zero_snr=True leaves" if rescaled else "the schedule's betas leave"
        mends = ["rescale_betas_zero_snr=False"] if rescaled else ["betas below 1"]
        mends += [f"timestep_spacing 'leading' (it is {spacing!r})"] if spacing != "leading" else []
        raise UserError(
            f"{where}: {cause} no signal there (alphas_cumprod {abs(value):.1g}), and prediction_type 'epsilon' divides by it; "
            f"in scheduler_config.json set {' or '.join(mends)}, or take a model of prediction_type 'v_prediction'"
        )
    if value == 1:
        raise UserError(
            f"{where}: the schedule has no noise there (beta 0, alphas_cumprod 1) with prediction_type {prediction!r}; set "
            "beta_start (or trained_betas) above 0 in scheduler_config.json"
        )
    raise UserError(
        f"{where} or has no real variance: alphas_cumprod is {value:.3g} there; expected it to fall from below 1 to above 0: "
        "correct beta_schedule, beta_start, beta_end or trained_betas in scheduler_config.json"
    )
