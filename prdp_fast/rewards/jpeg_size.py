"""How well does the image compress? The size of its JPEG encoding, as in DDPO (arXiv 2305.13301, kvablack/ddpo-pytorch)."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image

from prdp_fast.rewards.base import Reward, RewardOutput


def jpeg_kilobytes(image: torch.Tensor, quality: int) -> float:
    """Size of the JPEG encoding of a (3, H, W) uint8 image, in kilobytes of 1000 bytes."""
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(buffer, format="JPEG", quality=quality)
    return buffer.tell() / 1000


class JpegSize(Reward):
    """Minus the kilobytes (direction "compress") or the kilobytes ("incompress") of each image as a JPEG."""

    name = "jpeg_size"

    def __init__(self, *, quality: int = 95, direction: str = "compress") -> None:
        if type(quality) is not int or not 1 <= quality <= 100:
            raise ValueError(f"quality is {quality!r}; expected an integer from 1 to 100")
        if direction not in ("compress", "incompress"):
            raise ValueError(f"direction is {direction!r}; expected 'compress' or 'incompress'")
        self.quality = quality
        self.sign = -1.0 if direction == "compress" else 1.0

    def score(self, images: torch.Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> RewardOutput:
        sizes = [jpeg_kilobytes(image, self.quality) for image in images.cpu()]
        return RewardOutput(self.sign * torch.tensor(sizes, dtype=torch.float32))
