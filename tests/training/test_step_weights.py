"""Weights of steps in the mean over them: the objective's loss on scaled log-probs, and its exact gradient."""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from plain_engine import BETA, CLIP, REWARDS, PlainEngine, run
from small_model import small_family, small_trajectories, small_unet

from prdp_fast.config.recipe import RandomSteps
from prdp_fast.sampling.policy import Policy
from prdp_fast.sampling.transitions import Transitions
from prdp_fast.training.passes import log_prob_pass, reference_pass
from prdp_fast.training.step_weights import step_weights
from prdp_kernels import prdp_loss

RUN = RandomSteps(count=3, first=0, last=7)


def flow_policy(window=None) -> Policy:
    table = Transitions.from_scheduler(FlowMatchEulerDiscreteScheduler(shift=3.0), 10, sampler="cps", window=window)
    return Policy(table, 3.0, small_family().predict)


def test_they_even_out_kappa_and_have_mean_one() -> None:
    table = flow_policy().transitions
    steps = table.stochastic.expand(2, -1)
    weights = step_weights(table, "inverse_kappa", steps)
    torch.testing.assert_close(weights.mean(1), torch.ones(2))
    product = weights.double() * table.kappa[steps]
    torch.testing.assert_close(product, product[:, :1].expand_as(product), rtol=1e-6, atol=0)
    assert weights[0, 0] / weights[0, -1] > 700, "kappa of CPS grows from 0.044 to 32"
    drawn = torch.tensor([[0, 1, 2], [5, 6, 7]])
    torch.testing.assert_close(step_weights(table, "inverse_kappa", drawn).mean(1), torch.ones(2))
    assert step_weights(table, "uniform", steps) is None


@pytest.mark.parametrize(("window", "updates"), [((0, 3), 1), (RUN, 2)])
def test_the_gradient_is_that_of_the_weighted_loss(window, updates: int) -> None:
    policy, learning_rate, clip = flow_policy(window), 2e-3, CLIP
    trajectories = small_trajectories(policy, small_unet(0), dtype=torch.float64)
    weights = step_weights(policy.transitions, "inverse_kappa", trajectories.steps)
    reference, denoiser = small_unet(1, torch.float64).requires_grad_(False), small_unet(0, torch.float64).requires_grad_(True)

    def log_probs_of(model) -> torch.Tensor:
        """In one graph, a row at a time."""
        rows = []
        for row, steps in enumerate(trajectories.steps):
            one = trajectories.embedding_rows(torch.full((len(steps),), row))
            x, after = trajectories.latents[row, steps], trajectories.latents[row, steps + 1]
            rows.append(policy.log_prob(model, x, after, steps, one, guided=True))
        return torch.stack(rows)

    shape, scale = (2, 3, -1), weights.double()
    with torch.no_grad():
        old, ref = log_probs_of(denoiser), log_probs_of(reference)
    engine = PlainEngine(small_unet(0, torch.float64), learning_rate)
    report = run(policy, engine, reference, trajectories, updates, 4, step_weights=weights)
    for update in range(updates):
        scaled = ((scale * values).view(shape) for values in (log_probs_of(denoiser), old, ref))
        loss = prdp_loss(*scaled, REWARDS.view(2, 3), clip_range=clip, kl_weight=BETA, backend="torch")
        expected = torch.autograd.grad(loss, list(denoiser.parameters()))
        largest = max(float(gradient.abs().max()) for gradient in expected)
        for got, want, parameter in zip(engine.gradients[update], expected, denoiser.parameters(), strict=True):
            assert float((got - want).abs().max()) < 1e-9 * largest, f"update {update}"
            with torch.no_grad():
                parameter -= learning_rate * want
    if updates > 1:
        assert report.metrics["clip_fraction"] > 0

    plain = PlainEngine(small_unet(0, torch.float64), learning_rate)
    run(policy, plain, reference, trajectories, 1, 4)
    first, other = (torch.cat([g.flatten() for g in one.gradients[0]]) for one in (engine, plain))
    assert (first - other).norm() > 0.1 * other.norm(), "the weights change nothing here: this test would not see them missing"


def test_a_reference_subset_estimates_the_weighted_mean() -> None:
    """Of 4 steps 3: the strata {0}, {1}, {2, 3}. Every trajectory has one of two values, around the exact one."""
    policy = flow_policy((0, 3))
    trajectories = small_trajectories(policy, small_unet(0), dtype=torch.float64)
    trajectories.log_probs = log_prob_pass(policy, small_unet(0, torch.float64), trajectories, 8)
    weights, reference = step_weights(policy.transitions, "inverse_kappa", trajectories.steps), small_unet(1, torch.float64)
    exact = reference_pass(policy, reference, trajectories, 8)
    part = reference_pass(policy, reference, trajectories, 8, 3, weights)
    assert part.denoiser_rows < exact.denoiser_rows
    terms = weights * (trajectories.log_probs - exact.log_probs)
    got = (weights * (trajectories.log_probs - part.log_probs)).mean(1)
    either = torch.stack([(terms[:, 0] + terms[:, 1] + 2 * terms[:, other]) / 4 for other in (2, 3)], 1)
    distance = (got[:, None] - either).abs().min(1)
    assert distance.values.max() < 1e-6 * either.abs().max()  # weights are float32
    assert set(distance.indices.tolist()) == {0, 1}
    torch.testing.assert_close(either.mean(1), terms.mean(1))


def test_a_subset_of_an_update_keeps_the_weighted_gradient_s_scale() -> None:
    """One of one stratum of each step: the whole gradient; and a smaller subset has other rows, with the weights of the whole."""
    policy = flow_policy((0, 3))
    trajectories = small_trajectories(policy, small_unet(0), dtype=torch.float64)
    weights, reference = step_weights(policy.transitions, "inverse_kappa", trajectories.steps), small_unet(1, torch.float64)
    every = PlainEngine(small_unet(0, torch.float64), 0.0)
    run(policy, every, reference, trajectories, 1, 4, step_weights=weights)
    whole = torch.cat([g.flatten() for g in every.gradients[0]])
    mean = torch.zeros_like(whole)
    draws = 40
    for number in range(draws):
        trajectories.seeds = torch.arange(6) + 100 * number
        engine = PlainEngine(small_unet(0, torch.float64), 0.0)
        run(policy, engine, reference, trajectories, 1, 4, timesteps=3, step_weights=weights)
        mean += torch.cat([g.flatten() for g in engine.gradients[0]]) / draws
    assert (mean - whole).norm() < 0.25 * whole.norm()
    assert torch.nn.functional.cosine_similarity(mean, whole, dim=0) > 0.97
