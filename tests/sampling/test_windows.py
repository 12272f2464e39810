"""Windows: which steps of a trajectory are noisy and trained, fixed or drawn for each; the others are the ODE's."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from plain_engine import BETA, CLIP, REWARDS, PlainEngine, run
from small_model import SHAPE, small_embeddings, small_family, small_trajectories, small_unet

from prdp_fast.config.recipe import RandomSteps, ScheduleSettings
from prdp_fast.core.records import Prompt, Trajectories
from prdp_fast.planning.cost import epoch_rows
from prdp_fast.sampling.draws import UPDATE_STREAM, WINDOW_STREAM, uniform_integers
from prdp_fast.sampling.policy import Policy
from prdp_fast.sampling.rollout import noise_seeds, rollout
from prdp_fast.sampling.rows import RowCounts, count_rows, micro_batches, stratified
from prdp_fast.sampling.transitions import Transitions
from prdp_fast.training.passes import gradient_pass, log_prob_pass
from prdp_kernels import philox_normal, prdp_loss

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}
DDIM = DDIMScheduler(**SD, set_alpha_to_one=False, timestep_spacing="trailing", prediction_type="v_prediction")
FLOW = FlowMatchEulerDiscreteScheduler(shift=3.0)
RUN = RandomSteps(count=2, first=0, last=4)


def window_policy(kind: str, window, interval: tuple[int, int] | None = None) -> Policy:
    table = Transitions.from_scheduler({"ddim": DDIM, "flow": FLOW}[kind], 6, window=window)
    return Policy(table, 3.0, small_family().predict, guidance_interval=interval)


# The table


def test_ddim_outside_its_window_is_ddim_with_eta_0() -> None:
    table, whole = Transitions.from_scheduler(DDIM, 6, window=(1, 3)), Transitions.from_scheduler(DDIM, 6)
    assert table.stochastic.tolist() == [1, 2, 3]
    for column in ("sample_coef", "output_coef", "std"):
        assert torch.equal(getattr(table, column)[1:4], getattr(whole, column)[1:4])
    scheduler = DDIMScheduler.from_config(DDIM.config)
    scheduler.set_timesteps(6)
    x, output = torch.randn(2, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for step in (0, 4, 5):
        after = scheduler.step(output, scheduler.timesteps[step], x, eta=0.0).prev_sample
        got = table.sample_coef[step] * x + table.output_coef[step] * output
        torch.testing.assert_close(got, after, rtol=0, atol=1e-5)
        assert table.std[step] == 0
        assert (got - whole.sample_coef[step] * x - whole.output_coef[step] * output).abs().max() > 0.01, "eta changes nothing"


def test_runs_are_uniform_and_independent_of_other_draws() -> None:
    table = Transitions.from_scheduler(FLOW, 6, window=RUN)
    assert table.possible_steps.tolist() == [[0, 1], [1, 2], [2, 3], [3, 4]]
    assert table.trained == 2
    seeds = noise_seeds([Prompt(k, "", {}) for k in range(1000)], 16, seed=0, epoch=0)
    steps = table.steps_of(seeds)
    assert torch.equal(steps[:, 1], steps[:, 0] + 1)
    counts = steps[:, 0].bincount(minlength=4).double()
    assert (counts - 4000).square().sum() / 4000 < 16.3, f"chi-square beyond 1 in 1000: {counts.tolist()}"
    assert torch.equal(steps[5:9], table.steps_of(seeds[5:9])), "a run depends on its own trajectory alone"
    # From the same keys: the subset of an update, and the trajectory's noise.
    subset = stratified(seeds, 4, 1, UPDATE_STREAM)[:, 0]
    noise = philox_normal(seeds, (1,), step=0)[:, 0].double()
    start = steps[:, 0].double()
    for other in (subset.double(), noise):
        assert torch.corrcoef(torch.stack([start, other]))[0, 1].abs() < 0.03
    assert WINDOW_STREAM != UPDATE_STREAM
    assert uniform_integers(seeds, torch.tensor([1, 3]), WINDOW_STREAM).amax(0).tolist() == [0, 2]


# Trajectories


@pytest.mark.parametrize("kind", ["ddim", "flow"])
def test_a_random_run_s_trajectory_is_that_of_the_fixed_window(kind: str) -> None:
    denoiser, policy = small_unet(0), window_policy(kind, RUN)
    drawn = small_trajectories(policy, denoiser, groups=3)
    starts = drawn.steps[:, 0].tolist()
    assert len(set(starts)) > 1
    for start in set(starts):
        fixed = small_trajectories(window_policy(kind, (start, start + 1)), denoiser, groups=3)
        rows = [row for row, own in enumerate(starts) if own == start]
        assert torch.equal(drawn.latents[rows], fixed.latents[rows])
        assert torch.equal(drawn.log_probs[rows], fixed.log_probs[rows])
        assert torch.equal(drawn.steps[rows], fixed.steps[rows])
        others = [row for row in range(9) if row not in rows]
        assert (drawn.latents[others, -1] - fixed.latents[others, -1]).flatten(1).abs().amax(1).min() > 1e-3


@pytest.mark.parametrize("kind", ["ddim", "flow"])
def test_trajectories_depend_on_neither_batch_nor_ranks(kind: str) -> None:
    denoiser, policy, prompts = small_unet(0), window_policy(kind, RUN, (300, 900)), [Prompt(10 + g, "", {}) for g in range(4)]

    def sample(groups: slice, batch: int) -> Trajectories:
        embeddings = small_embeddings(4).rows(groups)
        return rollout(
            policy, denoiser, prompts[groups], embeddings, images_per_prompt=2, latent_shape=SHAPE, batch=batch, seed=3, epoch=1
        )  # fmt: skip

    whole = sample(slice(None), 64)
    for parts in ([(slice(None), 3)], [(slice(0, 2), 64), (slice(2, 4), 1)], [(slice(0, 4, 2), 2), (slice(1, 4, 2), 2)]):
        found = [sample(*part) for part in parts]
        order = torch.cat([torch.arange(8).view(4, 2)[groups].flatten() for groups, _ in parts])
        assert torch.equal(torch.cat([part.steps for part in found]), whole.steps[order])
        torch.testing.assert_close(torch.cat([part.latents for part in found]), whole.latents[order], rtol=0, atol=1e-5)
        torch.testing.assert_close(torch.cat([part.log_probs for part in found]), whole.log_probs[order], rtol=0, atol=1e-5)
    trained = log_prob_pass(policy, denoiser, whole, 5)
    torch.testing.assert_close(trained, whole.log_probs, rtol=0, atol=1e-5)


# Rows and micro-batches


@pytest.mark.parametrize("interval", [None, (600, 900), (0, 100)])
@pytest.mark.parametrize("size", [1, 5, 100])
def test_micro_batches_cover_every_row_once(interval, size: int) -> None:
    policy = window_policy("flow", RUN, interval)
    trajectories = small_trajectories(policy, small_unet(0), groups=4, images=2)
    seen = []
    for part in micro_batches(policy, trajectories, size):
        assert (policy.guided[part.steps] == part.guided).all()
        for row, x, previous, step in list(zip(part.rows, part.latents, part.prev_latents, part.steps, strict=True))[
            : part.count
        ]:
            trajectory, number = divmod(int(row), 2)
            assert step == trajectories.steps[trajectory, number]
            assert torch.equal(x, trajectories.latents[trajectory, step])
            assert torch.equal(previous, trajectories.latents[trajectory, step + 1])
            seen.append((trajectory, number))
    assert sorted(seen) == list(product(range(8), range(2)))


def test_ranks_with_other_draws_run_the_same_number_of_forwards() -> None:
    """Where a forward or backward communicates, a rank with one micro-batch less would leave the others waiting."""
    policy, denoiser = window_policy("flow", RUN, (800, 950)), small_unet(0)
    ranks = [small_trajectories(policy, denoiser, groups=2)]
    ranks.append(replace(ranks[0], steps=ranks[0].steps.flip(0) * 0 + torch.tensor([3, 4])))  # one that drew no guided step
    own = [count_rows(policy, rank) for rank in ranks]
    assert own[0].guided > 0 == own[1].guided
    agreed = RowCounts(*(max(pair) for pair in zip(*own, strict=True)))
    shapes, gradients = [], []
    for rank in ranks:
        parts = list(micro_batches(policy, rank, 2, counts=agreed))
        assert sum(part.count for part in parts) == 12
        shapes.append([(len(part.rows), part.guided) for part in parts])
        for counts in (None, agreed):
            trained = small_unet(0, torch.float64).requires_grad_(True)
            inputs = replace(rank, latents=rank.latents.double(), embeddings=small_embeddings(2, torch.float64))
            gradient_pass(
                policy, trained, inputs, torch.ones(6, 2).double(), 2, lambda loss, last: loss.backward(), counts=counts
            )
            gradients.append(torch.cat([parameter.grad.flatten() for parameter in trained.parameters()]))
    assert shapes[0] == shapes[1]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradients[2], gradients[3], rtol=1e-9, atol=1e-12)


# The gradient


def whole_log_probs(policy: Policy, denoiser, trajectories: Trajectories) -> torch.Tensor:
    """(N, S), trajectory by trajectory, written out from the definition."""
    table, rows = policy.transitions, []
    for row, steps in enumerate(trajectories.steps.tolist()):
        own = trajectories.embeddings.prompt_embeds[row // trajectories.images_per_prompt][None]
        both = torch.cat([trajectories.embeddings.negative_prompt_embeds, own])
        log_probs = []
        for step in steps:
            x, after = trajectories.latents[row, step], trajectories.latents[row, step + 1]
            uncond, cond = denoiser(torch.stack([x, x]), table.timesteps[step], encoder_hidden_states=both).sample
            output = uncond + policy.guidance_scale * (cond - uncond) if policy.guided[step] else cond
            mean = table.sample_coef[step] * x + table.output_coef[step] * output
            log_probs.append(torch.distributions.Normal(mean, table.std[step]).log_prob(after).mean())
        rows.append(torch.stack(log_probs))
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("kind", "window", "interval", "updates"),
    [
        ("ddim", (1, 3), None, 2), ("ddim", RUN, (300, 900), 1), ("flow", (0, 2), None, 1), ("flow", RUN, None, 2),
        ("flow", RUN, (800, 950), 2),
    ],
)  # fmt: skip
def test_the_gradient_is_autograd_through_the_whole_loss_over_the_window(kind, window, interval, updates: int) -> None:
    policy, learning_rate = window_policy(kind, window, interval), 2e-3
    trajectories = small_trajectories(policy, small_unet(0), dtype=torch.float64)
    reference, denoiser = small_unet(1, torch.float64).requires_grad_(False), small_unet(0, torch.float64).requires_grad_(True)
    with torch.no_grad():
        ref, old = (whole_log_probs(policy, model, trajectories).view(2, 3, -1) for model in (reference, denoiser))
    engine = PlainEngine(small_unet(0, torch.float64), learning_rate)
    report = run(policy, engine, reference, trajectories, updates, 4)
    assert set(report.drift_by_step) == set(trajectories.steps.flatten().tolist())
    for update in range(updates):
        log_probs = whole_log_probs(policy, denoiser, trajectories).view(2, 3, -1)
        loss = prdp_loss(log_probs, old, ref, REWARDS.view(2, 3), clip_range=CLIP, kl_weight=BETA, backend="torch")
        expected = torch.autograd.grad(loss, list(denoiser.parameters()))
        scale = max(float(gradient.abs().max()) for gradient in expected)
        for got, want, parameter in zip(engine.gradients[update], expected, denoiser.parameters(), strict=True):
            assert float((got - want).abs().max()) < 1e-9 * scale, f"update {update}"
            with torch.no_grad():
                parameter -= learning_rate * want


def test_a_subset_of_a_random_run_keeps_the_gradient_s_expectation() -> None:
    policy = window_policy("flow", RandomSteps(count=3))
    trajectories = small_trajectories(policy, small_unet(0), dtype=torch.float64)
    weights = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sizes = torch.tensor([1, 2, 2])  # of the strata {0}, {1, 2}

    def gradient(chosen: torch.Tensor | None) -> torch.Tensor:
        denoiser = small_unet(0, torch.float64).requires_grad_(True)
        scaled = weights if chosen is None else weights * sizes
        gradient_pass(policy, denoiser, trajectories, scaled, 5, lambda loss, last: loss.backward(), chosen=chosen)
        return torch.cat([parameter.grad.flatten() for parameter in denoiser.parameters()])

    halves = [gradient(torch.tensor([[0, second]]).expand(6, -1)) for second in (1, 2)]
    torch.testing.assert_close(sum(halves) / 2, gradient(None), rtol=1e-9, atol=1e-12)


# What it costs


@pytest.mark.parametrize("interval", [None, (700, 930)])
def test_the_cost_is_the_average_over_runs(interval) -> None:
    policy = window_policy("flow", RandomSteps(count=3, first=0, last=4), interval)
    schedule = ScheduleSettings(prompts_per_epoch=1, images_per_prompt=2, update_timesteps=2)
    rows = epoch_rows(schedule, policy, needs_reference=True)
    seeds = torch.arange(20_000)
    steps = policy.transitions.steps_of(seeds)
    chosen = steps.gather(1, stratified(seeds, 3, 2, UPDATE_STREAM))
    assert rows["reference"].forward == pytest.approx(2 * policy.evaluations(steps) / 20_000, rel=0.01)
    assert rows["update"].backward == pytest.approx(2 * policy.evaluations(chosen) / 20_000, rel=0.01)
    assert rows["rollout"].forward == 2 * policy.evaluations(torch.arange(6))
