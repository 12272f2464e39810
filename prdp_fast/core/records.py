"""What flows along the straight line, from prompts to weights. Plain containers: no behaviour beyond slicing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch


@dataclass(frozen=True)
class Prompt:
    """One prompt of a prompt set. `index` is its number in the whole set: it keys the noise, whichever rank draws it."""

    index: int
    text: str
    metadata: dict[str, Any]
    occurrence: int = 0  # 1 for the second copy in an epoch that straddles two passes over the set


class TextEmbeddings(NamedTuple):
    """Text conditioning of N rows, ready for the denoiser."""

    prompt_embeds: torch.Tensor  # (N, L, D) model dtype
    negative_prompt_embeds: torch.Tensor  # (1, L, D): the empty prompt, broadcast to every row
    # SDXL's, else None.
    pooled_prompt_embeds: torch.Tensor | None = None  # (N, P) model dtype
    negative_pooled_prompt_embeds: torch.Tensor | None = None  # (1, P), broadcast to every row
    time_ids: torch.Tensor | None = None  # (1, 6) pixels: original height and width, crop's top and left, target height and width

    def rows(self, index: torch.Tensor | slice) -> TextEmbeddings:
        pooled = self.pooled_prompt_embeds
        return self._replace(
            prompt_embeds=self.prompt_embeds[index], pooled_prompt_embeds=None if pooled is None else pooled[index]
        )


@dataclass
class Trajectories:
    """N sampled trajectories of T steps, grouped by prompt: row r belongs to prompt r // images_per_prompt."""

    prompts: list[Prompt]  # G prompts
    images_per_prompt: int  # B; N = G * B
    embeddings: TextEmbeddings  # G rows, one per prompt
    latents: torch.Tensor  # (N, T+1, C, H, W) float32, x_T first
    log_probs: torch.Tensor  # (N, S) float32, nats: the sampler's own log-probs of the S stochastic steps
    seeds: torch.Tensor  # (N,) int64, the Philox keys of their noise
    steps: torch.Tensor  # (N, S) int64 on the CPU: the numbers of each trajectory's stochastic steps, in order

    def embedding_rows(self, rows: torch.Tensor) -> TextEmbeddings:
        return self.embeddings.rows(torch.div(rows, self.images_per_prompt, rounding_mode="floor"))


@dataclass(frozen=True)
class Scores:
    """Rewards of N images."""

    total: torch.Tensor  # (N,) float32; NaN marks an image that could not be scored
    parts: dict[str, torch.Tensor]  # raw score of each reward, (N,) float32, before weighting
    details: dict[str, torch.Tensor]  # further per-image figures for reports, (N,) float32, e.g. "shapes_alignment/strict"

    def without(self, lost: torch.Tensor) -> Scores:
        """The same with NaN for the images of which `lost`, (N,) bool on the CPU, is true."""
        if not bool(lost.any()):
            return self

        def blank(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {name: value.masked_fill(lost, math.nan) for name, value in values.items()}

        return Scores(self.total.masked_fill(lost, math.nan), blank(self.parts), blank(self.details))
