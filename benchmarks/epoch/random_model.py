"""A pipeline with random weights, known from its configurations alone: for timing models that are not downloaded."""

from __future__ import annotations

import zlib
from types import SimpleNamespace
from typing import Any

import torch

from prdp_fast.models.families import Family
from prdp_fast.models.pipeline import Pipeline

SEED = 0


class RandomPipeline(Pipeline):
    """A denoiser with random weights and random text embeddings. It has no decoder, so there are no pictures to score."""

    @classmethod
    def load(  # type: ignore[override]  # a family only: there is nothing to read the weights from
        cls, family: Family, device: torch.device, frozen_dtype: torch.dtype, scheduler: str | None = None
    ) -> RandomPipeline:
        """As `Pipeline.load`. Every call makes the same weights, in float32."""
        torch.manual_seed(SEED)
        with device:
            denoiser = family.denoiser_class.from_config(family.denoiser_config)
        denoiser.requires_grad_(False).eval()
        return cls(family, denoiser, None, family.scheduler(scheduler), RandomText(family, device))  # type: ignore[arg-type]


class RandomText:
    """Stands in for a diffusers pipeline where a family encodes text. A text has the same embedding at every call."""

    vae_scale_factor = 8

    def __init__(self, family: Family, device: torch.device) -> None:
        inputs = family.denoiser_inputs(1, "meta")
        told = [inputs["encoder_hidden_states"]]
        if "added_cond_kwargs" in inputs:  # SDXL's pooled embedding
            told.append(inputs["added_cond_kwargs"]["text_embeds"])
        self.shapes = [tuple(tensor.shape[1:]) for tensor in told]
        self.text_encoder = SimpleNamespace(device=device)  # families encode where it is

    def encode_prompt(self, texts: list[str], *, device: torch.device, **options: Any) -> tuple[torch.Tensor, ...]:
        """Embeddings and negative ones, then pooled and negative pooled ones if the model takes them; each (N, ...) float32."""
        found: list[torch.Tensor] = []
        for shape in self.shapes:
            own = torch.stack([normal(text, shape) for text in texts]).to(device)
            found += [own, own]
        return tuple(found)


def normal(text: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Standard normals on the CPU, keyed by a text."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(text.encode())))
