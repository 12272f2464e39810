"""Every objective against a transcription of its published formula: loss and gradient, in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from prdp_fast.config.objectives import OBJECTIVES
from prdp_fast.objectives import (
    DdpoObjective,
    DpokObjective,
    GrpoObjective,
    ObjectiveInput,
    PrdpObjective,
    RebelObjective,
    RwrObjective,
    build_objective,
    update_statistics,
)
from prdp_fast.objectives.prdp import random_pairs

G, B, S, D = 3, 5, 4, 48
NAN = math.nan


def batch(seed: int = 0, *, images: int = B, spread: float = 0.02, missing: bool = False) -> ObjectiveInput:
    """Random float64 log-probs, with ratios inside and outside of a clip range of 0.01. Args: missing: some rewards are."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    old = normal(G, images, S)
    log_probs, ref = old + spread * normal(G, images, S), old + spread * normal(G, images, S)
    rewards = normal(G, images)
    if missing:
        rewards[0, 1] = NAN
        log_probs[0, 1] = old[0, 1] = ref[0, 1] = NAN  # its trajectory is lost too
        rewards[2] = NAN
    finite = rewards[rewards.isfinite()]
    return ObjectiveInput(
        log_probs.requires_grad_(True), old, ref, rewards, float(finite.mean()), float(finite.std(correction=0)), elements=D,
        seeds=torch.arange(G * images).view(G, images) * 7919 + seed,
    )  # fmt: skip


def check(objective, given: ObjectiveInput, loss: torch.Tensor) -> None:
    """Args: loss: the formula, differentiable in the log-probs."""
    output = objective(given)
    (gradient,) = torch.autograd.grad(loss, given.log_probs)
    assert float(gradient.abs().max()) > 0
    torch.testing.assert_close(output.loss.detach(), loss.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(output.weights.detach(), gradient.nan_to_num(), rtol=1e-10, atol=1e-12)


def images_of(given: ObjectiveInput):
    """(group, image) of those with a reward."""
    return [(g, i) for g, i in itertools.product(*map(range, given.rewards.shape)) if given.rewards[g, i].isfinite()]


def surrogate(given: ObjectiveInput, advantage, clip: float) -> torch.Tensor:
    """PPO, an image and a step at a time. An image without a reward counts in the mean as 0."""
    total = torch.zeros((), dtype=torch.float64)
    for (g, i), t in itertools.product(images_of(given), range(S)):
        ratio = torch.exp(given.log_probs[g, i, t] - given.old_log_probs[g, i, t])
        total = total - torch.minimum(advantage(g, i) * ratio, advantage(g, i) * ratio.clamp(1 - clip, 1 + clip))
    return total / given.log_probs.numel()


def kl(given: ObjectiveInput) -> torch.Tensor:
    assert given.ref_log_probs is not None
    total = torch.zeros((), dtype=torch.float64)
    for (g, i), t in itertools.product(images_of(given), range(S)):
        whole_step = D * (given.log_probs[g, i, t] - given.ref_log_probs[g, i, t])  # log-ratio of all its elements
        total = total + whole_step**2 / 2 / D
    return total / given.log_probs.numel()


def of_prompt(given: ObjectiveInput, g: int) -> torch.Tensor:
    return given.rewards[g][given.rewards[g].isfinite()]


@pytest.mark.parametrize("missing", [False, True])
def test_grpo(missing: bool) -> None:
    given = batch(missing=missing)

    def advantage(g: int, i: int) -> float:
        own = of_prompt(given, g)
        return float(((given.rewards[g, i] - own.mean()) / (own.std(correction=0) + 1e-4)).clamp(-1.2, 1.2))

    check(GrpoObjective(0.01, 0.3, 1.2), given, surrogate(given, advantage, 0.01) + 0.3 * kl(given))
    assert GrpoObjective(0.01, 0.3, 1.2).needs_reference and not GrpoObjective(0.01, 0.0, 1.2).needs_reference
    check(GrpoObjective(0.01, 0.0, 1.2), given, surrogate(given, advantage, 0.01))


@pytest.mark.parametrize("missing", [False, True])
def test_dpok(missing: bool) -> None:
    given = batch(1, missing=missing)

    def advantage(g: int, i: int) -> float:
        return 10.0 * float(given.rewards[g, i] - of_prompt(given, g).mean())

    check(DpokObjective(10.0, 0.7, 0.01), given, surrogate(given, advantage, 0.01) + 0.7 * kl(given))


def test_the_kl_term_has_the_gradient_of_the_divergence() -> None:
    """Of a Gaussian step in one dimension, with its expectation by Gauss-Hermite quadrature: d KL / d mean, by both."""
    import numpy

    from prdp_fast.objectives.policy_gradient import kl_to_reference

    nodes, weights = (torch.from_numpy(column) for column in numpy.polynomial.hermite_e.hermegauss(20))
    std, mean, ref_mean = 0.3, torch.tensor(0.5, dtype=torch.float64, requires_grad=True), 0.2
    samples = (mean + std * nodes).detach()  # of the policy

    def log_prob(centre) -> torch.Tensor:
        return (-((samples - centre) ** 2) / (2 * std**2)).view(1, -1, 1)

    own = log_prob(mean)
    given = ObjectiveInput(own.detach(), own.detach(), log_prob(ref_mean), torch.zeros(1, 20), 0.0, 1.0)
    slope = kl_to_reference(given)[1] * own.numel()  # of each sample, not of the mean over samples
    expected_log_prob = (slope.flatten() * own.flatten() * weights / weights.sum()).sum()
    (gradient,) = torch.autograd.grad(expected_log_prob, mean)
    assert float(gradient) == pytest.approx((0.5 - ref_mean) / std**2, rel=1e-10)


@pytest.mark.parametrize("missing", [False, True])
def test_rwr(missing: bool) -> None:
    given = batch(2, missing=missing)
    loss = torch.zeros((), dtype=torch.float64)
    for g, i in images_of(given):
        share = torch.exp(given.rewards[g, i] / 0.5) / torch.exp(of_prompt(given, g) / 0.5).sum()
        loss = loss - share * given.log_probs[g, i].mean()
    check(RwrObjective(0.5), given, loss / G)


@pytest.mark.parametrize(("images", "missing"), [(2, False), (B, False), (B, True)])
def test_rebel(images: int, missing: bool) -> None:
    given = batch(3, images=images, missing=missing)
    loss = torch.zeros((), dtype=torch.float64)
    for g in range(G):
        own = [i for h, i in images_of(given) if h == g]
        errors = []
        for i, j in itertools.combinations(own, 2):
            left, right = (D * (given.log_probs[g, k] - given.old_log_probs[g, k]).sum() for k in (i, j))
            errors.append(((left - right) / 0.8 - (given.rewards[g, i] - given.rewards[g, j])) ** 2)
        loss = loss + (sum(errors) / len(errors) if errors else 0)
    check(RebelObjective(0.8), given, loss / G)


def prdp(given: ObjectiveInput, ref, pairs, clip: float, beta: float) -> torch.Tensor:
    """Appendix G, one pair at a time. Args: pairs: of a group; ref: (G, B, S)."""
    loss = torch.zeros((), dtype=torch.float64)
    for g in range(G):
        errors = []
        for i, j in pairs(g):
            if not given.rewards[g, i] > given.rewards[g, j]:
                i, j = j, i
            plain, clipped = [], []
            for k in (i, j):
                lr, old = given.log_probs[g, k] - ref[g, k], given.old_log_probs[g, k] - ref[g, k]
                plain.append(lr.mean())
                clipped.append(torch.maximum(torch.minimum(lr, old + clip), old - clip).mean())
            target = (given.rewards[g, i] - given.rewards[g, j]) / beta
            errors.append(torch.maximum((plain[0] - plain[1] - target) ** 2, (clipped[0] - clipped[1] - target) ** 2))
        loss = loss + sum(errors) / len(errors)
    return loss / G


def all_pairs(g: int):
    return itertools.combinations(range(B), 2)


def test_prdp_as_published_and_without_clipping() -> None:
    given = batch(4)
    check(PrdpObjective(2.0, 0.01, "torch"), given, prdp(given, given.ref_log_probs, all_pairs, 0.01, 2.0))
    unclipped = prdp(given, given.ref_log_probs, all_pairs, 1e9, 2.0)
    check(PrdpObjective(2.0, None, "torch"), given, unclipped)
    assert float(unclipped.detach()) != float(prdp(given, given.ref_log_probs, all_pairs, 0.01, 2.0).detach())


def test_prdp_of_the_last_epoch() -> None:
    given = batch(5)
    objective = PrdpObjective(2.0, 0.01, "torch", last_epoch=True)
    assert not objective.needs_reference and objective.weight_error(given, 1.0) == 0
    check(objective, given, prdp(given, given.old_log_probs, all_pairs, 0.01, 2.0))


def test_prdp_on_the_best_and_the_worst() -> None:
    given = batch(6)

    def extremes(g: int):
        return [(int(given.rewards[g].argmax()), int(given.rewards[g].argmin()))]

    objective = PrdpObjective(2.0, 0.01, "torch", pairs="best_worst")
    check(objective, given, prdp(given, given.ref_log_probs, extremes, 0.01, 2.0))
    assert int(objective(given).metrics["pairs"]) == G and int(objective(given).metrics["dropped_images"]) == 0
    lost = objective(batch(6, missing=True))
    assert lost.weights.isfinite().all() and int(lost.metrics["dropped_images"]) == B + 1
    assert int((lost.weights.detach() != 0).any(2).sum()) == 4, "two images of two prompts"


@pytest.mark.parametrize("images", [4, 5])
def test_prdp_on_random_pairs(images: int) -> None:
    given = batch(7, images=images)
    assert given.seeds is not None
    order, _ = random_pairs(given.seeds)

    def drawn(g: int):
        return [(int(order[g, 2 * k]), int(order[g, 2 * k + 1])) for k in range(images // 2)]

    assert sorted(order[0].tolist()) == list(range(images))
    objective = PrdpObjective(2.0, 0.01, "torch", pairs="random")
    check(objective, given, prdp(given, given.ref_log_probs, drawn, 0.01, 2.0))
    # An image is paired by its own keys, whatever stands beside its prompt.
    alone, _ = random_pairs(given.seeds[1:2])
    assert torch.equal(alone[0], order[1])


def test_random_pairs_are_uniform() -> None:
    """Every pair of four images as often as another: each of the 3 pairings of 20,000 groups within 5 standard deviations."""
    order, _ = random_pairs(torch.arange(80_000).view(-1, 4))
    partner_of_0 = order[torch.arange(20_000), torch.where(order == 0)[1] ^ 1]
    counts = torch.bincount(partner_of_0, minlength=4)
    assert counts[0] == 0
    for count in counts[1:]:
        assert abs(int(count) - 20_000 / 3) < 5 * math.sqrt(20_000 * 2 / 9)


# Running statistics.


def published(epochs, buffer: int, min_count: int):
    """PerPromptStatTracker of DDPO's authors, written again: advantages of a list of epochs of [(prompt, rewards)]."""
    from collections import deque

    import numpy as np

    stats: dict[int, deque] = {}
    told = []
    for epoch in epochs:
        everything = np.concatenate([rewards for _, rewards in epoch])
        advantages = []
        for prompt, rewards in epoch:
            stats.setdefault(prompt, deque(maxlen=buffer)).extend(rewards)
            few = len(stats[prompt]) < min_count
            mean, std = (np.mean(everything), np.std(everything) + 1e-6) if few else (
                np.mean(stats[prompt]), np.std(stats[prompt]) + 1e-6,
            )  # fmt: skip
            advantages.append((np.asarray(rewards) - mean) / std)
        told.append(np.stack(advantages))
    return told


def test_running_statistics_equal_the_published_ones_on_any_ranks() -> None:
    generator = torch.Generator().manual_seed(0)
    epochs = [
        [(prompt, torch.randn(3, generator=generator).tolist()) for prompt in (epoch % 3, 3, 4 + epoch)] for epoch in range(8)
    ]
    wanted = published(epochs, buffer=7, min_count=5)
    objective, kept = DdpoObjective(1e-4, "running", 100.0), {}
    for epoch, advantages in zip(epochs, wanted, strict=True):
        kept_before = {prompt: list(values) for prompt, values in kept.items()}
        prompts, rewards = [prompt for prompt, _ in epoch], torch.tensor([values for _, values in epoch])
        statistics = update_statistics(kept, prompts, rewards, buffer=7, min_count=5, gather=lambda own: [own])
        zeros = torch.zeros(3, 3, S)
        got = objective.advantages(ObjectiveInput(zeros, zeros, None, rewards, 0.0, 1.0, statistics=statistics))
        torch.testing.assert_close(got, torch.from_numpy(advantages).float(), rtol=1e-4, atol=1e-4)

        # The same prompts on two ranks: what one gathers is both ranks' shares.
        shares = [(prompt, values) for prompt, values in zip(prompts, rewards.tolist(), strict=True)]
        second = update_statistics(
            kept_before, prompts[1:], rewards[1:], buffer=7, min_count=5, gather=lambda own, first=shares[:1]: [first, own]
        )
        assert torch.equal(second, statistics[1:]) and kept_before == kept
    assert max(len(values) for values in kept.values()) == 7


def test_running_statistics_leave_out_what_is_not_finite() -> None:
    kept: dict[str, list[float]] = {}
    rewards = torch.tensor([[1.0, NAN, 3.0], [NAN, NAN, NAN]])
    statistics = update_statistics(kept, [8, 9], rewards, buffer=4, min_count=2, gather=lambda own: [own])
    assert kept == {"8": [1.0, 3.0], "9": []}
    assert statistics.tolist() == [[2.0, pytest.approx(1.0, abs=1e-5)]] * 2


# Of all of them.


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_defaults_build_and_drop_what_has_no_reward(name: str) -> None:
    objective = build_objective(OBJECTIVES[name].model_validate({"name": name}), "torch")
    assert objective.name == name
    given = batch(8, missing=True)
    output = objective(given)
    assert output.loss.isfinite() and output.weights.isfinite().all()
    assert (output.weights[0, 1] == 0).all() and (output.weights[2] == 0).all()
    assert int(output.metrics["dropped_images"]) == B + 1
    assert all(value.ndim == 0 and value.isfinite() for value in output.metrics.values())


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_a_better_image_is_made_likelier(name: str) -> None:
    """Where the policy is the reference, a step against the gradient raises the best image's log-prob over the worst's."""
    objective = build_objective(OBJECTIVES[name].model_validate({"name": name}), "torch")
    zeros = torch.zeros(1, 3, S)
    weights = objective(ObjectiveInput(zeros, zeros, zeros, torch.tensor([[0.0, 1.0, 0.5]]), 0.5, 0.4, elements=D)).weights
    assert (weights[0, 1] < weights[0, 2]).all() and (weights[0, 2] < weights[0, 0]).all()


@pytest.mark.parametrize("name", ["grpo", "dpok"])
def test_weight_error_is_that_of_log_probs_that_are_wrong(name: str) -> None:
    """With old = log_prob, a log-prob that is wrong by `drift` on every step moves the weights by the share that is told."""
    objective = build_objective(OBJECTIVES[name].model_validate({"name": name, "kl_weight": 0.5}), "torch")
    given, drift = batch(9), 1e-4
    own, rewards = given.log_probs.detach(), given.rewards

    def weights(log_probs: torch.Tensor) -> torch.Tensor:
        return objective(ObjectiveInput(log_probs, log_probs, given.ref_log_probs, rewards, 0.0, 1.0, elements=D)).weights

    true = weights(own)
    moved = (weights(own + drift) - true).square().mean().sqrt() / true.square().mean().sqrt()
    told = objective.weight_error(ObjectiveInput(own, own, given.ref_log_probs, rewards, 0.0, 1.0, elements=D), drift)
    assert told == pytest.approx(float(moved), rel=1e-6)


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_rewards_that_float32_cannot_hold_are_refused_where_weights_fail(name: str) -> None:
    objective = build_objective(OBJECTIVES[name].model_validate({"name": name}), "torch")
    assert objective.too_large(1.0, 1.0, 4) is None
    fault = objective.too_large(3e38, 3e38, 4) if name != "rwr" else build_objective(
        OBJECTIVES["rwr"].model_validate({"name": "rwr", "temperature": 0.1})
    ).too_large(3e38, 3e38, 4)  # fmt: skip
    assert fault and ("3.4e+38" in fault or "float32" in fault or "objective." in fault)
