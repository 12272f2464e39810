"""What training measures of itself: verdicts, shares of several ranks, and the record that goes into summary.json."""

from __future__ import annotations

import math

import pytest
import torch
from small_model import SHAPE, small_policy, small_trajectories, small_unet

from prdp_fast.core.errors import NotFiniteError, RewardError
from prdp_fast.core.records import Prompt
from prdp_fast.evaluation import run
from prdp_fast.evaluation.blocks import Block
from prdp_fast.evaluation.run import Evaluation, compare_evaluations, evaluate
from prdp_fast.evaluation.statistics import over_optimised
from prdp_fast.reporting.tables import before_after
from prdp_fast.rewards import Reward, RewardOutput, WeightedRewards

PROMPTS = [Prompt(index, f"prompt {index}", {}) for index in range(3)]
B = 4


class Counting(Reward):
    """Scores 0, 1, 2, ... in the order of the images; every third image passes."""

    name = "counting"

    def score(self, images, prompts, metadata):
        numbers = torch.arange(len(images))
        return RewardOutput(numbers.float(), {"passes": (numbers % 3 == 0).float(), "strict": torch.ones(len(images))})


class Judging(Counting):
    name = "judging"
    verdict = "passes"


def measured(monkeypatch, *rewards: Reward, shown: torch.Tensor | None = None) -> Evaluation:
    images = torch.zeros(len(PROMPTS) * B, 3, 8, 8, dtype=torch.uint8)
    shown = torch.ones(len(images), dtype=torch.bool) if shown is None else shown
    monkeypatch.setattr(run, "sample_images", lambda *arguments, **options: (images, shown))
    return evaluate(
        None, None, None, None, WeightedRewards(rewards, [1.0] * len(rewards)), PROMPTS, images_per_prompt=B, batch=2, seed=0
    )  # fmt: skip


def test_a_reward_with_a_verdict_is_reported_with_its_share(monkeypatch) -> None:
    """Whatever the reward and its detail are called; another reward in front has none."""
    found = measured(monkeypatch, Counting(), Judging())
    assert found.prompts == ["prompt 0", "prompt 1", "prompt 2"]
    assert found.rewards.tolist() == [2 * 1.5, 2 * 5.5, 2 * 9.5]
    assert found.strict is not None and found.strict.tolist() == [0.5, 0.25, 0.25]  # images 0 and 3; 6; 9
    assert found.summary()["strict"] == pytest.approx(1 / 3, rel=1e-12)
    record = compare_evaluations(found, found)
    assert "strict" in record["before"] and "strict" not in record["difference"]


def test_a_reward_without_one_is_reported_alone(monkeypatch) -> None:
    """A detail that happens to be called strict is none."""
    found = measured(monkeypatch, Counting())
    assert found.strict is None and set(found.summary()) == {"mean", "stderr", "n", "unscored"}


def test_a_picture_that_is_not_finite_has_no_score(monkeypatch) -> None:
    """Black as it is, the reward has scored it: 4 would count."""
    shown = torch.tensor([number != 4 for number in range(len(PROMPTS) * B)])
    found = measured(monkeypatch, Counting(), Judging(), shown=shown)
    assert found.rewards.tolist() == [2 * 1.5, pytest.approx(2 * 6.0), 2 * 9.5]
    assert found.strict is not None and found.strict.tolist() == [0.5, pytest.approx(1 / 3), 0.25]


@pytest.mark.parametrize("lost", [0, 3, 4])
def test_an_evaluation_without_a_single_finite_picture_ends(monkeypatch, lost: int) -> None:
    policy, denoiser = small_policy(), small_unet(0)
    prompts = PROMPTS[:2]
    trajectories = small_trajectories(policy, denoiser, groups=2, images=2)
    trajectories.latents[:lost, 1:] = math.nan
    monkeypatch.setattr(run, "rollout", lambda *arguments, **options: trajectories)

    class Stub:
        latent_shape = SHAPE

        def decode_checked(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.tensor([True, True, True, lost == 0])

        def explain(self, module, embeddings, *, latents: bool) -> str:
            return f"{type(module).__name__}: latents {latents}"

    def sampled() -> torch.Tensor:
        return run.sample_images(
            policy, denoiser, Stub(), lambda prompts: trajectories.embeddings, prompts, images_per_prompt=2, batch=4, seed=0
        )[1]  # fmt: skip

    if lost == 0:
        assert sampled().tolist() == [True] * 4
        return
    with pytest.raises(NotFiniteError, match=r"not one (decoded picture|image's latents) of 4 is finite") as caught:
        sampled()
    assert str(caught.value).endswith(f"UNet2DConditionModel: latents {lost == 4}")


def test_an_image_without_a_score_is_left_out_of_its_prompt(monkeypatch) -> None:
    class Failing(Counting):
        name = "failing"

        def score(self, images, prompts, metadata):
            scores = torch.arange(float(len(images)))
            scores[0], scores[4:8] = math.nan, math.inf
            return RewardOutput(scores)

    found = measured(monkeypatch, Failing())
    assert found.rewards[[0, 2]].tolist() == [2.0, 9.5] and math.isnan(found.rewards[1])
    assert found.summary() == {"mean": 5.75, "stderr": 3.75, "n": 2, "unscored": 5}


def part(numbers: list[int], strict: bool = True) -> Evaluation:
    images = torch.tensor(numbers, dtype=torch.uint8).repeat_interleave(2)[:, None, None, None].expand(-1, 3, 4, 4)
    values = torch.tensor(numbers, dtype=torch.float32)
    return Evaluation([f"prompt {number}" for number in numbers], images, values, values / 10 if strict else None)


@pytest.mark.parametrize("strict", [True, False])
def test_the_ranks_shares_are_put_in_the_set_s_order(strict) -> None:
    """Five prompts over three ranks: two, two and one."""
    merged = Evaluation.merge([part([0, 3], strict), part([1, 4], strict), part([2], strict)], 5)
    expected = part([0, 1, 2, 3, 4], strict)
    assert merged.prompts == expected.prompts and torch.equal(merged.images, expected.images)
    assert torch.equal(merged.rewards, expected.rewards)
    assert torch.equal(merged.strict, expected.strict) if strict else merged.strict is None


def test_before_and_after_are_paired_by_prompt() -> None:
    before = part([1, 10, 100])
    after = Evaluation(before.prompts, before.images, before.rewards + torch.tensor([0.5, 0.75, 1.0]), before.strict)
    record = compare_evaluations(before, after)
    assert record["difference"] == {"mean": 0.75, "stderr": pytest.approx(0.25 / math.sqrt(3)), "n": 3}
    assert (record["before"]["mean"], record["after"]["mean"]) == (37.0, 37.75)
    assert record["before"]["stderr"] > 10, "what prompts differ in is no uncertainty of the difference"


def test_an_image_that_one_of_the_two_lacks_is_no_difference(monkeypatch) -> None:
    """Its siblings score otherwise: taken alone, they would raise or lower the prompt's mean."""
    before = measured(monkeypatch, Counting())
    scores = before.scores + 0.5
    scores[1, 0], scores[2] = math.nan, math.inf
    after = Evaluation(before.prompts, before.images, run.means_of_prompts(scores), None, scores)
    record = compare_evaluations(before, after)
    assert record["difference"] == {"mean": 0.5, "stderr": 0.0, "n": 2}
    assert (record["before"]["n"], record["before"]["unscored"]) == (3, 0)
    assert (record["after"]["n"], record["after"]["unscored"], record["after"]["mean"]) == (2, 5, (2.0 + 6.5) / 2)


def test_an_evaluation_of_an_earlier_version_is_compared_by_prompts(monkeypatch) -> None:
    new = measured(monkeypatch, Counting())
    old = Evaluation(*(getattr(new, name) for name in ("prompts", "images", "rewards", "strict")))
    assert compare_evaluations(old, new)["difference"] == {"mean": 0.0, "stderr": 0.0, "n": 3}


def test_a_rank_without_prompts_and_one_without_scores_have_their_share(monkeypatch) -> None:
    """Three ranks, two prompts; the second rank's pictures all go unscored."""

    class Silent(Judging):
        name = "silent"

        def score(self, images, prompts, metadata):
            output = super().score(images, prompts, metadata)
            missing = torch.tensor([prompt == "prompt 1" for prompt in prompts])
            return RewardOutput(output.scores.masked_fill(missing, math.nan), output.details)

    def share(prompts: list[Prompt]) -> Evaluation:
        images = torch.zeros(len(prompts) * B, 3, 8, 8, dtype=torch.uint8)
        shown = torch.ones(len(images), dtype=torch.bool)
        monkeypatch.setattr(run, "sample_images", lambda *arguments, **options: (images, shown))
        return evaluate(None, None, None, None, WeightedRewards([Silent()], [1.0]), prompts, images_per_prompt=B, batch=2, seed=0)

    merged = Evaluation.merge([share(PROMPTS[:1]), share(PROMPTS[1:2]), share([])], 2)
    assert merged.prompts == ["prompt 0", "prompt 1"] and len(merged.images) == 2 * B
    assert merged.rewards[0] == 1.5 and merged.rewards[1].isnan() and merged.strict.tolist() == [0.5, 0.5]
    assert merged.unscored == B and merged.summary()["n"] == 1


def test_prdp_evaluate_gives_a_silent_reward_up_after_some_images() -> None:
    """Blocks of one image: a single one without a score ends nothing."""

    def block(*scores: float) -> Block:
        return Block({"a": torch.tensor([scores]), "a/detail": torch.tensor([scores])}, torch.zeros(1), torch.zeros(1))

    unscored = {"a": 0}
    for _ in range(run.PATIENCE - 1):
        run.give_up_on_silent_rewards(unscored, block(math.nan))
    with pytest.raises(RewardError, match="'a' returned NaN or infinity for all of the first 16 images"):
        run.give_up_on_silent_rewards(dict(unscored), block(math.inf))
    run.give_up_on_silent_rewards(unscored, block(math.nan, 1.0))
    for _ in range(run.PATIENCE):
        run.give_up_on_silent_rewards(unscored, block(math.nan))


# Rewards that are held out from training.


class Falling(Reward):
    """Minus the numbers of `Counting`, of which the third image has none."""

    name = "falling"

    def score(self, images, prompts, metadata):
        scores = -torch.arange(len(images)).float()
        scores[2] = math.nan
        return RewardOutput(scores)


def test_a_held_out_reward_is_scored_beside_the_trained_one(monkeypatch) -> None:
    images = torch.zeros(len(PROMPTS) * B, 3, 8, 8, dtype=torch.uint8)
    shown = torch.ones(len(images), dtype=torch.bool)
    shown[5] = False  # a picture that is not finite has no score of any reward
    monkeypatch.setattr(run, "sample_images", lambda *arguments, **options: (images, shown))
    trained, held = WeightedRewards([Counting()], [1.0]), WeightedRewards([Falling()], [1.0])
    found = evaluate(
        None, None, None, None, trained, PROMPTS, images_per_prompt=B, batch=2, seed=0, held_rewards=held
    )  # fmt: skip
    assert found.rewards.tolist() == pytest.approx([1.5, 17 / 3, 9.5]), "the trained reward is as it was"
    assert found.held["falling"].tolist() == pytest.approx([-4 / 3, -17 / 3, -9.5])
    nothing = evaluate(None, None, None, None, trained, [], images_per_prompt=B, batch=2, seed=0, held_rewards=held)
    assert nothing.held["falling"].shape == (0,)
    assert torch.equal(Evaluation.merge([found], 3).held["falling"], found.held["falling"])
    # Of two ranks: the first has prompts 0 and 2, the second 1.
    assert found.scores is not None
    ranks = [
        Evaluation(
            [found.prompts[i] for i in own], images.unflatten(0, (3, B))[own].flatten(0, 1), found.rewards[own], None,
            found.scores[own], {"falling": found.held["falling"][own]},
        )
        for own in ([0, 2], [1])
    ]  # fmt: skip
    merged = Evaluation.merge(ranks, 3)
    assert merged.prompts == found.prompts and torch.equal(merged.held["falling"], found.held["falling"])


def measured_twice(trained: list[float], held: list[float]) -> dict:
    """A summary's evaluation, of two prompts before (0 everywhere) and after."""
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)

    def of(rewards: list[float], other: list[float]) -> Evaluation:
        values = torch.tensor(rewards)
        return Evaluation(["a", "b"], images, values, None, values[:, None], {"other": torch.tensor(other)})

    return {"seen": compare_evaluations(of([0.0, 0.0], [0.0, 0.0]), of(trained, held))}


def test_a_warning_only_where_the_trained_rises_and_the_held_out_falls_beyond_their_errors() -> None:
    (line,) = over_optimised(measured_twice([1.0, 1.1], [-0.5, -0.6]))
    assert "on seen the trained reward has risen by 1.05 ± 0.05, and other, held out, has fallen by 0.55 ± 0.05" in line
    assert "raise objective.kl_weight" in line
    for trained, held in (
        ([1.0, 1.1], [0.5, 0.6]), ([-1.0, -1.1], [-0.5, -0.6]), ([1.0, 1.1], [-0.5, 0.4]), ([1.0, -0.9], [-0.5, -0.6]),
        ([1.0, 1.1], [math.nan, math.nan]),
    ):  # fmt: skip
        assert over_optimised(measured_twice(trained, held)) == []
    text = before_after(measured_twice([1.0, 1.1], [-0.5, -0.6])).markdown()
    assert "| seen, other (held out) | 2 | 0.000 ± 0.000 | -0.550 ± 0.050 | -0.550 ± 0.050 | -11.0 |" in text
