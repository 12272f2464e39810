from __future__ import annotations

import math
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from prdp_fast.core.errors import UserError
from prdp_fast.rewards import REWARDS, BackgroundScores, Reward, RewardError, RewardOutput, WeightedRewards, build_rewards
from prdp_fast.world import scenes

N = 3
IMAGES = torch.zeros(N, 3, 32, 32, dtype=torch.uint8)


@dataclass(frozen=True)
class Spec:
    name: str
    weight: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)
    normalise: str = "none"


def _fixed(reward_name: str, scores: Any, **details: Any) -> Reward:
    class Fixed(Reward):
        name = reward_name

        def score(self, images: torch.Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> RewardOutput:
            return RewardOutput(scores, details)

    return Fixed()


def _score(*rewards: Reward, weights: Sequence[float] | None = None):  # type: ignore[no-untyped-def]
    return WeightedRewards(rewards, weights or [1.0] * len(rewards)).score(IMAGES, ["a"] * N, [{}] * N)


def test_weighted_sum() -> None:
    a, b = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.2, -0.4, 0.6], dtype=torch.float64)
    scores = _score(_fixed("a", a, strict=torch.tensor([True, False, True])), _fixed("b", b), weights=[10, -0.05])
    assert scores.total.dtype == torch.float32
    assert scores.total.tolist() == pytest.approx([9.99, 20.02, 29.97], rel=1e-7)
    assert list(scores.parts) == ["a", "b"] and scores.parts["b"].dtype == torch.float32
    assert torch.equal(scores.parts["a"], a) and torch.equal(scores.parts["b"], b.float())
    assert {name: values.tolist() for name, values in scores.details.items()} == {"a/strict": [1.0, 0.0, 1.0]}


def test_built_from_specs() -> None:
    chosen = [scenes.scene_at(number) for number in (5, 70_000, 150_000)]
    prompts = [scene.prompt() for scene in chosen]
    specs = [Spec("shapes_alignment", 2.0), Spec("jpeg_size", 0.5, {"quality": 80, "direction": "incompress"})]
    rewards = build_rewards(specs)
    scores = rewards.score(scenes.render(chosen), prompts, [{}] * N)
    torch.testing.assert_close(scores.total, 2 * scores.parts["shapes_alignment"] + 0.5 * scores.parts["jpeg_size"])
    assert "shapes_alignment/strict" in scores.details
    assert rewards.score(IMAGES[:0], [], []).total.shape == (0,)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_unscored_image_stays_alone(bad: float) -> None:
    scores = _score(_fixed("a", torch.tensor([1.0, bad, 3.0])), _fixed("b", torch.ones(N)), weights=[1, 2])
    assert scores.total[[0, 2]].tolist() == [3.0, 5.0] and scores.total[1].isnan()
    assert scores.parts["b"].tolist() == [1.0] * N


def test_opposite_infinities_do_not_cancel() -> None:
    scores = _score(_fixed("a", torch.tensor([1.0, math.inf, 1.0])), _fixed("b", torch.tensor([1.0, -math.inf, 1.0])))
    assert scores.total.isnan().tolist() == [False, True, False]


def test_a_total_that_float32_cannot_hold_is_no_score() -> None:
    """Finite in float64 and infinite in float32, of one reward's weight or of two that add up."""
    scores = _score(_fixed("a", torch.tensor([1e36, -1e36, 1.0])), weights=[1000.0])
    assert scores.total.isnan().tolist() == [True, True, False]
    scores = _score(_fixed("a", torch.tensor([3e38, 3e38, 1.0])), _fixed("b", torch.tensor([3e38, -3e38, 1.0])))
    assert scores.total.isnan().tolist() == [True, False, False] and scores.total[1:].tolist() == [0.0, 2.0]


def test_scores_beyond_float32_are_called_so() -> None:
    with pytest.raises(RewardError, match=r"numbers beyond 3.4e\+38, the largest of float32, for all 3 images"):
        _score(_fixed("odd", torch.full((N,), 1e39, dtype=torch.float64)))


def test_a_reward_without_memory_is_one_line() -> None:
    class Large(Reward):
        name = "large"

        def score(self, images, prompts, metadata):  # type: ignore[no-untyped-def]
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(RewardError, match="reward 'large' ran out of the device's memory with 3 images; lower its batch"):
        _score(Large())


def test_scores_without_some_images() -> None:
    scores = _score(_fixed("a", torch.tensor([1.0, 2.0, 3.0]), strict=torch.ones(N)))
    assert scores.without(torch.zeros(N, dtype=torch.bool)) is scores
    less = scores.without(torch.tensor([False, True, False]))
    for values in (less.total, less.parts["a"], less.details["a/strict"]):
        assert values.isnan().tolist() == [False, True, False]
    assert scores.total.isfinite().all()


def test_a_reward_of_weight_zero_is_only_reported() -> None:
    scores = _score(_fixed("a", torch.ones(N)), _fixed("b", torch.tensor([1.0, math.nan, 1.0])), weights=[1, 0])
    assert scores.total.tolist() == [1.0] * N and scores.parts["b"][1].isnan()


@pytest.mark.parametrize(
    ("scores", "details", "message"),
    [
        (torch.full((N,), math.nan), {}, "reward 'odd' returned NaN or infinity for all 3 images"),
        (torch.tensor([math.nan, math.inf, math.nan]), {}, "for all 3 images"),
        ([None] * N, {}, "reward 'odd' returned NaN or infinity for all 3 images"),
        (np.array([None] * N, dtype=object), {}, "reward 'odd' returned NaN or infinity for all 3 images"),
        ([[None]] * N, {}, "for all 3 images"),
        (np.array([None, 1e300, None], dtype=object), {}, r"numbers beyond 3.4e\+38"),
        (torch.ones(N + 1), {}, r"reward 'odd' returned scores of shape \(4,\); expected \(3,\)"),
        (torch.ones(N, 2), {}, r"shape \(3, 2\); expected \(3,\)"),
        (torch.ones(1, N), {}, r"shape \(1, 3\); expected \(3,\)"),
        ([[1.0, 2.0]] * N, {}, r"shape \(3, 2\)"),
        ({"scores": [1.0] * N}, {}, "returned dict as scores"),
        (np.array([1j] * N), {}, "returned ndarray as scores"),
        (1.0, {}, r"shape \(\); expected \(3,\)"),
        (["a", "b", "c"], {}, "returned list as scores; expected 3 numbers"),
        (None, {}, "returned NoneType as scores"),
        (torch.ones(N), {"x": torch.ones(2)}, r"returned detail 'x' of shape \(2,\)"),
    ],
)
def test_what_is_no_score_is_refused(scores: Any, details: dict[str, Any], message: str) -> None:
    with pytest.raises(RewardError, match=message) as caught:
        _score(_fixed("odd", scores, **details))
    assert isinstance(caught.value, UserError) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([Spec("shape_alignment")], "unknown reward 'shape_alignment'; known rewards: .*did you mean 'shapes_alignment'"),
        ([Spec("beauty")], "unknown reward 'beauty'; known rewards: aesthetic, .*jpeg_size, .*shapes_alignment"),
        ([Spec("jpeg_size", options={"qualty": 90})], "'jpeg_size' has no option 'qualty'; .*did you mean 'quality'"),
        ([Spec("jpeg_size", options={"quality": 0})], "'jpeg_size': quality is 0; expected an integer from 1 to 100"),
        ([Spec("jpeg_size", options={"quality": "high"})], "quality is 'high'"),
        ([Spec("jpeg_size", options={"direction": "up"})], "expected 'compress' or 'incompress'"),
        ([Spec("shapes_alignment", options={"sigma": 1})], "'shapes_alignment' has no option 'sigma'; its options: attributes"),
        ([Spec("jpeg_size"), Spec("jpeg_size", options={"quality": 50})], "'jpeg_size' is listed 2 times"),
        ([Spec("jpeg_size", weight=math.nan)], "weight nan; expected a finite number"),
        ([], "no reward is given"),
    ],
)
def test_recipes_that_cannot_be_built(specs: list[Spec], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_rewards(specs)


def test_arguments_that_disagree() -> None:
    rewards = WeightedRewards([_fixed("a", torch.ones(N))], [1.0])
    with pytest.raises(ValueError, match="3 images, 2 prompts and 3 metadata"):
        rewards.score(IMAGES, ["a"] * 2, [{}] * N)
    with pytest.raises(ValueError, match=r"torch.float32"):
        rewards.score(IMAGES.float(), ["a"] * N, [{}] * N)


# Options without which a reward cannot be built.
NEEDED = {"http": {"url": "http://127.0.0.1:8000"}, "python": {"function": "operator:add"}}


def test_every_registered_reward_carries_its_name() -> None:
    for name in REWARDS:
        assert build_rewards([Spec(name, options=NEEDED.get(name, {}))]).rewards[0].name == name


def test_a_reward_is_imported_only_when_named() -> None:
    libraries = "('PIL', 'fastapi', 'httpx2', 'tenacity', 'transformers', 'uvicorn')"
    code = f"import sys, prdp_fast.rewards; assert not any(name.split('.')[0] in {libraries} for name in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "given",
    [
        np.array([1.0, None, 3.0], dtype=object),
        [1.0, None, 3.0],
        [torch.tensor(1.0), torch.tensor(math.nan), torch.tensor(3.0)],
        [torch.tensor([1.0]), None, np.float32(3)],
        np.array([[1.0], [math.nan], [3.0]]),
        torch.tensor([[1.0], [math.nan], [3.0]], dtype=torch.bfloat16),
        np.array([3.0, math.nan, 1.0])[::-1],
        np.array([1.0, math.nan, 3.0], dtype=">f4"),
        np.ma.array([1.0, math.nan, 3.0]),
        [np.float64(1), math.nan, np.uint64(3)],
    ],
    ids=str,
)
def test_numbers_in_any_container(given: Any) -> None:
    scores = _score(_fixed("a", given)).parts["a"]
    assert scores.dtype == torch.float32 and scores[[0, 2]].tolist() == [1.0, 3.0] and scores[1].isnan()


def test_unsigned_and_whole_numbers() -> None:
    assert _score(_fixed("a", np.array([1, 2, 2**63], dtype=np.uint64))).parts["a"].tolist() == [1.0, 2.0, 2.0**63]
    assert _score(_fixed("a", [True, False, 3])).parts["a"].tolist() == [1.0, 0.0, 3.0]


def test_scores_are_no_view_of_what_the_reward_keeps() -> None:
    kept = torch.ones(N)
    scores = _score(_fixed("a", kept)).parts["a"]
    kept.zero_()
    assert scores.tolist() == [1.0] * N
    with torch.inference_mode():
        made = torch.ones(N)
    _score(_fixed("a", made)).parts["a"].add_(1)  # refused on a tensor of inference mode


class Hangs(Reward):
    name = "hangs"

    def __init__(self) -> None:
        self.calls, self.ends = 0, threading.Event()

    def score(self, images, prompts, metadata):  # type: ignore[no-untyped-def]
        self.calls += 1
        if self.calls == 1:
            self.ends.wait(60)
        return RewardOutput(torch.full((N,), float(self.calls)))


def test_a_reward_that_hangs_is_named_and_left_behind() -> None:
    reward = Hangs()
    rewards = WeightedRewards([_fixed("a", torch.ones(N)), reward], [1.0, 1.0], timeout_s=0.3)
    started = time.monotonic()
    with pytest.raises(
        RewardError, match=r"reward 'hangs' gave no scores of 3 images within 0\.3 s; .*schedule.reward_timeout_s"
    ):
        rewards.score(IMAGES, ["a"] * N, [{}] * N)
    assert 0.3 <= time.monotonic() - started < 10
    assert rewards.score(IMAGES, ["a"] * N, [{}] * N).total.tolist() == [3.0] * N  # a repetition has a thread of its own
    reward.ends.set()


def test_nobody_waits_for_a_hanging_call_in_the_background() -> None:
    reward, scorer = Hangs(), BackgroundScores(in_background=True)
    rewards = WeightedRewards([reward], [1.0])
    scoring = scorer.start(partial(rewards.score, IMAGES, ["a"] * N, [{}] * N))
    started = time.monotonic()
    scorer.close()
    assert time.monotonic() - started < 10 and not reward.ends.is_set()
    reward.ends.set()
    assert scoring().total.tolist() == [1.0] * N


def test_a_call_costs_its_thread_little() -> None:
    rewards = WeightedRewards([_fixed("a", torch.ones(N))], [1.0], timeout_s=60.0)
    rewards.score(IMAGES, ["a"] * N, [{}] * N)
    started = time.monotonic()
    for _ in range(100):
        rewards.score(IMAGES, ["a"] * N, [{}] * N)
    assert (time.monotonic() - started) / 100 < 0.02  # two milliseconds on a busy machine


def test_gradients_are_recorded_where_the_caller_records_them() -> None:
    seen = []

    class Looks(Reward):
        name = "looks"

        def score(self, images, prompts, metadata):  # type: ignore[no-untyped-def]
            seen.append(torch.is_grad_enabled())
            return RewardOutput(torch.ones(N))

    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            _score(Looks())
    assert seen == [True, False]
