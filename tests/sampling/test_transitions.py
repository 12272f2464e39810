"""The table against diffusers' own `step`, and against numbers made by other people's code."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, PNDMScheduler
from diffusers.schedulers import scheduling_ddpm

from prdp_fast.core.errors import UserError
from prdp_fast.sampling.transitions import Transitions

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False, "steps_offset": 1}
ORACLE = np.load(Path(__file__).parents[1] / "data" / "ddim_eta1.npz")


def take_steps(scheduler, table: Transitions, steps: int, eta: float | None) -> None:
    """Step diffusers' scheduler and the table side by side in float64 from the same latents, outputs and noise."""
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == table.timesteps.tolist()
    generator = torch.Generator().manual_seed(0)
    for index, t in enumerate(scheduler.timesteps):
        sample, output, noise = torch.randn(3, 2, 4, 3, 5, dtype=torch.float64, generator=generator)
        mean = table.sample_coef[index] * sample + table.output_coef[index] * output
        expected = mean + table.std[index] * noise
        if eta is None:
            # diffusers draws DDPM's noise itself; hand it ours.
            with mock.patch.object(scheduling_ddpm, "randn_tensor", return_value=noise):
                got = scheduler.step(output, t, sample).prev_sample
        else:
            got = scheduler.step(output, t, sample, eta=eta, variance_noise=noise).prev_sample
        # diffusers computes its coefficients in float32 from float32 alphas: 1e-6 relative, worse where 1 - alpha cancels.
        assert torch.allclose(got, expected, rtol=2e-4, atol=2e-4), (
            f"step {index} (t={int(t)}): largest error {(got - expected).abs().max():.2e}"
        )


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [2, 7, 10, 50])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_small_log", "fixed_large"])
def test_ddpm_steps_as_diffusers(prediction: str, spacing: str, steps: int, variance: str) -> None:
    scheduler = DDPMScheduler(**SD, prediction_type=prediction, timestep_spacing=spacing, variance_type=variance)
    take_steps(scheduler, Transitions.from_scheduler(scheduler, steps), steps, None)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [2, 7, 10, 50])
@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("set_alpha_to_one", [False, True])
def test_ddim_steps_as_diffusers(prediction: str, spacing: str, steps: int, eta: float, set_alpha_to_one: bool) -> None:
    scheduler = DDIMScheduler(**SD, prediction_type=prediction, timestep_spacing=spacing, set_alpha_to_one=set_alpha_to_one)
    take_steps(scheduler, Transitions.from_scheduler(scheduler, steps, eta), steps, eta)


def test_the_last_step_of_ddpm_has_no_density() -> None:
    table = Transitions.from_scheduler(DDPMScheduler(**SD), 50)
    assert table.std[-1] == 0
    assert table.stochastic.tolist() == list(range(49))


def test_the_last_step_of_sd_ddim_has_a_density() -> None:
    table = Transitions.from_scheduler(DDIMScheduler(**SD, set_alpha_to_one=False), 50)
    assert len(table.stochastic) == 50
    assert table.std[-1] == pytest.approx(0.0206, abs=1e-4)


def test_ddim_eta_1_is_ddpm_on_all_other_steps() -> None:
    ddpm = Transitions.from_scheduler(DDPMScheduler(**SD), 50)
    ddim = Transitions.from_scheduler(DDIMScheduler(**SD, set_alpha_to_one=False), 50)
    for name in ("sample_coef", "output_coef", "std"):
        torch.testing.assert_close(getattr(ddpm, name)[:-1], getattr(ddim, name)[:-1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [10, 50])
def test_oracle_mean_and_std(prediction: str, steps: int) -> None:
    case = {name: ORACLE[f"{prediction}_T{steps}_f64_{name}"] for name in ("model_output", "x_t", "mean", "std", "step_index")}
    scheduler = DDIMScheduler(**SD, prediction_type=prediction, set_alpha_to_one=False)
    # The oracle's table in its own precision: the comparison is about the formula.
    scheduler.alphas_cumprod = torch.from_numpy(ORACLE[f"{prediction}_T{steps}_f64_alphas_cumprod"])
    scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    table = Transitions.from_scheduler(scheduler, steps)
    index = torch.from_numpy(case["step_index"])
    coefficients = [c[index][:, None, None, None].numpy() for c in (table.sample_coef, table.output_coef)]
    mean = coefficients[0] * case["x_t"] + coefficients[1] * case["model_output"]
    np.testing.assert_allclose(mean, case["mean"], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(table.std[index].numpy(), case["std"], rtol=1e-12)


@pytest.mark.parametrize(
    ("scheduler", "steps", "eta", "words"),
    [
        (DDIMScheduler(clip_sample=True), 10, 1.0, "clip_sample"),
        (DDPMScheduler(clip_sample=False, thresholding=True), 10, 1.0, "thresholding"),
        (DDIMScheduler(**SD), 10, 0.0, "eta"),
        (DDIMScheduler(**SD), 10, 1.5, "eta"),
        (DDPMScheduler(**SD), 10, 0.5, "DDPMScheduler has no eta"),
        (DDIMScheduler(**SD), 1001, 1.0, "1 to 1000"),
        (DDIMScheduler(**SD), 0, 1.0, "1 to 1000"),
        (DDPMScheduler(**SD, variance_type="learned"), 10, 1.0, "variance_type"),
        (DDPMScheduler(**SD), 1, 1.0, "adds no noise"),
        (PNDMScheduler(), 10, 1.0, "PNDMScheduler"),
        (DDIMScheduler(**SD, timestep_spacing="odd"), 10, 1.0, "odd is not supported"),
        # Timesteps that the model was never trained at: the table would wrap around or be out of bounds.
        (DDIMScheduler(**SD), 1000, 1.0, "steps_offset 1 asks for timestep 1000; expected 0 to 999"),
        (DDIMScheduler(**SD, timestep_spacing="trailing"), 463, 1.0, "asks for timestep -1"),
    ],
)
def test_refusals_name_the_setting(scheduler, steps: int, eta: float, words: str) -> None:
    with pytest.raises(UserError, match=words):
        Transitions.from_scheduler(scheduler, steps, eta)


ZERO_SNR = r"step 0 of 10 \(timestep 999\) divides by zero: rescale_betas_zero_snr=True leaves no signal.*'epsilon' divides by it"
NO_NOISE = r"step 9 of 10 \(timestep 0\) divides by zero: the schedule has no noise there \(beta 0"
BROKEN = r"step \d of 10 .* divides by zero or has no real variance.*correct beta_schedule, beta_start"


@pytest.mark.parametrize("scheduler", [DDIMScheduler, DDPMScheduler])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_a_schedule_without_signal_is_refused_where_its_last_timestep_is_sampled(scheduler, spacing: str) -> None:
    settings = SD | {"steps_offset": 0, "rescale_betas_zero_snr": True, "timestep_spacing": spacing}
    for prediction in ("v_prediction", "sample"):  # which divide by nothing there
        table = Transitions.from_scheduler(scheduler(**settings, prediction_type=prediction), 10)
        assert all(column.isfinite().all() for column in (table.sample_coef, table.output_coef, table.std))
    if spacing == "leading":
        assert Transitions.from_scheduler(scheduler(**settings), 10).sample_coef.isfinite().all()
        return
    with pytest.raises(UserError, match=ZERO_SNR) as caught:
        Transitions.from_scheduler(scheduler(**settings), 10)
    assert f"timestep_spacing 'leading' (it is {spacing!r})" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("scheduler", [DDIMScheduler, DDPMScheduler])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(
    ("betas", "words"),
    [
        ({"beta_start": 0.0, "beta_schedule": "linear"}, NO_NOISE),
        ({"trained_betas": [0.0] + [0.01] * 999}, NO_NOISE),
        ({"beta_end": float("nan")}, BROKEN),
        ({"beta_start": -0.001, "beta_schedule": "linear"}, BROKEN),
    ],
)
def test_betas_that_divide_by_zero_are_refused(scheduler, prediction: str, betas: dict, words: str) -> None:
    given = scheduler(**(SD | {"steps_offset": 0, "prediction_type": prediction} | betas))
    with pytest.raises(UserError, match=words):
        Transitions.from_scheduler(given, 10)


def test_the_callers_scheduler_is_not_changed() -> None:
    scheduler = DDIMScheduler(**SD)
    before = scheduler.timesteps.clone()
    Transitions.from_scheduler(scheduler, 10)
    assert torch.equal(scheduler.timesteps, before) and scheduler.num_inference_steps is None
