"""What a reward is: a black box from images and prompts to one number an image."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch


class RewardOutput(NamedTuple):
    """Scores of N images."""

    scores: torch.Tensor  # (N,) float32, higher is better; non-finite marks an image that could not be scored
    details: Mapping[str, torch.Tensor] = {}  # further figures for reports, each (N,) float32


class Reward(ABC):
    """One reward. Its options are the keyword arguments of `__init__`, which checks them and loads nothing: a model is loaded
    by `prepare` or the first `score`, so that a job's settings can be checked without it."""

    name: ClassVar[str]
    # The detail that is 1 for an image that is all right and 0 for another, reported beside the reward; None: there is none.
    verdict: ClassVar[str | None] = None
    # Seconds that its owner waits for a call of `score`; None: for ever. A reward that tries again itself fits that in.
    timeout_s: float | None = None

    def prepare(self) -> None:  # noqa: B027
        """Load what the first `score` would load. A job calls it before it measures its memory and starts.

        Raises: RewardError.
        """

    @abstractmethod
    def score(self, images: torch.Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> RewardOutput:
        """Score images, each against its own prompt.

        Args:
            images: (N, 3, H, W) uint8, sRGB.
            prompts: N texts.
            metadata: N dicts, what the prompt set says of each prompt beyond its text.
        Raises: RewardError if it cannot score such images or prompts at all.
        """
