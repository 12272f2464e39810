"""CLIPScore (arXiv:2104.08718): does the image show what the prompt says?

rewards: [{name: clip_score}]
rewards: [{name: clip_score, options: {model: openai/clip-vit-large-patch14, prefix: "", scale: 100}}]   # as others count

Source: the paper's eq. 1 and github.com/jmhessel/clipscore, whose model and prefix are the defaults.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from prdp_fast.rewards.clip import ClipReward


class ClipScore(ClipReward):
    """scale * max(cosine(image, prefix + prompt), 0)."""

    name = "clip_score"

    def __init__(
        self,
        *,
        model: str = "openai/clip-vit-base-patch32",
        prefix: str = "A photo depicts ",
        scale: float = 2.5,
        batch: int = 32,
        device: str = "auto",
        dtype: str = "float32",
    ) -> None:
        super().__init__(model=model, batch=batch, device=device, dtype=dtype)
        if not isinstance(scale, (int, float)) or isinstance(scale, bool) or not (math.isfinite(scale) and scale > 0):
            raise ValueError(f"scale is {scale!r}; expected a number above 0")
        if not isinstance(prefix, str):
            raise ValueError(f"prefix is {prefix!r}; expected a text")
        self.prefix, self.scale = prefix, scale

    def score_batch(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        return self.scale * self.clip.cosine(images, [self.prefix + prompt for prompt in prompts]).clamp(min=0)
