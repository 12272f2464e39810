"""The samplers of flow-matching models, against each published step as its authors write it, diffusers' own step and the closed
forms of Gaussian data."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)  # fmt: skip

from prdp_fast.config.recipe import RandomSteps
from prdp_fast.core.errors import UserError
from prdp_fast.sampling.flow import SAMPLERS, exact_columns, ode_columns
from prdp_fast.sampling.policy import Policy
from prdp_fast.sampling.transitions import Transitions

METHODS = list(SAMPLERS)
NOISE = {"flow_sde": 0.7, "dance_sde": 0.3, "cps": 0.8, "exact": 0.7, "exact_dance": 0.3}  # their defaults
# Configuration, and what a pipeline gives to set_timesteps.
SCHEDULES = {
    "static": ({"shift": 3.0}, {}),
    "unshifted": ({}, {}),
    "dynamic": ({"use_dynamic_shifting": True}, {"mu": 0.8}),
    "dynamic, linear": ({"use_dynamic_shifting": True, "time_shift_type": "linear"}, {"mu": 3.2}),
    "resolution": ({"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}, {"mu": 1.15, "sigmas": True}),
    "terminal": ({"use_dynamic_shifting": True, "shift_terminal": 0.1}, {"mu": 0.9}),
    "karras": ({"shift": 3.0, "use_karras_sigmas": True}, {}),
}
STEPS = (1, 2, 5, 10, 28)


def schedule(name: str, steps: int) -> tuple[FlowMatchEulerDiscreteScheduler, dict]:
    settings, options = SCHEDULES[name]
    options = dict(options)
    if options.get("sigmas"):
        options["sigmas"] = np.linspace(1.0, 1 / steps, steps)  # as pipelines of packed latents make them
    return FlowMatchEulerDiscreteScheduler(**settings), options


def sigmas_of(name: str, steps: int) -> torch.Tensor:
    scheduler, options = schedule(name, steps)
    scheduler.set_timesteps(steps, **options)
    return scheduler.sigmas.double()


# Each step as its authors write it: (x, v, noise levels, step, noise level of the sampler, noise) -> mean and next latent.


def published_flow_sde(x, v, sigmas, i, a, noise):
    """Flow-GRPO's sde_step_with_logprob."""
    sigma, sigma_max, dt = sigmas[i], sigmas[1], sigmas[i + 1] - sigmas[i]
    std_dev = torch.sqrt(sigma / (1 - torch.where(sigma == 1, sigma_max, sigma))) * a
    mean = x * (1 + std_dev**2 / (2 * sigma) * dt) + v * (1 + std_dev**2 * (1 - sigma) / (2 * sigma)) * dt
    return mean, mean + std_dev * torch.sqrt(-dt) * noise


def published_dance_sde(x, v, sigmas, i, a, noise):
    """DanceGRPO's flux_step with its SDE solver."""
    sigma, dsigma = sigmas[i], sigmas[i + 1] - sigmas[i]
    x0 = x - sigma * v
    score = -(x - x0 * (1 - sigma)) / sigma**2
    mean = x + dsigma * v + (-0.5 * a**2 * score) * dsigma
    return mean, mean + noise * a * math.sqrt(-dsigma)


def published_cps(x, v, sigmas, i, a, noise):
    """Flow-CPS: predicted x0 and noise, recombined so that the variances add up to sigma'^2."""
    sigma, after = sigmas[i], sigmas[i + 1]
    std_dev = after * math.sin(a * math.pi / 2)
    x0, eps = x - sigma * v, x + v * (1 - sigma)
    mean = x0 * (1 - after) + eps * torch.sqrt(after**2 - std_dev**2)
    return mean, mean + std_dev * noise


def ou_moments(sigma: float, after: float, g_squared) -> tuple[float, float]:
    """What is left of the noise z in the latent at sigma', and the variance that it has gained: from the SDE alone, integrated.

    With x0 frozen dz = g^2 / (2 s^2) z ds + (g / s) dw, from s = sigma down to sigma'. In w = 1 / s the integrands are smooth.
    """
    nodes, weights = np.polynomial.legendre.leggauss(120)

    def integral(f, low, high):
        return (high - low) / 2 * float(np.sum(weights * f((high - low) / 2 * nodes + (high + low) / 2)))

    def rate(w):
        return g_squared(1 / w) / 2

    start, end = 1 / sigma, 1 / after
    kept = math.exp(-integral(rate, start, end))
    gained = integral(lambda w: 2 * rate(w) * np.exp(-2 * np.array([integral(rate, u, end) for u in w])), start, end)
    return kept, gained


def published_exact(x, v, sigmas, i, a, noise, *, dance: bool):
    sigma, after = float(sigmas[i]), float(sigmas[i + 1])
    if after == 0 or (sigma == 1 and not dance):  # an infinite integral: nothing of the noise is kept
        kept, gained = 0.0, 1.0
    else:
        kept, gained = ou_moments(sigma, after, lambda s: a**2 + 0 * s if dance else a**2 * s / (1 - s))
    x0, eps = x - sigma * v, x + (1 - sigma) * v
    mean = (1 - after) * x0 + after * kept * eps
    return mean, mean + after * math.sqrt(gained) * noise


PUBLISHED = {
    "flow_sde": published_flow_sde, "dance_sde": published_dance_sde, "cps": published_cps,
    "exact": partial(published_exact, dance=False), "exact_dance": partial(published_exact, dance=True),
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("method", METHODS)
def test_every_step_is_the_published_one(method: str, name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    for steps, a in ((10, NOISE[method]), (5, 0.55)):
        scheduler, options = schedule(name, steps)
        table = Transitions.from_scheduler(scheduler, steps, sampler=method, noise_level=a, **options)
        sigmas = sigmas_of(name, steps)
        assert table.timesteps.dtype == torch.float32
        for i in range(steps):
            x, v, noise = torch.randn(3, 50, dtype=torch.float64, generator=generator)
            if sigmas[i + 1] == 0:  # Flow-SDE and Dance-SDE would leave noise on the image
                mean, after = (x - sigmas[i] * v,) * 2
                assert table.std[i] == 0
            else:
                mean, after = PUBLISHED[method](x, v, sigmas, i, a, noise)
                assert table.std[i] > 0
            got = table.sample_coef[i] * x + table.output_coef[i] * v
            tolerance = 1e-12 if "exact" not in method else 1e-11  # that of the quadrature
            assert (got - mean).abs().max() < tolerance, f"mean of step {i} of {steps}"
            assert (got + table.std[i] * noise - after).abs().max() < tolerance, f"noise of step {i} of {steps}"


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", STEPS[1:])
def test_steps_outside_the_window_are_diffusers_own(name: str, steps: int) -> None:
    """Two windows leave out every step once."""
    for window in ((0, 0), (1, 1)) if steps > 2 else ((0, 0),):
        scheduler, options = schedule(name, steps)
        table = Transitions.from_scheduler(scheduler, steps, window=window, **options)
        scheduler.set_timesteps(steps, **options)
        assert torch.equal(table.timesteps, scheduler.timesteps)
        generator = torch.Generator().manual_seed(1)
        for i, t in enumerate(scheduler.timesteps):
            x, v = torch.randn(2, 4, 8, 8, generator=generator)
            after = scheduler.step(v, t, x).prev_sample
            if i == window[0]:
                assert table.std[i] > 0
                continue
            assert table.std[i] == 0
            got = table.sample_coef[i].float() * x + table.output_coef[i].float() * v
            torch.testing.assert_close(got, after, rtol=0, atol=2e-6)


@pytest.mark.parametrize("method", METHODS)
def test_without_noise_every_sampler_is_the_ode(method: str) -> None:
    """As noise^2, whose effect on the mean is of that order. The exact solution of Flow-GRPO's SDE forgets the noise at sigma = 1
    whatever its scale."""
    sigma = sigmas_of("static", 10)
    ode = torch.stack(ode_columns(sigma)[:2])
    errors = []
    for noise in (1e-3, 1e-4):
        table = Transitions.from_scheduler(FlowMatchEulerDiscreteScheduler(shift=3.0), 10, sampler=method, noise_level=noise)
        first = 1 if method == "exact" else 0
        errors.append((torch.stack([table.sample_coef, table.output_coef]) - ode)[:, first:-1].abs().max())
        assert table.std[first:].max() < 100 * noise
    assert errors[0] < 1e-3
    assert 99 < errors[0] / errors[1] < 101


def test_the_double_shifted_schedule_is_read_and_not_computed() -> None:
    """diffusers shifts SD3's static schedule when it is made and again in set_timesteps."""
    table = Transitions.from_scheduler(FlowMatchEulerDiscreteScheduler(shift=3.0), 10)
    levels = table.timesteps / 1000
    assert levels[-2].item() == pytest.approx(0.27805, abs=1e-5)
    assert levels[-1].item() == pytest.approx(0.0089286, abs=1e-7)
    once = 3 * np.linspace(1, 0.001, 10) / (1 + 2 * np.linspace(1, 0.001, 10))
    assert once[-1] == pytest.approx(0.002994, abs=1e-6), "shifted once it would end elsewhere: this test sees the difference"
    assert table.init_noise_sigma == 1


@pytest.mark.parametrize("method", METHODS)
def test_kappa_grows_to_the_end(method: str) -> None:
    """The factor between the model's output and a step's log-ratio, as the documentation has it."""
    table = Transitions.from_scheduler(FlowMatchEulerDiscreteScheduler(shift=3.0), 10, sampler=method)
    kappa = (table.output_coef.abs() / table.std)[:-1]
    assert (kappa.diff() > 0).all()
    first, before, last = {
        "flow_sde": (0.057, 0.82, 1.49), "dance_sde": (0.67, 1.52, 1.93), "cps": (0.044, 1.10, 32.2),
        "exact": (0.042, 1.34, 33.3), "exact_dance": (0.68, 2.02, 30.9),
    }[method]  # fmt: skip
    assert kappa[[0, -2, -1]].tolist() == pytest.approx([first, before, last], rel=0.02)


# The marginals of Gaussian data N(m, c^2), for which the true v is linear in x.


def moments(table: Transitions, sigma: torch.Tensor, m: float, c: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of the latent after each step, with the true v and from the true marginal at the first noise level."""
    mean, variance = (1 - sigma[0]) * m, ((1 - sigma[0]) * c) ** 2 + sigma[0] ** 2
    means, variances = [], []
    for i in range(len(sigma) - 1):
        s = sigma[i]
        gain = (1 - s) * c**2 / ((1 - s) ** 2 * c**2 + s**2)  # x0 = m + gain (x - (1 - s) m), the posterior mean
        slope = (1 - (1 - s) * gain) / s - gain  # of v = eps - x0 in x
        at_mean = (mean - (1 - s) * (m + gain * (mean - (1 - s) * m))) / s - (m + gain * (mean - (1 - s) * m))
        mean = table.sample_coef[i] * mean + table.output_coef[i] * at_mean
        variance = (table.sample_coef[i] + table.output_coef[i] * slope) ** 2 * variance + table.std[i] ** 2
        means.append(mean)
        variances.append(variance)
    return torch.stack(means), torch.stack(variances)


def error_at(method: str, steps: int, c: float, end: float = 0.3) -> tuple[float, float]:
    """Largest error of the mean and of the variance of the latent down to noise level `end`, from 0.9."""
    sigma = torch.linspace(0.9, end, steps + 1, dtype=torch.float64)
    columns = SAMPLERS[method].columns(sigma, NOISE[method])
    table = Transitions(sigma[:-1] * 1000, *columns, init_noise_sigma=1.0)
    mean, variance = moments(table, sigma, 1.7, c)
    true = (1 - sigma[1:]) ** 2 * c**2 + sigma[1:] ** 2
    return float((mean - (1 - sigma[1:]) * 1.7).abs().max()), float((variance - true).abs().max())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("c", [0.0, 0.5, 1.0])
def test_the_mean_of_the_marginals_is_exact(method: str, c: float) -> None:
    assert error_at(method, 4, c)[0] < 1e-12


@pytest.mark.parametrize("method", ["cps", "exact", "exact_dance"])
def test_the_variance_is_exact_where_x0_is_known(method: str) -> None:
    """At c = 0 the model knows x0, and freezing it over a step is no approximation: to rounding, in steps of any length."""
    for steps in (1, 2, 5):
        assert error_at(method, steps, 0.0)[1] < 1e-14
    for name in SCHEDULES:  # and down to the image on the real ones
        scheduler, options = schedule(name, 10)
        table = Transitions.from_scheduler(scheduler, 10, sampler=method, **options)
        sigma = sigmas_of(name, 10)
        mean, variance = moments(table, sigma, 1.7, 0.0)
        torch.testing.assert_close(mean, (1 - sigma[1:]) * 1.7, rtol=0, atol=1e-12)
        torch.testing.assert_close(variance, sigma[1:] ** 2, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("method", "c"), [("flow_sde", 0.0), ("dance_sde", 0.0), *((method, 0.5) for method in METHODS)])
def test_the_variance_is_right_to_first_order(method: str, c: float) -> None:
    """Half the step, half the error: of Flow-SDE and Dance-SDE even where x0 is known, of all where it is not, since they predict
    x0 once a step. But for CPS, which renews as much of the noise in a short step as in a long one: its error stays."""
    coarse, fine = error_at(method, 64, c)[1], error_at(method, 128, c)[1]
    assert coarse > 1e-5, "an error of rounding has no order"
    if method == "cps":
        assert 0.04 < fine < coarse < 1.05 * fine
    else:
        assert 1.9 < coarse / fine < 2.1


def test_one_step_of_the_sde_leaves_more_noise_than_the_model_expects() -> None:
    """What the documentation says of a long last step: .278 to .0089, at the default noise."""
    sigma = sigmas_of("static", 10)
    after = {}
    for method in ("flow_sde", "dance_sde", "cps", "exact"):
        table = Transitions.from_scheduler(FlowMatchEulerDiscreteScheduler(shift=3.0), 10, sampler=method)
        after[method] = float(moments(table, sigma, 0.0, 0.0)[1][-2].sqrt())
    assert after["cps"] == pytest.approx(float(sigma[-2])) == after["exact"]
    assert after["flow_sde"] > 20 * float(sigma[-2])
    assert after["dance_sde"] > 15 * float(sigma[-2])


# The density


@pytest.mark.parametrize("method", METHODS)
def test_log_prob_is_that_of_the_normal_distribution(method: str) -> None:
    table = Transitions.from_scheduler(FlowMatchEulerDiscreteScheduler(shift=3.0), 10, sampler=method, window=(1, 6))
    generator = torch.Generator().manual_seed(2)
    x, after, v = torch.randn(3, 6, 4, 3, 3, dtype=torch.float64, generator=generator)
    told = []

    def predict(denoiser, latents, timesteps, embeddings, *, guided):
        told.append(timesteps)
        return v

    policy = Policy(table, None, predict, backend="torch")
    assert torch.equal(table.stochastic, torch.arange(1, 7))
    got = policy.log_prob(None, x, after, table.stochastic, None, guided=False)
    for row, step in enumerate(range(1, 7)):
        mean = table.sample_coef[step] * x[row] + table.output_coef[step] * v[row]
        expected = torch.distributions.Normal(mean, table.std[step]).log_prob(after[row]).mean()
        torch.testing.assert_close(got[row], expected, rtol=1e-12, atol=1e-12)
    assert told[0].dtype == torch.float32
    assert torch.equal(told[0], table.timesteps[1:7])


def test_a_guidance_interval_is_of_the_flow_s_own_timesteps() -> None:
    table = Transitions.from_scheduler(FlowMatchEulerDiscreteScheduler(shift=3.0), 10)
    assert Policy(table, 4.0, None).guided.all(), "999.9 is below 1000: rounding it down would leave the first step out"
    policy = Policy(table, 4.0, None, guidance_interval=(465, 914))
    assert policy.guided.tolist() == [False, False, True, True, True, True, True, False, False, False]


# What is refused


FLOW = FlowMatchEulerDiscreteScheduler(shift=3.0)


@pytest.mark.parametrize(
    ("scheduler", "settings", "words"),
    [
        (FLOW, {"sampler": "euler"}, ["sampler.method", "'euler'", "flow_sde, dance_sde, cps, exact"]),
        (FLOW, {"noise_level": 0.0}, ["sampler.noise_level is 0", "above 0"]),
        (FLOW, {"noise_level": math.nan}, ["sampler.noise_level is nan"]),
        (FLOW, {"noise_level": math.inf}, ["sampler.noise_level is inf"]),
        (FLOW, {"noise_level": 1e30}, ["sampler.noise_level", "float32", "0.7"]),
        (FLOW, {"sampler": "cps", "noise_level": 1.2}, ["sampler.noise_level is 1.2", "at most 1 for cps"]),
        (FLOW, {"sampler": "exact", "noise_level": -1.0}, ["sampler.noise_level is -1", "for exact"]),
        (FLOW, {"window": (9, 9)}, ["sampler.stochastic_steps is [9, 9]", "no noise"]),
        (FLOW, {"window": (3, 10)}, ["sampler.stochastic_steps is [3, 10]", "last <= 9"]),
        (FLOW, {"window": (5, 3)}, ["sampler.stochastic_steps is [5, 3]", "first <= last"]),
        (FLOW, {"window": RandomSteps(count=2, first=4, last=9)}, ["step 9 adds no noise", "4 to 8"]),
        (FLOW, {"window": RandomSteps(count=4, first=2, last=4)}, ["a run of 4 of 3 steps"]),
        (FLOW, {"window": RandomSteps(count=2, first=12)}, ["{count: 2, first: 12, last: null}", "<= 9"]),
        (FLOW, {"eta": 0.5}, ["sampler.eta is 0.5", "sampler.noise_level"]),
        (FLOW, {"steps": 1}, ["no noise at any step", "num_inference_steps"]),
        (FLOW, {"steps": 2000}, ["num_inference_steps is 2000", "1 to 1000"]),
        (FLOW, {"sigmas": [1.0, 0.5]}, ["refuses", "num_inference_steps 10"]),
        (FLOW, {"sigmas": [0.9, 0.8, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]}, ["step 1 of 10", "fall"]),
        (FLOW, {"sigmas": [0.1 * k for k in range(1, 11)]}, ["step 0 of 10", "fall"]),
        (FLOW, {"sigmas": [1.5, *(0.1 * k for k in range(9, 0, -1))]}, ["noise level of", "expected 1 to 0"]),
        (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), {}, ["use_dynamic_shifting", "mu"]),
        (FlowMatchEulerDiscreteScheduler(invert_sigmas=True), {}, ["invert_sigmas=False"]),
        (FlowMatchHeunDiscreteScheduler(), {}, ["FlowMatchHeunDiscreteScheduler", "use FlowMatchEulerDiscreteScheduler"]),
        (EulerDiscreteScheduler(), {}, ["EulerDiscreteScheduler", "DDIMScheduler", "FlowMatchEulerDiscreteScheduler"]),
        (DDIMScheduler(clip_sample=False), {"sampler": "cps"}, ["sampler.method is cps", "DDIMScheduler has no sigmas"]),
        (DDPMScheduler(clip_sample=False), {"noise_level": 0.7}, ["sampler.noise_level is 0.7", "DDPMScheduler has no sigmas"]),
        (DDPMScheduler(clip_sample=False), {"window": (0, 3)}, ["sampler.stochastic_steps", "sampler.scheduler DDIMScheduler"]),
        (DDIMScheduler(clip_sample=False), {"window": (0, 10)}, ["sampler.stochastic_steps is [0, 10]", "last <= 9"]),
        (DDIMScheduler(clip_sample=False), {"window": (9, 9)}, ["sampler.stochastic_steps is [9, 9]", "no noise"]),
    ],
)  # fmt: skip
def test_what_no_table_can_be_made_of(scheduler, settings: dict, words: list[str]) -> None:
    settings = dict(settings)
    with pytest.raises(UserError) as caught:
        Transitions.from_scheduler(scheduler, settings.pop("steps", 10), settings.pop("eta", 1.0), **settings)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 330
    for word in words:
        assert word in message, message


def test_the_caller_s_scheduler_stays_as_it_is() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    before = scheduler.sigmas.clone()
    Transitions.from_scheduler(scheduler, 10)
    assert torch.equal(scheduler.sigmas, before)


def test_exact_keeps_the_noise_of_a_step_of_length_nothing() -> None:
    sigma = torch.tensor([0.5, 0.5 - 1e-9], dtype=torch.float64)
    sample, output, std = exact_columns(sigma, 0.7, "flow")
    assert sample.item() == pytest.approx(1, abs=1e-8)
    assert abs(output.item()) < 1e-8
    assert std.item() < 1e-4
