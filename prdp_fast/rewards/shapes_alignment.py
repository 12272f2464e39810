"""The embedded world's reward: does the image show what its prompt says? A program reads it, `prdp_fast.world.reader`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from prdp_fast.core.errors import RewardError, UserError
from prdp_fast.rewards.base import Reward, RewardOutput
from prdp_fast.world import scenes
from prdp_fast.world.reader import read_images


class ShapesAlignment(Reward):
    """`read_images` as a reward: the mean score of the chosen attributes, in [0, 1].

    Details, whichever are chosen: "strict", 1 where all seven attributes are read right, "seven", the mean score of all seven,
    and every attribute's own.
    """

    name = "shapes_alignment"
    verdict = "strict"

    def __init__(self, *, attributes: Sequence[str] = scenes.ATTRIBUTES) -> None:
        unknown = [attribute for attribute in attributes if attribute not in scenes.ATTRIBUTES]
        if unknown or not attributes or len(set(attributes)) < len(attributes):
            raise UserError(f"attributes is {list(attributes)}; expected different ones of {', '.join(scenes.ATTRIBUTES)}")
        self.columns = [scenes.ATTRIBUTES.index(attribute) for attribute in attributes]

    def score(self, images: torch.Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> RewardOutput:
        try:
            reading = read_images(images, prompts)
        except ValueError as error:
            raise RewardError(f'reward {self.name!r}: {error}; it scores prompts of the source "scenes" only') from error
        details = {"strict": reading.strict.float(), "seven": reading.scores}
        details.update(zip(scenes.ATTRIBUTES, reading.attribute_scores.unbind(1), strict=True))
        return RewardOutput(reading.attribute_scores[:, self.columns].mean(1), details)
