"""PickScore (arXiv:2305.01569): a CLIP ViT-H/14 that was trained on which of two images people picked.

rewards: [{name: pickscore, weight: 10, options: {logit_scale: false}}]   # as PRDP weighs it
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from prdp_fast.rewards.clip import ClipReward

MODEL = "yuvalkirstain/PickScore_v1"
PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # what the model was finetuned from, and what its card reads inputs with


class PickScore(ClipReward):
    """exp(logit_scale) * cosine, about 21.8 for SD v1.4; the cosine alone, 0.218, with `logit_scale` false.

    PRDP (arXiv:2402.08714) reports and weighs the cosine.
    """

    name = "pickscore"

    def __init__(
        self,
        *,
        logit_scale: bool = True,
        model: str = MODEL,
        processor: str | None = None,
        batch: int = 32,
        device: str = "auto",
        dtype: str = "float32",
    ) -> None:
        """processor: hub id or directory; by default that of `MODEL`, or of a model in a directory its own."""
        if not isinstance(logit_scale, bool):
            raise ValueError(f"logit_scale is {logit_scale!r}; expected true or false")
        own = PROCESSOR if model == MODEL else model
        super().__init__(model=model, processor=processor or own, batch=batch, device=device, dtype=dtype)
        self.scaled = logit_scale

    def score_batch(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        cosine = self.clip.cosine(images, prompts)
        return self.clip.model.logit_scale.float().exp() * cosine if self.scaled else cosine
