"""Prompts to embeddings: each prompt once per epoch, the empty prompt once per run."""

from __future__ import annotations

from functools import cached_property

import torch

from prdp_fast.models.pipeline import Pipeline
from prdp_fast.records import Prompt, TextEmbeddings


class TextEncoder:
    """The pipeline's own `encode_prompt`, in whichever way its family encodes."""

    def __init__(self, pipeline: Pipeline, dtype: torch.dtype) -> None:
        """Args: dtype: of the embeddings, the U-Net's."""
        self.pipeline, self.dtype = pipeline, dtype

    @torch.no_grad()
    def _encode(self, texts: list[str], *, negative: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Embeddings and SDXL's pooled ones: of the prompts, or of a guided call's negative prompt where none is given."""
        # Embeddings, negative ones, and of SDXL also pooled, negative pooled ones.
        encoded = self.pipeline.whole.encode_prompt(
            texts, device=self.pipeline.text_encoder.device, num_images_per_prompt=1, do_classifier_free_guidance=negative
        )
        embeds, *pooled = encoded[int(negative) :: 2]
        return embeds.to(self.dtype), pooled[0].to(self.dtype) if pooled else None

    @cached_property
    def _shared(self) -> dict[str, torch.Tensor | None]:
        """What all rows share. The negative prompt is the empty one, or zeros for an SDXL with `force_zeros_for_empty_prompt`."""
        embeds, pooled = self._encode([""], negative=True)
        time_ids = self.pipeline.time_ids
        return {
            "negative_prompt_embeds": embeds,
            "negative_pooled_prompt_embeds": pooled,
            "time_ids": None if time_ids is None else torch.tensor([time_ids], dtype=self.dtype, device=embeds.device),
        }

    def encode(self, prompts: list[Prompt]) -> TextEmbeddings:
        """One row per prompt, (G, L, D)."""
        embeds, pooled = self._encode([prompt.text for prompt in prompts], negative=False)
        return TextEmbeddings(prompt_embeds=embeds, pooled_prompt_embeds=pooled, **self._shared)
