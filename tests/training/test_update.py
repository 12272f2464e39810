"""The micro-batched gradient pass is the gradient of the whole loss."""

from __future__ import annotations

import pytest
import torch
from plain_engine import BETA, CLIP, REWARDS, PlainEngine, no_reduce, run
from small_model import SHAPE, WIDTH, small_policy, small_trajectories, small_unet

from prdp_fast.core.records import Trajectories
from prdp_fast.objectives import DdpoObjective, ObjectiveInput, PrdpObjective
from prdp_fast.sampling.rollout import finite_images, remove
from prdp_fast.sampling.rows import micro_batches, strata, stratified
from prdp_fast.training.engine import StepResult
from prdp_fast.training.passes import gradient_pass, log_prob_pass, reference_pass
from prdp_fast.training.update import drift_warning, run_updates
from prdp_kernels import prdp_loss


def whole_log_probs(policy, denoiser, trajectories: Trajectories) -> torch.Tensor:
    """All N * S log-probs in one graph, written out from the definition: no policy, no micro-batches, no kernels."""
    columns = []
    table = policy.transitions
    embeds = trajectories.embeddings.prompt_embeds.repeat_interleave(trajectories.images_per_prompt, 0)
    empty = trajectories.embeddings.negative_prompt_embeds.expand_as(embeds)
    for step in table.stochastic.tolist():
        x, previous = trajectories.latents[:, step], trajectories.latents[:, step + 1]
        t = table.timesteps[step]
        uncond = denoiser(x, t, encoder_hidden_states=empty).sample
        cond = denoiser(x, t, encoder_hidden_states=embeds).sample
        output = uncond + policy.guidance_scale * (cond - uncond)
        mean = table.sample_coef[step] * x + table.output_coef[step] * output
        columns.append(torch.distributions.Normal(mean, table.std[step]).log_prob(previous).mean((1, 2, 3)))
    return torch.stack(columns, 1)


def whole_loss_gradients(
    policy, denoiser, reference, trajectories, updates: int, learning_rate: float
) -> list[list[torch.Tensor]]:
    """K updates of plain SGD by autograd through the whole loss over all steps."""
    shape = (len(trajectories.prompts), trajectories.images_per_prompt, -1)
    denoiser.requires_grad_(True)
    with torch.no_grad():
        ref = whole_log_probs(policy, reference, trajectories).view(shape)
        old = whole_log_probs(policy, denoiser, trajectories).view(shape)
    gradients = []
    for _ in range(updates):
        log_probs = whole_log_probs(policy, denoiser, trajectories).view(shape)
        loss = prdp_loss(log_probs, old, ref, REWARDS.view(shape[:2]), clip_range=CLIP, kl_weight=BETA, backend="torch")
        gradients.append(list(torch.autograd.grad(loss, list(denoiser.parameters()))))
        with torch.no_grad():
            for parameter, gradient in zip(denoiser.parameters(), gradients[-1], strict=True):
                parameter -= learning_rate * gradient
    return gradients


@pytest.mark.parametrize("micro_batch", [1, 5, 7, 24, 1000])
@pytest.mark.parametrize("updates", [1, 3])
def test_two_pass_gradient_is_autograd_through_the_whole_loss(updates: int, micro_batch: int) -> None:
    policy, dtype, learning_rate = small_policy(), torch.float64, 2e-3
    trajectories = small_trajectories(policy, small_unet(0), dtype=dtype)
    reference = small_unet(1, dtype).requires_grad_(False)  # not the policy: log-ratios far from 0
    expected = whole_loss_gradients(policy, small_unet(0, dtype), reference, trajectories, updates, learning_rate)

    engine = PlainEngine(small_unet(0, dtype), learning_rate)
    report = run(policy, engine, reference, trajectories, updates, micro_batch)
    assert len(engine.gradients) == updates
    for update, (got, want) in enumerate(zip(engine.gradients, expected, strict=True)):
        scale = max(float(w.abs().max()) for w in want)
        for (name, _), g, w in zip(engine.denoiser.named_parameters(), got, want, strict=True):
            error = float((g - w).abs().max()) / scale
            assert error < 1e-9, f"update {update}, {name}: relative error {error:.1e} at {int((g - w).abs().argmax())}"
    if updates > 1:
        assert report.metrics["clip_fraction"] > 0, "the later updates never reached the clip: this test would not see it broken"


def test_all_clipped_pairs_stop_the_gradient() -> None:
    """Far outside the clip range, on the wrong side, nothing may flow: dropping the clip would be seen here."""
    objective = PrdpObjective(1.0, 1e-4, "torch")
    old = torch.zeros(1, 2, 3)
    log_probs = torch.tensor([[[0.5] * 3, [-0.5] * 3]])
    inputs = ObjectiveInput(log_probs, old, old.clone(), torch.tensor([[1.0, 0.9]]), 0.0, 0.0)
    # d = 1 overshoots dr = 0.1, so the unclipped branch wins and pushes back
    assert objective(inputs).weights.abs().max() > 0
    # d = 1 stays below dr = 2: the clipped branch is worse, wins, and is flat
    inputs = ObjectiveInput(log_probs, old, old.clone(), torch.tensor([[2.0, 0.0]]), 0.0, 0.0)
    assert objective(inputs).weights.abs().max() == 0


def test_equal_rewards_contribute_exactly_nothing() -> None:
    policy = small_policy()
    trajectories = small_trajectories(policy, small_unet(0))
    engine = PlainEngine(small_unet(0))
    run(policy, engine, small_unet(1), trajectories, 1, 8, rewards=torch.full((6,), 0.25))
    assert all(float(gradient.abs().max()) == 0 for gradient in engine.gradients[0])


def test_higher_reward_is_made_more_likely() -> None:
    policy = small_policy()
    denoiser = small_unet(0)
    trajectories = small_trajectories(policy, denoiser, groups=1, images=2)
    before = log_prob_pass(policy, denoiser, trajectories, 8).mean(1)
    run(policy, PlainEngine(denoiser, 1e-2), small_unet(0), trajectories, 1, 8, rewards=torch.tensor([1.0, 0.0]))
    after = log_prob_pass(policy, denoiser, trajectories, 8).mean(1)
    assert (after - before)[0] > (after - before)[1]
    assert after[0] > before[0]


def test_first_update_starts_at_ratio_zero_and_old_comes_from_the_training_path() -> None:
    """With a learning rate of 0 the second update's log-probs must equal `old` to the last bit."""
    policy = small_policy()
    trajectories = small_trajectories(policy, small_unet(0))
    seen: list[ObjectiveInput] = []

    class Spy(PrdpObjective):
        def __call__(self, batch: ObjectiveInput):
            seen.append(batch)
            return super().__call__(batch)

    run(policy, PlainEngine(small_unet(0), 0.0), small_unet(0), trajectories, 3, 8, Spy(BETA, CLIP, "torch"), REWARDS.float())
    assert len(seen) == 3
    for batch in seen:
        assert torch.equal(batch.log_probs, batch.old_log_probs)
        assert torch.equal(batch.old_log_probs, batch.ref_log_probs)


def test_fast_path_is_free_and_pass_one_runs_when_drift_would_show() -> None:
    policy = small_policy()
    trajectories = small_trajectories(policy, small_unet(0))
    rows = 2 * trajectories.log_probs.numel()  # guidance
    tight, loose = PrdpObjective(1e-5, CLIP, "torch"), PrdpObjective(1e3, CLIP, "torch")
    reports = [
        run(policy, PlainEngine(small_unet(0), 0.0), small_unet(0), trajectories, 1, 8, objective, REWARDS.float(), drift)
        for objective, drift in [(tight, 1e-6), (loose, 1e-3), (tight, None)]
    ]
    assert [report.free_first_pass for report in reports] == [True, False, False]
    assert [report.denoiser_rows for report in reports] == [rows, 2 * rows, 2 * rows]


def test_no_graph_is_longer_than_a_micro_batch() -> None:
    policy = small_policy()
    denoiser = small_unet(0).requires_grad_(True)
    trajectories = small_trajectories(policy, denoiser, groups=2, images=3)
    widths: list[int] = []
    denoiser.register_forward_pre_hook(lambda module, args: widths.append(len(args[0])))
    gradient_pass(policy, denoiser, trajectories, torch.ones_like(trajectories.log_probs), 5, lambda loss, last: loss.backward())
    assert trajectories.log_probs.numel() == 24
    assert widths == [10] * 5  # 5 rows, doubled by guidance; one row fills the last micro-batch up


@pytest.mark.parametrize("interval", [None, (0, 500), (500, 999)])
@pytest.mark.parametrize("size", [1, 7, 10, 100])
def test_micro_batches_cover_every_row_once(interval, size: int) -> None:
    policy = small_policy(interval=interval)
    trajectories = small_trajectories(policy, small_unet(0), groups=3, images=2)
    stochastic = policy.transitions.stochastic
    seen, denoiser_rows = [], set()
    for part in micro_batches(policy, trajectories, size):
        assert len(part.rows) == len(part.latents) == len(part.prev_latents) == len(part.embeddings.prompt_embeds)
        assert (policy.guided[part.steps] == part.guided).all()
        denoiser_rows.add(len(part.rows) * (2 if part.guided else 1))
        for row, x, previous, step, embeds in list(
            zip(part.rows, part.latents, part.prev_latents, part.steps, part.embeddings.prompt_embeds, strict=True)
        )[: part.count]:
            trajectory, number = divmod(int(row), len(stochastic))
            assert step == stochastic[number]
            assert torch.equal(x, trajectories.latents[trajectory, step])
            assert torch.equal(previous, trajectories.latents[trajectory, step + 1])
            assert torch.equal(embeds, trajectories.embeddings.prompt_embeds[trajectory // 2])
            seen.append((trajectory, number))
    assert sorted(seen) == [(row, number) for row in range(6) for number in range(len(stochastic))]
    assert max(denoiser_rows) <= 2 * size
    if interval is None:
        assert len(denoiser_rows) == 1


# A guidance interval is another policy, the same in every pass


def test_guidance_interval_is_one_policy_in_rollout_and_update() -> None:
    policy, denoiser = small_policy(interval=(300, 700)), small_unet(0)
    assert policy.guided.tolist() == [False, False, True, True, False]
    trajectories = small_trajectories(policy, denoiser)
    trained = log_prob_pass(policy, denoiser, trajectories, 4)
    torch.testing.assert_close(trained, trajectories.log_probs, rtol=0, atol=1e-5)
    plain, guided = small_policy(guidance_scale=None), small_policy()
    by_hand = [log_prob_pass(p, denoiser, trajectories, 4) for p in (plain, guided)]
    for number, step in enumerate(policy.transitions.stochastic):
        torch.testing.assert_close(trained[:, number], by_hand[int(policy.guided[step])][:, number], rtol=0, atol=1e-6)
    assert not torch.allclose(by_hand[0], by_hand[1], atol=1e-4), "guidance changes nothing here: this test would not see it"


def test_guidance_interval_costs_one_evaluation_outside() -> None:
    policy, denoiser = small_policy(interval=(300, 700)), small_unet(0)
    widths: list[int] = []
    denoiser.register_forward_pre_hook(lambda module, args: widths.append(len(args[0])))
    trajectories = small_trajectories(policy, denoiser)
    assert widths == [6, 6, 12, 12, 6]
    widths.clear()
    log_prob_pass(policy, denoiser, trajectories, 6)
    assert sum(widths) == 6 * policy.evaluations(policy.transitions.stochastic) == 6 * 6


# Subsets of the steps keep the gradient's expectation


def mean_gradient(policy, weights_of, choices, trajectories) -> list[torch.Tensor]:
    """The average of the gradients of sum(weights * log_prob) over equally likely choices of steps."""
    denoiser = small_unet(0, torch.float64).requires_grad_(True)
    for chosen in choices:
        weights = weights_of(chosen) / len(choices)
        gradient_pass(policy, denoiser, trajectories, weights, 5, lambda loss, last: loss.backward(), chosen=chosen)
    return [parameter.grad for parameter in denoiser.parameters()]


def assert_same_gradient(got: list[torch.Tensor], want: list[torch.Tensor]) -> None:
    scale = max(float(w.abs().max()) for w in want)
    worst = max(float((g - w).abs().max()) for g, w in zip(got, want, strict=True))
    assert worst < 1e-9 * scale, f"relative error {worst / scale:.1e}"


def test_update_on_a_subset_of_steps_is_unbiased() -> None:
    """Over every possible draw, which is all that an expectation is."""
    policy = small_policy(steps=6)  # 5 stochastic steps, in strata of 2 and 3
    trajectories = small_trajectories(policy, small_unet(0), dtype=torch.float64)
    weights = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert strata(5, 2).tolist() == [0, 2, 5]
    sizes = torch.tensor([2, 2, 3, 3, 3])
    choices = [torch.tensor([[a, b]]).expand(6, -1) for a in (0, 1) for b in (2, 3, 4)]
    whole = mean_gradient(policy, lambda chosen: weights, [None], trajectories)
    assert_same_gradient(mean_gradient(policy, lambda chosen: weights * sizes, choices, trajectories), whole)


def test_run_updates_weighs_the_chosen_steps_by_their_strata() -> None:
    policy = small_policy(steps=6)
    trajectories = small_trajectories(policy, small_unet(0), dtype=torch.float64)
    reference, objective = small_unet(1, torch.float64), PrdpObjective(BETA, CLIP, "torch")
    engine = PlainEngine(small_unet(0, torch.float64), 0.0)
    report = run(policy, engine, reference, trajectories, 1, 7, objective, last_drift=0.0, timesteps=2)
    assert report.denoiser_rows == 6 * 2 * 2
    ref = log_prob_pass(policy, reference, trajectories, 7).view(2, 3, 5)
    sampled = trajectories.log_probs.view(2, 3, 5)
    weights = objective(ObjectiveInput(sampled, sampled, ref, REWARDS.view(2, 3), 0.0, 0.0)).weights.view(6, 5)
    chosen = stratified(trajectories.seeds, 5, 2, 2**31)
    want = mean_gradient(policy, lambda c: weights * torch.tensor([2, 2, 3, 3, 3]), [chosen], trajectories)
    assert_same_gradient(engine.gradients[0], want)


def test_reference_on_a_subset_of_steps_is_unbiased(monkeypatch) -> None:
    policy = small_policy(steps=6)
    trajectories = small_trajectories(policy, small_unet(0), dtype=torch.float64)
    trajectories.log_probs = trajectories.log_probs.double()
    reference, objective = small_unet(1, torch.float64), PrdpObjective(BETA, CLIP, "torch")
    sampled = trajectories.log_probs.view(2, 3, 5)

    def weights(ref: torch.Tensor) -> torch.Tensor:
        return objective(ObjectiveInput(sampled, sampled, ref.view(2, 3, 5), REWARDS.view(2, 3), 0.0, 0.0)).weights

    exact = reference_pass(policy, reference, trajectories, 7)
    assert exact.error is None and exact.denoiser_rows == 6 * 5 * 2
    drawn, off = [], []
    for a in (0, 1):
        for b in (2, 3, 4):
            chosen = torch.tensor([[a, b]]).expand(6, -1)
            monkeypatch.setattr("prdp_fast.training.passes.stratified", lambda *args, chosen=chosen: chosen)
            part = reference_pass(policy, reference, trajectories, 7, timesteps=2)
            assert part.denoiser_rows == 6 * 2 * 2 and part.error > 0
            drawn.append(weights(part.log_probs))
            off.append(
                float(
                    (trajectories.log_probs - part.log_probs)
                    .mean(1)
                    .sub((trajectories.log_probs - exact.log_probs).mean(1))
                    .abs()
                    .max()
                )
            )
    torch.testing.assert_close(torch.stack(drawn).mean(0), weights(exact.log_probs), rtol=1e-9, atol=1e-12)
    assert max(off) > 0, "the subset was exact: this test would not see a bias"


def test_stratified_draws_are_uniform_independent_and_repeatable() -> None:
    seeds = torch.arange(20_000)
    chosen = stratified(seeds, 7, 3, 2**31)
    borders = strata(7, 3)
    for k in range(3):
        size = int(borders[k + 1] - borders[k])
        share = torch.bincount(chosen[:, k] - borders[k], minlength=size) / len(seeds)
        assert len(share) == size and (share - 1 / size).abs().max() < 4 * 0.5 / len(seeds) ** 0.5
    assert torch.corrcoef(chosen.T.double()).fill_diagonal_(0).abs().max() < 4 / len(seeds) ** 0.5
    assert torch.equal(chosen[5:9], stratified(seeds[5:9], 7, 3, 2**31))
    assert not torch.equal(chosen, stratified(seeds, 7, 3, 2**31 + 1))
    assert torch.equal(stratified(seeds[:2], 5, 5, 0), torch.arange(5).expand(2, -1))


def test_the_policy_is_its_own_reference_before_the_first_update() -> None:
    """No reference pass and no pass (1): the gradient is that of the run which evaluates both."""
    policy = small_policy()
    trajectories = small_trajectories(policy, small_unet(0), dtype=torch.float64)
    trajectories.log_probs = trajectories.log_probs.double()
    for updates in (1, 3):
        short, long = (PlainEngine(small_unet(0, torch.float64)) for _ in range(2))
        report = run(policy, short, None, trajectories, updates, 7)
        run(policy, long, small_unet(0, torch.float64), trajectories, updates, 7)
        assert report.denoiser_rows == (2 * updates - 1) * 2 * trajectories.log_probs.numel()
        for got, want in zip(short.gradients, long.gradients, strict=True):
            assert_same_gradient(got, want)


def test_passes_never_wait_for_the_device(monkeypatch) -> None:
    """Reading a tensor's value on the host waits for everything before it. One update may do so a fixed number of times, however
    many micro-batches and steps it has."""
    from torch.utils._python_dispatch import TorchDispatchMode

    # Values of std are looked at on the CPU only.
    monkeypatch.setattr("prdp_kernels.checks.can_read_values", lambda t: False)

    class Waits(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
            return func(*args, **(kwargs or {}))

    def waits(call) -> int:
        with Waits() as mode:
            call()
        return mode.count

    def update(micro_batch: int, steps: int) -> int:
        policy = small_policy(steps)
        trajectories = small_trajectories(policy, small_unet(0))
        return waits(lambda: run(policy, PlainEngine(small_unet(0)), small_unet(1), trajectories, 1, micro_batch, last_drift=0.0))

    def sample(steps: int, batch: int) -> int:
        policy = small_policy(steps)
        return waits(lambda: small_trajectories(policy, small_unet(0), batch=batch))

    assert update(24, 5) == update(3, 5) == update(3, 9)
    assert sample(3, 6) == sample(9, 6) == sample(9, 2)


@pytest.mark.parametrize("normalization", ["per_prompt", "global"])
def test_ddpo_weights_are_the_gradient_of_its_loss(normalization: str) -> None:
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(3, 4, 5, generator=generator, dtype=torch.float64)
    log_probs = (old + 0.02 * torch.randn(3, 4, 5, generator=generator, dtype=torch.float64)).requires_grad_(True)
    rewards = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    mean, std = float(rewards.mean()), float(rewards.std(correction=0))
    objective = DdpoObjective(0.01, normalization, 5.0)  # type: ignore[arg-type]
    output = objective(ObjectiveInput(log_probs, old, None, rewards, mean, std))

    if normalization == "global":
        advantages = (rewards - mean) / std
    else:
        advantages = (rewards - rewards.mean(1, keepdim=True)) / rewards.std(1, correction=0, keepdim=True)
    ratio = torch.exp(log_probs - old)
    loss = torch.maximum(-advantages[..., None] * ratio, -advantages[..., None] * ratio.clamp(0.99, 1.01)).mean()
    (gradient,) = torch.autograd.grad(loss, log_probs)
    torch.testing.assert_close(output.loss, loss, rtol=1e-7, atol=1e-12)
    torch.testing.assert_close(output.weights.detach(), gradient, rtol=1e-7, atol=1e-12)
    assert 0 < output.metrics["clip_fraction"] < 1


def test_ddpo_drops_unscored_images_and_equal_groups() -> None:
    objective = DdpoObjective(0.1, "per_prompt", 5.0)
    zeros = torch.zeros(2, 3, 4)
    rewards = torch.tensor([[1.0, float("nan"), 0.0], [0.5, 0.5, 0.5]])
    weights = objective(ObjectiveInput(zeros, zeros, None, rewards, 0.5, 0.4)).weights
    assert weights.isfinite().all()
    assert (weights[0, 1] == 0).all() and (weights[1] == 0).all()
    assert (weights[0, 0] < 0).all() and (weights[0, 2] > 0).all()


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_trajectories_do_not_depend_on_the_rollout_batch(batch: int) -> None:
    policy, denoiser = small_policy(), small_unet(0)
    whole = small_trajectories(policy, denoiser, groups=4, images=4, batch=64)
    parts = small_trajectories(policy, denoiser, groups=4, images=4, batch=batch)
    torch.testing.assert_close(parts.latents, whole.latents, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(parts.log_probs, whole.log_probs, rtol=1e-5, atol=1e-5)
    assert whole.latents.shape == (16, len(policy.transitions) + 1, *SHAPE)


def test_sampler_and_trainer_agree_and_reward_noise_is_what_diffusers_would_add() -> None:
    """The stored trajectory, stepped again by the definition with the noise it used, comes out the same."""
    policy, denoiser = small_policy(), small_unet(0)
    trajectories = small_trajectories(policy, denoiser)
    trained = log_prob_pass(policy, denoiser, trajectories, 4)
    torch.testing.assert_close(trained, trajectories.log_probs, rtol=0, atol=1e-5)
    expected = whole_log_probs(policy, denoiser, trajectories)
    torch.testing.assert_close(trained.double(), expected.double(), rtol=0, atol=1e-5)
    assert trajectories.embeddings.prompt_embeds.shape[-1] == WIDTH


def test_a_large_drift_is_told_once() -> None:
    assert drift_warning(0.9e-5, 1e-4, 0.0) is None
    first = drift_warning(1.1e-5, 1e-4, 0.0)
    assert first is not None and "1.1e-05" in first and "clip_range (1e-04)" in first
    assert drift_warning(9e-5, 1e-4, told=1.1e-5) is None
    assert drift_warning(1.2e-4, 1e-4, told=1.1e-5) is not None


def test_metrics_of_an_epoch_are_means_over_its_updates() -> None:
    policy, told = small_policy(), []

    class Spy(PrdpObjective):
        def __call__(self, batch: ObjectiveInput):
            output = super().__call__(batch)
            told.append({name: float(value) for name, value in output.metrics.items()} | {"loss": float(output.loss)})
            return output

    trajectories = small_trajectories(policy, small_unet(0))
    engine, objective = PlainEngine(small_unet(0)), Spy(BETA, CLIP, "torch")
    report = run(policy, engine, small_unet(1), trajectories, 3, 8, objective, REWARDS.float())
    assert len(told) == 3 and told[0]["clip_fraction"] != told[2]["clip_fraction"]
    for name in told[0]:
        assert report.metrics[name] == pytest.approx(sum(one[name] for one in told) / 3, rel=1e-6), name
    norms = [float(torch.nn.utils.get_total_norm(gradients)) for gradients in engine.gradients]
    assert report.metrics["grad_norm"] == pytest.approx(sum(norms) / 3, rel=1e-6)


# Numbers that go wrong.


@pytest.mark.parametrize("updates", [1, 3])
@pytest.mark.parametrize("objective", [PrdpObjective(BETA, CLIP, "torch"), DdpoObjective(CLIP, "per_prompt", 5.0)])
def test_a_trajectory_that_is_not_finite_leaves_its_group(objective, updates: int) -> None:
    """The update is that of a group in which the image merely had no reward."""
    policy, rewards = small_policy(), REWARDS.float()
    rewards[4] = float("nan")
    spoilt, unscored = (small_trajectories(policy, small_unet(0)) for _ in range(2))
    spoilt.latents[4, 2:] = float("nan")
    spoilt.log_probs[4, 1:] = float("nan")
    assert finite_images(spoilt).tolist() == [True] * 4 + [False, True] and finite_images(unscored).all()
    remove(spoilt, ~finite_images(spoilt))
    engines = [PlainEngine(small_unet(0), 1e-4) for _ in range(2)]
    reference = small_unet(1) if objective.needs_reference else None
    reports = [
        run(policy, engine, reference, trajectories, updates, 8, objective, rewards, 0.0)
        for engine, trajectories in zip(engines, (spoilt, unscored), strict=True)
    ]
    for got, want in zip(engines[0].gradients, engines[1].gradients, strict=True):
        assert any(float(gradient.abs().max()) > 0 for gradient in want)
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-6 * float(w.abs().max()) + 1e-12)
    assert all(torch.tensor(value).isfinite() for value in reports[0].metrics.values())
    assert reports[0].drift < 1e-4, "zeros in the place of what was lost are no drift"


def test_a_single_infinite_log_prob_is_seen() -> None:
    trajectories = small_trajectories(small_policy(), small_unet(0))
    trajectories.log_probs[1, 0] = -float("inf")
    trajectories.latents[5, -1, 2, 1, 3] = float("inf")
    assert finite_images(trajectories).tolist() == [True, False, True, True, True, False]


def test_the_reference_of_a_subset_of_steps_has_an_error_without_the_lost() -> None:
    policy = small_policy()
    trajectories = small_trajectories(policy, small_unet(0))
    remove(trajectories, torch.tensor([False, True, False, False, False, False]))
    reference = reference_pass(policy, small_unet(1), trajectories, 8, timesteps=2)
    assert reference.error is not None and 0 < reference.error < float("inf")
    assert reference.log_probs.isfinite().all(1).tolist() == [True, False, True, True, True, True]
    assert reference_pass(policy, small_unet(1), trajectories, 8).error is None
    # Logged whatever it is: names of metrics must not hang on values.
    report = run(
        policy, PlainEngine(small_unet(0)), small_unet(0), trajectories, 1, 8, rewards=torch.zeros(6), last_drift=0.0,
        reference_timesteps=2,
    )  # fmt: skip
    assert report.metrics["reference_weight_error"] == 0.0


class Skipping(PlainEngine):
    """Finds no finite gradient in some of its updates."""

    skips: tuple[int, ...] = ()

    def step(self):
        if len(self.gradients) in self.skips:
            self.gradients.append([])
            self.optimizer.zero_grad()
            return StepResult(float("inf"), applied=False)
        return super().step()


@pytest.mark.parametrize(("skips", "expected"), [((), 0), ((0, 1), 0), ((1, 2), 2), ((0, 1, 2), 7 + 3), ((2,), 1)])
def test_skipped_updates_are_counted_in_a_row_over_epochs(skips, expected: int) -> None:
    policy, engine = small_policy(), Skipping(small_unet(0))
    engine.skips = skips
    report = run_updates(
        policy, engine, PrdpObjective(BETA, CLIP, "torch"), small_trajectories(policy, small_unet(0)), REWARDS.float(),
        reference=None, updates=3, micro_batch=24, last_drift=None, reduce=no_reduce, skipped_in_row=7,
    )  # fmt: skip
    assert report.skipped_in_row == expected and report.skipped_updates == len(skips)


class Short(PlainEngine):
    """Has no memory for the backward passes of one update, if they are large."""

    fails_in, most = 0, 4
    width = 0

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        if len(self.gradients) == self.fails_in and self.width > 2 * self.most:
            self.fails_in = -1
            raise torch.OutOfMemoryError("CUDA out of memory")
        super().backward(loss, last=last)


@pytest.mark.parametrize("fails_in", [0, 1, 2])
def test_old_and_new_log_probs_keep_one_batch_geometry_when_memory_runs_out(fails_in: int) -> None:
    """A denoiser that rounds by its batch, as GPUs do, only more: without a step between, every ratio is 1 to the last bit."""
    policy, seen = small_policy(), []
    trajectories = small_trajectories(policy, small_unet(0))
    engine = Short(small_unet(0), 0.0)
    engine.fails_in = fails_in

    def rounds(module, args, output):
        engine.width = len(args[0])
        return (output[0] * (1 + 1e-3 * len(args[0])),)

    engine.denoiser.register_forward_hook(rounds)

    class Spy(PrdpObjective):
        def __call__(self, batch: ObjectiveInput):
            seen.append(batch)
            return super().__call__(batch)

    report = run(policy, engine, None, trajectories, 4, 8, Spy(BETA, CLIP, "torch"), REWARDS.float())
    assert report.micro_batch == 4 and len(seen) == 4
    for update, batch in enumerate(seen[1:], start=1):
        assert torch.equal(batch.log_probs, batch.old_log_probs), f"update {update}"


def test_a_pass_without_gradients_tries_again_at_its_own_size(monkeypatch) -> None:
    from prdp_fast.training import update

    policy, widths, failing = small_policy(), [], [True]
    trajectories = small_trajectories(policy, small_unet(0))
    plain = update.log_prob_pass

    def exhausted(*args, **named):
        widths.append(args[-1])
        if failing and len(widths) == 2:
            failing.clear()
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(*args, **named)

    monkeypatch.setattr(update, "log_prob_pass", exhausted)
    run(policy, PlainEngine(small_unet(0)), None, trajectories, 3, 8, rewards=REWARDS.float())
    assert widths == [8, 8, 8]
