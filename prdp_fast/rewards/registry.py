"""Build the rewards a recipe names and add them up."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from importlib import import_module
from typing import Any, Protocol

import torch

from prdp_fast.errors import RewardError, UserError
from prdp_fast.records import Scores
from prdp_fast.rewards.base import Reward, RewardOutput

# name -> module and class, imported when a recipe names it: a reward's libraries are needed by nobody else.
REWARDS: dict[str, str] = {
    "http": "prdp_fast.rewards.http:HttpReward",
    "jpeg_size": "prdp_fast.rewards.jpeg_size:JpegSize",
    "python": "prdp_fast.rewards.python:PythonReward",
    "shapes_alignment": "prdp_fast.rewards.shapes_alignment:ShapesAlignment",
}


class RewardSpec(Protocol):
    """One entry of a recipe's list of rewards."""

    @property
    def name(self) -> str: ...
    @property
    def weight(self) -> float: ...
    @property
    def options(self) -> Mapping[str, Any]: ...


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

    def __init__(self, rewards: Sequence[Reward], weights: Sequence[float]) -> None:
        """Raises: UserError if there is no reward, one occurs twice, or a weight is not finite."""
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

    def score(self, images: torch.Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
        """Score images with every reward.

        Args:
            images: (N, 3, H, W) uint8, sRGB.
            prompts, metadata: N of each, one per image.
        Returns: scores on the CPU. An image that a reward of non-zero weight could not score has total NaN.
        Raises: RewardError if a reward gives anything but N numbers, or no finite one. ValueError if the arguments disagree.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"rewards: images are {tuple(images.shape)} {images.dtype}; expected (N, 3, H, W) torch.uint8")
        if not len(images) == len(prompts) == len(metadata):
            raise ValueError(
                f"rewards: {len(images)} images, {len(prompts)} prompts and {len(metadata)} metadata; expected one each"
            )
        total = torch.zeros(len(images), dtype=torch.float64)  # so that the sum is rounded once
        parts: dict[str, torch.Tensor] = {}
        details: dict[str, torch.Tensor] = {}
        for reward, weight in zip(self.rewards, self.weights, strict=True):
            output = _checked(reward.name, reward.score(images, prompts, metadata), len(images))
            parts[reward.name] = output.scores
            details.update({f"{reward.name}/{key}": value for key, value in output.details.items()})
            if weight != 0:
                total += weight * output.scores.double()
        total[~total.isfinite()] = math.nan
        return Scores(total.float(), parts, details)


def _checked(name: str, output: RewardOutput, expected: int) -> RewardOutput:
    """The output as CPU float32, if it holds `expected` numbers of everything and a finite score."""
    output = as_numbers(name, output, expected)
    if expected and not output.scores.isfinite().any():
        raise RewardError(
            f"reward {name!r} returned NaN or infinity for all {expected} images; expected at least one finite score: "
            "check the images it was given and its weights"
        )
    return output


def as_numbers(name: str, output: RewardOutput, expected: int) -> RewardOutput:
    """The output as CPU float32. Raises: RewardError unless it holds `expected` numbers of everything; NaN is one."""

    def numbers(what: str, value: Any) -> torch.Tensor:
        try:
            tensor = torch.as_tensor(value).detach().to(device="cpu", dtype=torch.float32)
        except (TypeError, ValueError, RuntimeError) as error:
            raise RewardError(
                f"reward {name!r} returned {type(value).__name__} as {what}; expected {expected} numbers"
            ) from error
        if tensor.shape != (expected,):
            raise RewardError(
                f"reward {name!r} returned {what} of shape {tuple(tensor.shape)}; expected ({expected},), one per image"
            )
        return tensor

    details = {key: numbers(f"detail {key!r}", value) for key, value in output.details.items()}
    return RewardOutput(numbers("scores", output.scores), details)


def build_rewards(specs: Iterable[RewardSpec]) -> WeightedRewards:
    """The rewards of a recipe, in its order. Nothing heavy is loaded before the first image is scored.

    Raises: UserError for an unknown reward or option, a wrong value, a reward listed twice, an empty list.
    """
    specs = list(specs)
    return WeightedRewards([build_reward(spec.name, spec.options) for spec in specs], [spec.weight for spec in specs])
