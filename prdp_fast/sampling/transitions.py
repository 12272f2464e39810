"""One table for every scheduler: each step is linear in the latent and the model output.

    x_{t-1} = sample_coef[t] * x_t + output_coef[t] * m + std[t] * noise

The table is computed once, in float64. For DDPM and DDIM it comes from the scheduler's own `alphas_cumprod`, `timesteps`,
prediction type and final alpha, and steps exactly as diffusers does (DDIM counts back by num_train_timesteps // T, DDPM goes to
the next timestep). For flow matching it comes from the scheduler's `sigmas`: see `flow`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin

from prdp_fast.config.recipe import RandomSteps
from prdp_fast.core.errors import UserError
from prdp_fast.sampling.draws import WINDOW_STREAM, uniform_integers
from prdp_fast.sampling.flow import Columns, check_flow_settings, flow_columns, merged, set_flow_timesteps

# The first and last step that may be noisy, or where each trajectory's own run of them may lie.
Window = tuple[int, int] | RandomSteps

# DDPM clamps its last variance to 1e-20 "because we always take the log"; such a step adds no noise and has no density.
NO_NOISE = 1e-9
# What diffusers' DDPMScheduler writes in place of a terminal alpha of 0, "so that the first sigma is not inf".
NO_SIGNAL = 2.0**-24


@dataclass(frozen=True)
class RandomWindow:
    """Each trajectory has noise at a run of consecutive steps of its own."""

    count: int
    plain: Columns  # the steps without noise; std is 0


@dataclass(frozen=True)
class Transitions:
    """The T steps of one sampling schedule, first step first."""

    timesteps: torch.Tensor  # (T,) what the denoiser is told: int64, or of a flow-matching model float32
    sample_coef: torch.Tensor  # (T,) float64
    output_coef: torch.Tensor  # (T,) float64
    std: torch.Tensor  # (T,) float64; exactly 0 for a deterministic step
    init_noise_sigma: float  # standard deviation of x_T
    window: RandomWindow | None = None  # where trajectories have noise at different steps

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def stochastic(self) -> torch.Tensor:
        """int64: the steps that have a density in any trajectory. The others are taken, and are no part of any log-prob."""
        return torch.nonzero(self.std > 0).flatten()

    @property
    def possible_steps(self) -> torch.Tensor:
        """(windows, S) int64: the stochastic steps that a trajectory may have, each row equally likely. Without random windows
        there is one row."""
        stochastic = self.stochastic
        return stochastic[None] if self.window is None else stochastic.unfold(0, self.window.count, 1)

    @property
    def trained(self) -> int:
        """S, the number of stochastic steps that every trajectory has."""
        return self.possible_steps.shape[1]

    @property
    def kappa(self) -> torch.Tensor:
        """(T,) float64, |output_coef| / std: how a change of the model's output counts in a step's log-prob, which is linear in
        it. Infinite for a deterministic step."""
        return self.output_coef.abs() / self.std

    def steps_of(self, seeds: torch.Tensor) -> torch.Tensor:
        """(N, S) int64 on the CPU: the stochastic steps of the trajectories with these noise keys, (N,) int64."""
        possible = self.possible_steps
        if len(possible) == 1:
            return possible.repeat(len(seeds), 1)
        return possible[uniform_integers(seeds, torch.tensor([len(possible)]), WINDOW_STREAM)[:, 0]]

    @classmethod
    def from_scheduler(
        cls, scheduler: SchedulerMixin, num_inference_steps: int, eta: float = 1.0, *, sampler: str | None = None,
        noise_level: float | None = None, window: Window | None = None, mu: float | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> Transitions:  # fmt: skip
        """Build the table.

        Args:
            scheduler: DDPMScheduler (variance fixed_small, fixed_small_log or fixed_large) or DDIMScheduler; epsilon-,
                v- or sample-prediction; leading, trailing or linspace spacing. Or FlowMatchEulerDiscreteScheduler, with any
                shift. It is not changed.
            num_inference_steps: T, at most the scheduler's training timesteps.
            eta: DDIM's share of noise, 0 < eta <= 1. DDPM and flow matching have none; 1 is their only value.
            sampler: of flow matching, how noisy steps are taken: a key of `flow.SAMPLERS`; None: Flow-SDE.
            noise_level: of flow matching; None: the sampler's default.
            window: the first and last number of the steps that may be noisy. The others are those of the ODE: DDIM's with eta 0,
                or Euler's of a flow. None: all may be. RandomSteps: each trajectory has a run of so many of them, drawn from its
                noise key.
            mu, sigmas: of flow matching, what the model's pipeline gives to `set_timesteps`.
        Raises: UserError naming the setting to change, if a step is not such a linear Gaussian, or divides by zero.
        Source: DDPM (arXiv:2006.11239) eqs. 6, 7; DDIM (arXiv:2010.02502) eqs. 12, 16; flow matching: see `flow`.
        """
        check_class(scheduler, sampler, noise_level)
        first, last = check_window(window, num_inference_steps)
        scheduler = copy.deepcopy(scheduler)  # set_timesteps changes a scheduler; leave the caller's alone
        if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            check_flow_settings(scheduler, num_inference_steps, eta, mu)
            set_flow_timesteps(scheduler, num_inference_steps, mu, sigmas)
            noisy, plain = flow_columns(scheduler, num_inference_steps, sampler, noise_level)
            timesteps, init_noise_sigma = scheduler.timesteps.to("cpu", torch.float32), 1.0
        else:
            check_settings(scheduler, num_inference_steps, eta, window)
            timesteps, noisy, plain = beta_columns(scheduler, num_inference_steps, eta)
            init_noise_sigma = float(scheduler.init_noise_sigma)
        if window is not None:
            numbers = torch.arange(num_inference_steps)
            noisy = merged(noisy, plain, (first <= numbers) & (numbers <= last))
        sample_coef, output_coef, std = noisy
        std = torch.where(std > NO_NOISE, std, 0.0)
        if not bool((std > 0).any()):
            raise UserError(nothing_noisy(scheduler, num_inference_steps, eta, window))
        random = None
        if isinstance(window, RandomSteps):
            check_random_window(window, std)
            random = RandomWindow(window.count, plain)
        return cls(timesteps, sample_coef, output_coef, std, init_noise_sigma, random)


def check_class(scheduler: SchedulerMixin, sampler: str | None, noise_level: float | None) -> None:
    """Raises: UserError if no table can be made of such a scheduler, or settings are given that it does not have."""
    name = type(scheduler).__name__
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return
    if not isinstance(scheduler, (DDPMScheduler, DDIMScheduler)):
        if "FlowMatch" in name or getattr(scheduler.config, "use_flow_sigmas", False):
            raise UserError(
                f"scheduler {name} of a flow-matching model does not step as PRDP's samplers do; use "
                "FlowMatchEulerDiscreteScheduler in scheduler_config.json"
            )
        raise UserError(
            f"scheduler {name} has no Gaussian step that PRDP can train; use DDPMScheduler or DDIMScheduler (both load from the "
            "same configuration), or of a flow-matching model FlowMatchEulerDiscreteScheduler"
        )
    for setting, value in (("method", sampler), ("noise_level", noise_level)):
        if value is not None:
            raise UserError(
                f"sampler.{setting} is {value}, but {name} has no sigmas: its model is no flow-matching one; set it null "
                "(sampler.scheduler and sampler.eta choose the noise of this one)"
            )


def check_window(window: Window | None, steps: int) -> tuple[int, int]:
    """The first and last step that may be noisy. Raises: UserError unless they lie inside the schedule."""
    match window:
        case None:
            return 0, steps - 1
        case RandomSteps():
            first, last = window.first, steps - 1 if window.last is None else window.last
        case _:
            first, last = window
    if not 0 <= first <= last < steps:
        raise UserError(
            f"sampler.stochastic_steps is {told_window(window)}; expected 0 <= first <= last <= {steps - 1}, numbers of the "
            f"{steps} steps of sampler.num_inference_steps, the noisiest first"
        )
    return first, last


def check_random_window(window: RandomSteps, std: torch.Tensor) -> None:
    """Raises: UserError unless every trajectory would have noise at as many steps as the others.

    Args: std: (T,) float64, 0 outside of first..last. A last that is left out is the last step with noise.
    """
    noisy = torch.nonzero(std > 0).flatten()
    first, end = int(noisy[0]), int(noisy[-1])
    silent = [step for step in range(window.first, end if window.last is None else window.last + 1) if std[step] == 0]
    if silent:
        raise UserError(
            f"sampler.stochastic_steps is {told_window(window)}, but step {silent[0]} adds no noise; every step that a random "
            f"run may take has to: set first and last inside {first} to {end}"
        )
    if window.count > len(noisy):
        raise UserError(
            f"sampler.stochastic_steps is {told_window(window)}, a run of {window.count} of {len(noisy)} steps; lower count, or "
            "widen first to last"
        )


def told_window(window: Window) -> str:
    """As a recipe has it."""
    if isinstance(window, RandomSteps):
        last = "null" if window.last is None else window.last
        return f"{{count: {window.count}, first: {window.first}, last: {last}}}"
    return f"[{window[0]}, {window[1]}]"


def nothing_noisy(scheduler: SchedulerMixin, steps: int, eta: float, window: Window | None) -> str:
    """What is wrong with a table without noise."""
    name = type(scheduler).__name__
    if window is not None:
        return (
            f"sampler.stochastic_steps is {told_window(window)}, but {name} with {steps} steps adds no noise at any of "
            "them (the last step of a schedule is deterministic): take earlier steps, or null for all"
        )
    lower = f", or sampler.eta, which is {eta}" if eta < 1 else ""
    return f"{name} with {steps} steps adds no noise at any step; raise sampler.num_inference_steps{lower}"


def beta_columns(scheduler: SchedulerMixin, steps: int, eta: float) -> tuple[torch.Tensor, Columns, Columns]:
    """The timesteps, (T,) int64, the noisy steps and those of the ODE, of DDPM or DDIM. Raises: UserError."""
    name, config = type(scheduler).__name__, scheduler.config
    try:
        scheduler.set_timesteps(steps)
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{name} refuses sampler.num_inference_steps {steps} ({' '.join(str(error).split())}); correct its "
            "scheduler_config.json, or take another number of steps"
        ) from None
    timesteps = scheduler.timesteps.to("cpu", torch.int64)
    alphas = scheduler.alphas_cumprod.to("cpu", torch.float64)
    check_timesteps(timesteps, config, name, steps)
    if isinstance(scheduler, DDPMScheduler):
        noisy = plain = ddpm_columns(config, timesteps, alphas)
    else:
        final = scheduler.final_alpha_cumprod.to("cpu", torch.float64)
        noisy, plain = (ddim_columns(config, timesteps, alphas, final, steps, share) for share in (eta, 0.0))
    check_steps(timesteps, alphas[timesteps], noisy, config, name)
    return timesteps, noisy, plain


def check_settings(scheduler: SchedulerMixin, num_inference_steps: int, eta: float, window: Window | None) -> None:
    """Raises: UserError naming the setting that makes a step no Gaussian with a mean linear in the model output."""
    name = type(scheduler).__name__
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
    if isinstance(scheduler, DDPMScheduler) and window is not None:
        raise UserError(
            f"sampler.stochastic_steps is {told_window(window)}, but DDPMScheduler has no step without noise for the others; set "
            "sampler.scheduler DDIMScheduler, whose noisy steps are the same but for the last"
        )


Pair = tuple[torch.Tensor, torch.Tensor]  # coefficients of (x_t, model output), (T,) float64 each


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
