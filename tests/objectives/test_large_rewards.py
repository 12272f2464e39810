"""Rewards that float32 cannot square: told before an update that would be skipped, or would learn nothing."""

from __future__ import annotations

import math

import pytest
import torch

from prdp_fast.core import distributed
from prdp_fast.core.records import Scores
from prdp_fast.objectives import DdpoObjective, ObjectiveInput, PrdpObjective
from prdp_fast.objectives.base import FLOAT32_MAX
from prdp_fast.rewards import Reward, WeightedRewards
from prdp_fast.training.health import reward_fault


@pytest.mark.parametrize("kl_weight", [3e-5, 1.0, 1e-18])
def test_prdp_refuses_exactly_where_the_loss_would_overflow(kl_weight: float) -> None:
    objective = PrdpObjective(kl_weight, 1e-4, "torch")
    for factor, fits in ((0.999, True), (1.001, False)):
        spread = factor * math.sqrt(FLOAT32_MAX) * kl_weight
        zeros = torch.zeros(1, 2, 1)
        rewards = torch.tensor([[spread, 0.0]], dtype=torch.float64).float()
        loss = objective(ObjectiveInput(zeros, zeros, zeros, rewards, 0.0, 0.0)).loss
        assert bool(loss.isfinite()) == fits
        fault = objective.too_large(spread, spread, 2)
        assert (fault is None) == fits
        if fault:
            assert f"objective.kl_weight {kl_weight:g}" in fault and "raise objective.kl_weight" in fault


@pytest.mark.parametrize("kl_weight", [1e-300, 5e-324])
def test_a_kl_weight_of_next_to_nothing(kl_weight: float) -> None:
    fault = PrdpObjective(kl_weight, 1e-4, "torch").too_large(0.1, 1.0, 8)
    assert fault and "the target of the loss is beyond 3.4e+38" in fault
    assert PrdpObjective(kl_weight, 1e-4, "torch").too_large(0.0, 1.0, 8) is None, "equal rewards have no pair"


def advantages(objective: DdpoObjective, rewards: torch.Tensor) -> torch.Tensor:
    given = rewards[rewards.isfinite()].double()
    mean, std = float(given.mean()), float(given.std(correction=0))
    return objective.advantages(ObjectiveInput(torch.zeros(1), torch.zeros(1), None, rewards, mean, std))


def test_ddpo_refuses_what_makes_its_advantages_vanish() -> None:
    per_prompt, everywhere = DdpoObjective(1e-4, "per_prompt", 5.0), DdpoObjective(1e-4, "global", 5.0)
    pattern = torch.tensor([[1.0, 2.0, 4.0, 3.0]])
    for size in (1e15, 1e18, 1e30):
        rewards = pattern * size
        vanish = bool((advantages(per_prompt, rewards) == 0).all())
        fault = per_prompt.too_large(3 * size, 4 * size, 4)
        assert (fault is not None) == vanish == (size > 1e18)
        assert not (advantages(everywhere, rewards) == 0).any() and everywhere.too_large(3 * size, 4 * size, 4) is None
    assert fault and "every advantage would be 0 or NaN; set objective.normalization global" in fault
    # A sum that overflows on its own.
    assert per_prompt.too_large(0.0, 1e38, 8) and everywhere.too_large(0.0, 1e38, 8)


def test_weight_error_of_rewards_that_are_not_finite_is_never_0() -> None:
    objective, log_probs = PrdpObjective(1.0, 1e-4, "torch"), torch.zeros(1, 3, 2)

    def error(*rewards: float) -> float:
        return objective.weight_error(ObjectiveInput(log_probs, log_probs, log_probs, torch.tensor([rewards]), 0.0, 0.0), 1e-3)

    assert error(1.0, 0.0, math.inf) == error(1.0, 0.0, math.nan) == pytest.approx(4e-3), (
        "an image without a reward is in no pair"
    )
    assert error(1e30, 0.0, 1.0) == math.inf, "whose square is infinite: nothing is known"
    assert error(math.inf, math.inf, 1.0) == 0.0, "one image left: no pair"


class Named(Reward):
    def __init__(self, name: str) -> None:
        self.name = name  # type: ignore[misc]

    def score(self, images, prompts, metadata):
        raise NotImplementedError


def fault_of(monkeypatch, objective, parts: dict[str, list[float]], weights: list[float]) -> str | None:
    monkeypatch.setattr(distributed, "all_reduce", lambda values, op: values)
    rewards = WeightedRewards([Named(name) for name in parts], weights)
    tensors = {name: torch.tensor(values) for name, values in parts.items()}
    return reward_fault(objective, rewards, Scores(rewards._total(tensors, {}), tensors, {}), 2)


def test_the_line_names_the_reward_its_size_and_the_way_out(monkeypatch) -> None:
    prdp = PrdpObjective(3e-5, 1e-4, "torch")
    sane = {"a": [0.0, 1.0, 2.0, 3.0], "b": [5.0, 5.0, math.nan, 5.0]}
    assert fault_of(monkeypatch, prdp, sane, [1.0, 0.5]) is None
    line = fault_of(monkeypatch, prdp, sane | {"b": [0.0, 1e30, 0.0, 0.0]}, [1.0, 0.5])
    assert line is not None and "\n" not in line
    for words in (
        "differ by up to 5.0e+29", "reward 'b' (of up to 1.0e+30, weight 0.5)", "objective.kl_weight 3e-05", "1.7e+34",
        "lower rewards.1.weight", "rewards.1.normalise running",
    ):  # fmt: skip
        assert words in line
    assert fault_of(monkeypatch, prdp, {"a": [1e30, 1e30, 2e-30, 2e-30]}, [1.0]) is None, "differences inside a prompt count"


def test_an_epoch_without_any_total_is_told(monkeypatch) -> None:
    objective = DdpoObjective(1e-4, "per_prompt", 5.0)
    line = fault_of(monkeypatch, objective, {"a": [1e37, 2e37]}, [1000.0])
    assert line is not None and "no image has a total reward" in line and "reward 'a' (of up to 2.0e+37, weight 1000)" in line
    assert fault_of(monkeypatch, objective, {"a": [1e37, 1.0, 2.0, 3.0]}, [1000.0]) is None


def test_lost_images_leave_a_group_and_spoil_nothing() -> None:
    """Of an image that is not finite there is no log-prob: the weights of the others are those of the group without it."""
    generator = torch.Generator().manual_seed(0)
    log_probs = torch.randn(2, 4, 3, generator=generator)
    old = log_probs + 1e-2 * torch.randn(2, 4, 3, generator=generator)
    rewards = torch.rand(2, 4, generator=generator)
    rewards[0, 1] = rewards[1, 3] = math.nan
    blank = log_probs.masked_fill(rewards.isnan()[:, :, None], math.nan)
    for objective in (
        PrdpObjective(1.0, 1e-2, "torch"),
        DdpoObjective(1e-2, "per_prompt", 5.0),
        DdpoObjective(1e-2, "global", 5.0),
    ):
        got, expected = (
            objective(ObjectiveInput(one, old + (one - one), log_probs * 0.9, rewards, 0.5, 0.3)) for one in (blank, log_probs)
        )
        assert got.weights.isfinite().all() and torch.equal(got.weights, expected.weights)
        assert (got.weights[rewards.isnan()] == 0).all()
        assert torch.equal(got.loss, expected.loss)
