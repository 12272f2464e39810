"""Build the rewards a recipe names and add them up."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np
import torch

from prdp_fast.config.recipe import RewardSettings
from prdp_fast.core.errors import RewardError, UserError
from prdp_fast.core.records import Scores
from prdp_fast.rewards.background import Worker
from prdp_fast.rewards.base import Reward, RewardOutput
from prdp_fast.rewards.normalisation import Moments, Reduce, moments_over_ranks

# name -> module and class, imported when a recipe names it: a reward's libraries are needed by nobody else.
REWARDS: dict[str, str] = {
    "aesthetic": "prdp_fast.rewards.aesthetic:Aesthetic",
    "clip_score": "prdp_fast.rewards.clip_score:ClipScore",
    "hpsv2": "prdp_fast.rewards.hpsv2:HpsV2",
    "http": "prdp_fast.rewards.http:HttpReward",
    "image_reward": "prdp_fast.rewards.image_reward:ImageReward",
    "jpeg_size": "prdp_fast.rewards.jpeg_size:JpegSize",
    "pickscore": "prdp_fast.rewards.pickscore:PickScore",
    "python": "prdp_fast.rewards.python:PythonReward",
    "shapes_alignment": "prdp_fast.rewards.shapes_alignment:ShapesAlignment",
}


def _hint(word: str, known: Iterable[str]) -> str:
    near = get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def build_reward(name: str, options: Mapping[str, Any]) -> Reward:
    """Raises: UserError naming the known rewards or options if one is unknown, or the option whose value is wrong."""
    if name not in REWARDS:
        raise UserError(f"unknown reward {name!r}; known rewards: {', '.join(sorted(REWARDS))}{_hint(name, REWARDS)}")
    module, _, attribute = REWARDS[name].partition(":")
    reward_class = getattr(import_module(module), attribute)
    known = list(inspect.signature(reward_class).parameters)
    for option in options:
        if option not in known:
            has = f"its options: {', '.join(known)}" if known else "it has no options"
            raise UserError(f"reward {name!r} has no option {option!r}; {has}{_hint(option, known)}")
    try:
        reward: Reward = reward_class(**options)
    except (TypeError, ValueError) as error:
        raise UserError(f"reward {name!r}: {error}") from error
    return reward


class WeightedRewards:
    """The weighted sum of several rewards. One of weight 0 is reported and not added."""

    def __init__(
        self,
        rewards: Sequence[Reward],
        weights: Sequence[float],
        normalise: Sequence[str] | None = None,
        timeout_s: float | None = None,
    ) -> None:
        """
        Args:
            normalise: of each, "none", "batch" or "running"; for `normalised` alone. None: "none" of all.
            timeout_s: seconds that each reward has for a call; None: as long as it takes.
        Raises: UserError if there is no reward, one occurs twice, or a weight is not finite.
        """
        names = [reward.name for reward in rewards]
        if not names:
            raise UserError(f"no reward is given; expected at least one of {', '.join(sorted(REWARDS))}")
        for name, weight in zip(names, weights, strict=True):
            if names.count(name) > 1:
                raise UserError(f"reward {name!r} is listed {names.count(name)} times; keep one and set its weight")
            if not math.isfinite(weight):
                raise UserError(f"reward {name!r} has weight {weight}; expected a finite number")
        self.rewards = list(rewards)
        self.weights = [float(weight) for weight in weights]
        self.normalise = dict(zip(names, normalise or ["none"] * len(names), strict=True))
        self.timeout_s = timeout_s
        for reward in self.rewards:
            reward.timeout_s = timeout_s
        self._worker = Worker("reward")

    @property
    def verdict(self) -> str | None:
        """The key of `Scores.details` that says whether an image is all right; of the first reward that has one."""
        return next((f"{reward.name}/{reward.verdict}" for reward in self.rewards if reward.verdict is not None), None)

    def prepare(self) -> None:
        """Load every reward's model. Raises: RewardError."""
        for reward in self.rewards:
            reward.prepare()

    def score(
        self, images: torch.Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]], *, some: bool = True
    ) -> Scores:
        """Score images with every reward.

        Args:
            images: (N, 3, H, W) uint8, sRGB.
            prompts, metadata: N of each, one per image.
            some: refuse to go on without a single finite score; False where these are a part of what is scored.
        Returns: scores on the CPU. An image that a reward of non-zero weight could not score has total NaN.
        Raises: RewardError if a reward gives anything but N numbers, no finite one, or nothing in its time. ValueError if the
            arguments disagree.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"rewards: images are {tuple(images.shape)} {images.dtype}; expected (N, 3, H, W) torch.uint8")
        if not len(images) == len(prompts) == len(metadata):
            raise ValueError(
                f"rewards: {len(images)} images, {len(prompts)} prompts and {len(metadata)} metadata; expected one each"
            )
        parts: dict[str, torch.Tensor] = {}
        details: dict[str, torch.Tensor] = {}
        for reward in self.rewards:
            try:
                output = _checked(reward.name, self._ask(reward, images, prompts, metadata), len(images), some=some)
            except torch.OutOfMemoryError as error:
                raise RewardError(
                    f"reward {reward.name!r} ran out of the device's memory with {len(images)} images; lower its batch, or "
                    "serve it from another device (prdp serve-reward)"
                ) from error
            parts[reward.name] = output.scores
            details.update({f"{reward.name}/{key}": value for key, value in output.details.items()})
        return Scores(self._total(parts, {}), parts, details)

    def _ask(
        self, reward: Reward, images: torch.Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> RewardOutput:
        """One reward's answer, from a thread that can be left behind. An interrupt ends the waiting."""
        try:
            return self._worker.run(partial(reward.score, images, prompts, metadata), self.timeout_s)
        except TimeoutError:
            raise RewardError(
                f"reward {reward.name!r} gave no scores of {len(images)} images within {self.timeout_s:g} s; look why it hangs, "
                "or raise schedule.reward_timeout_s"
            ) from None
        except SystemExit as error:  # in a library of a reward
            raise RewardError(f"reward {reward.name!r} asked the process to end ({error}); look at what it said") from error

    def normalised(
        self, scores: Scores, seen: Mapping[str, Sequence[float]], reduce: Reduce
    ) -> tuple[Scores, dict[str, list[float]], dict[str, float]]:
        """Scores of an epoch with a total of parts divided by their standard deviations, where the recipe says so.

        Every rank calls this, and gets the same deviations.

        Args:
            scores: of this rank.
            seen: what the call before returned second, empty at first; of plain numbers, for checkpoints.
            reduce: sums of float64 numbers over ranks.
        Returns: the scores, their parts as they were; what was seen up to and with them; the divisor of each normalised reward.
        """
        chosen = [name for name, mode in self.normalise.items() if mode != "none"]
        if not chosen:
            return scores, {}, {}
        divisors, now_seen = {}, {}
        for name, moments in zip(chosen, moments_over_ranks([scores.parts[name] for name in chosen], reduce), strict=True):
            if self.normalise[name] == "running":
                moments = Moments(*seen.get(name, ())).merged(moments)
                now_seen[name] = list(moments)
            divisors[name] = moments.scale
        return replace(scores, total=self._total(scores.parts, divisors)), now_seen, divisors

    def _total(self, parts: Mapping[str, torch.Tensor], divisors: Mapping[str, float]) -> torch.Tensor:
        """(N,) float32, NaN where a part of non-zero weight is not finite, or the sum is more than float32 holds."""
        total = torch.zeros(len(next(iter(parts.values()))), dtype=torch.float64)  # so that the sum is rounded once
        for (name, part), weight in zip(parts.items(), self.weights, strict=True):
            if weight != 0:
                total += weight / divisors.get(name, 1.0) * part.double()
        rounded = total.float()
        rounded[~rounded.isfinite()] = math.nan
        return rounded


def _checked(name: str, output: RewardOutput, expected: int, *, some: bool) -> RewardOutput:
    """The output as CPU float32, if it holds `expected` numbers of everything and, where `some` must be, a finite score."""
    given, output = output.scores, as_numbers(name, output, expected)
    if some and expected and not output.scores.isfinite().any():
        too_large = bool(_tensor(given, torch.float64).isfinite().any())
        what = "numbers beyond 3.4e+38, the largest of float32," if too_large else "NaN or infinity"
        raise RewardError(
            f"reward {name!r} returned {what} for all {expected} images; expected at least one finite score: "
            "check the images it was given and its weights"
        )
    return output


def as_numbers(name: str, output: RewardOutput, expected: int) -> RewardOutput:
    """The output as CPU float32. Raises: RewardError unless it holds `expected` numbers of everything; NaN is one."""

    def numbers(what: str, value: Any) -> torch.Tensor:
        try:
            tensor = _tensor(value)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise RewardError(
                f"reward {name!r} returned {type(value).__name__} as {what}; expected {expected} numbers"
            ) from error
        if tensor.shape == (expected, 1):
            tensor = tensor[:, 0]
        if tensor.shape != (expected,):
            raise RewardError(
                f"reward {name!r} returned {what} of shape {tuple(tensor.shape)}; expected ({expected},), one per image"
            )
        return tensor

    details = {key: numbers(f"detail {key!r}", value) for key, value in output.details.items()}
    return RewardOutput(numbers("scores", output.scores), details)


def _tensor(value: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Numbers in any container as `dtype` on the CPU, in memory of their own. None counts as NaN.

    Raises: TypeError, ValueError, RuntimeError or OverflowError if they are none.
    """
    if not isinstance(value, (torch.Tensor, np.ndarray)) and hasattr(value, "__array__"):
        value = np.asarray(value)
    if isinstance(value, np.ndarray) and value.dtype == object:
        value = value.tolist()
    if isinstance(value, (list, tuple)) and any(not isinstance(item, (int, float)) for item in value):
        if any(getattr(item, "is_cuda", False) for item in value):  # one transfer, not one for each
            value = torch.stack([torch.as_tensor(item) for item in value])
        else:
            value = [_number(item) for item in value]
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "fiub":
            raise TypeError(f"an array of {value.dtype}")
        # torch takes neither uint64, swapped bytes nor steps backwards.
        value = value.copy() if value.dtype == np.float32 else value.astype(np.float64, order="C")
    # Python's numbers are float64, and torch would make infinity of those beyond float32.
    tensor = torch.as_tensor(value, dtype=torch.float64) if isinstance(value, (list, tuple)) else torch.as_tensor(value)
    if tensor.is_complex():
        raise TypeError("complex numbers")
    # A clone: the reward may keep the memory and fill it again, and a tensor of inference mode could not be written to.
    return tensor.detach().to(device="cpu", dtype=dtype).clone()


def _number(item: Any) -> Any:
    """A Python number, or a list of them for the caller to refuse by its shape."""
    if item is None:
        return math.nan
    if isinstance(item, (str, bytes)):
        raise TypeError(f"{item!r} is no number")
    if hasattr(item, "tolist"):
        item = item.tolist()
    if isinstance(item, (list, tuple)):
        return _number(item[0]) if len(item) == 1 else [_number(part) for part in item]
    return item


def build_rewards(rewards: Iterable[RewardSettings], timeout_s: float | None = None) -> WeightedRewards:
    """The rewards of a recipe, in its order. Nothing heavy is loaded before the first image is scored.

    Args: timeout_s: seconds that each has for a call.
    Raises: UserError for an unknown reward or option, a wrong value, a reward listed twice, an empty list.
    """
    rewards = list(rewards)
    return WeightedRewards(
        [build_reward(reward.name, reward.options) for reward in rewards],
        [reward.weight for reward in rewards],
        [reward.normalise for reward in rewards],
        timeout_s,
    )
