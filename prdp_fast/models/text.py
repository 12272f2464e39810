"""Prompts to embeddings: each prompt once per epoch, the empty prompt once per run."""

from __future__ import annotations

from functools import cached_property

import torch

from prdp_fast.core.records import Prompt, TextEmbeddings
from prdp_fast.models.pipeline import Pipeline


class TextEncoder:
    """The pipeline's own `encode_prompt`, in whichever way its family encodes."""

    def __init__(self, pipeline: Pipeline, dtype: torch.dtype) -> None:
        """Args: dtype: of the embeddings, the denoiser's."""
        self.pipeline, self.dtype = pipeline, dtype

    @torch.no_grad()
    def _encode(self, texts: list[str], *, negative: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        embeds, pooled = self.pipeline.family.encode(self.pipeline.whole, texts, negative=negative)
        return embeds.to(self.dtype), None if pooled is None else pooled.to(self.dtype)

    @cached_property
    def _shared(self) -> dict[str, torch.Tensor | None]:
        """What all rows share. The negative prompt is the empty one, or zeros for an SDXL with `force_zeros_for_empty_prompt`."""
        embeds, pooled = self._encode([""], negative=True)
        further = self.pipeline.family.shared_conditioning(self.pipeline.whole, embeds.device, self.dtype)
        return {"negative_prompt_embeds": embeds, "negative_pooled_prompt_embeds": pooled, **further}

    def encode(self, prompts: list[Prompt]) -> TextEmbeddings:
        """One row per prompt, (G, L, D)."""
        embeds, pooled = self._encode([prompt.text for prompt in prompts], negative=False)
        return TextEmbeddings(prompt_embeds=embeds, pooled_prompt_embeds=pooled, **self._shared)
