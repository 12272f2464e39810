from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from prdp_fast.rewards.jpeg_size import JpegSize


def _pictures() -> torch.Tensor:
    """Flat, a gradient, noise; not square, so that a mix-up of the axes shows."""
    flat = torch.full((3, 48, 64), 90, dtype=torch.uint8)
    gradient = torch.arange(0, 256, 4, dtype=torch.uint8).expand(3, 48, 64)
    noise = torch.randint(0, 256, (3, 48, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return torch.stack([flat, gradient, noise])


def _bytes(image: torch.Tensor, **settings: int) -> int:
    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image.numpy().transpose(1, 2, 0)), mode="RGB").save(stream, "JPEG", **settings)
    return len(stream.getvalue())


@pytest.mark.parametrize("quality", [30, 95])
def test_size_is_that_of_an_encoding(quality: int) -> None:
    images = _pictures()
    scores = JpegSize(quality=quality, direction="incompress").score(images, [""] * 3, [{}] * 3).scores
    assert scores.dtype == torch.float32
    assert scores.tolist() == [np.float32(_bytes(image, quality=quality) / 1000) for image in images]
    assert torch.equal(JpegSize(quality=quality).score(images, [""] * 3, [{}] * 3).scores, -scores)


def test_direction_orders_pictures() -> None:
    flat, gradient, noise = JpegSize().score(_pictures(), [""] * 3, [{}] * 3).scores.tolist()
    assert 0 > flat > gradient > noise
    flat, gradient, noise = JpegSize(direction="incompress").score(_pictures(), [""] * 3, [{}] * 3).scores.tolist()
    assert 0 < flat < gradient < noise


def test_the_quality_is_that_of_ddpo() -> None:
    assert JpegSize().score(_pictures()[2:], [""], [{}]).scores.item() == np.float32(-_bytes(_pictures()[2], quality=95) / 1000)
