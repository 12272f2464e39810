"""Prompts to embeddings: each prompt once per epoch, the empty prompt once per run."""

from __future__ import annotations

from functools import cached_property

import torch

from prdp_fast.models.pipeline import Pipeline
from prdp_fast.records import Prompt, TextEmbeddings


class TextEncoder:
    """The pipeline's tokenizer and text encoder, as `StableDiffusionPipeline.encode_prompt` uses them."""

    def __init__(self, pipeline: Pipeline, dtype: torch.dtype) -> None:
        """Args: dtype: of the embeddings, the U-Net's."""
        self.tokenizer, self.model, self.dtype = pipeline.tokenizer, pipeline.text_encoder, dtype

    @torch.no_grad()
    def _encode(self, texts: list[str]) -> torch.Tensor:
        tokens = self.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")["input_ids"]
        return self.model(tokens.to(self.model.device))[0].to(self.dtype)

    @cached_property
    def _empty(self) -> torch.Tensor:
        return self._encode([""])

    def encode(self, prompts: list[Prompt]) -> TextEmbeddings:
        """One row per prompt, (G, L, D)."""
        return TextEmbeddings(self._encode([prompt.text for prompt in prompts]), self._empty)
