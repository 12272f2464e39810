"""Does the image show what the prompt says? A checker for the drawn world of `prdp_fast.scenes`.

The reading does not depend on the prompt. Every pixel is assigned softly to the 11 palette colours; every template (shape,
size, centre) splits the picture into fill, outline and background, and explains as many pixels as its three regions hold of
their best colours. The best template and its colours are what the image shows.

Seven attributes are then compared with the prompt:

    fill, outline, background   share of the region's pixels that have the prompt's colour
    shape, size, row, column    exp(-lost / 8), lost = pixels no longer explained when the attribute is forced to the prompt's

`score` is their mean, in [0, 1]; `strict` says whether all seven readings equal the prompt's attributes. A drawn picture of
the prompt scores above 0.9 and a mismatched one about 0.2 (`tests/test_shapes_alignment.py` holds both).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch

from prdp_fast import scenes
from prdp_fast.scenes import COLUMNS, IMAGE_SIZE, ROWS, SHAPES, SIZES

COLOUR_SIGMA = 0.12  # unit-cube distance; the closest two colours are 0.33 apart, so their midpoint is well resolved
PIXELS_LOST = 8.0  # pixels: an attribute that costs this many to force keeps a score of 1/e


class _Templates(NamedTuple):
    masks: torch.Tensor  # (K, 3, H*W) float32: fill, outline, background coverage of each template
    areas: torch.Tensor  # (K, 3) float32, pixels
    labels: torch.Tensor  # (K, 4) int64: indices of shape, size, row, column


@cache
def _templates() -> _Templates:
    masks, labels = [], []
    for shape_index, shape in enumerate(SHAPES):
        for size_index, size in enumerate(SIZES):
            for row, y in enumerate(scenes.CENTRES):
                for column, x in enumerate(scenes.CENTRES):
                    for dy in range(-scenes.JITTER, scenes.JITTER + 1):
                        for dx in range(-scenes.JITTER, scenes.JITTER + 1):
                            masks.append(scenes.region_masks(shape, size, y + dy, x + dx).flatten(1))
                            labels.append((shape_index, size_index, row, column))
    stacked = torch.stack(masks)
    return _Templates(stacked, stacked.sum(-1), torch.tensor(labels))


class Reading(NamedTuple):
    """N images read against N prompts."""

    scores: torch.Tensor  # (N,) float32 in [0, 1], mean over the attributes
    strict: torch.Tensor  # (N,) bool, every attribute read right
    attribute_scores: torch.Tensor  # (N, 7) float32, in the order of scenes.ATTRIBUTES
    attribute_right: torch.Tensor  # (N, 7) bool


def _colour_shares(images: torch.Tensor) -> torch.Tensor:
    """(N, 3, H, W) uint8 -> (N, 11, H*W) float32, soft assignment of each pixel to the palette."""
    palette = torch.tensor(list(scenes.PALETTE.values()), dtype=torch.float32) / 255
    pixels = images.float().flatten(2).transpose(1, 2) / 255  # (N, H*W, 3)
    squared = (pixels[:, :, None, :] - palette).square().sum(-1)
    return torch.softmax(-squared / (2 * COLOUR_SIGMA**2), dim=-1).transpose(1, 2)


def read_images(images: torch.Tensor, prompts: Sequence[str]) -> Reading:
    """Read images and compare them with their prompts.

    Args:
        images: (N, 3, 32, 32) uint8, sRGB.
        prompts: N sentences of the embedded world.
    Raises: ValueError if the shapes disagree or a prompt is not of this world.
    """
    if images.dtype != torch.uint8 or images.shape[1:] != (3, IMAGE_SIZE, IMAGE_SIZE) or len(images) != len(prompts):
        raise ValueError(
            f"shapes_alignment: images are {tuple(images.shape)} {images.dtype} for {len(prompts)} prompts; "
            f"expected ({len(prompts)}, 3, {IMAGE_SIZE}, {IMAGE_SIZE}) torch.uint8"
        )
    wanted = [scenes.parse(prompt) for prompt in prompts]
    templates = _templates()
    flat_masks = templates.masks.flatten(0, 1)
    scores, right = [], []
    # One image at a time: the (templates x regions x colours) table of an image is 48K floats and stays in cache.
    for shares, scene in zip(_colour_shares(images.cpu()), wanted, strict=True):
        explained = (flat_masks @ shares.T).unflatten(0, (-1, 3))  # (K, 3, 11) pixels of each region in each colour
        total, colour = explained.max(-1)
        evidence = total.sum(-1)  # (K,) pixels explained
        best = int(evidence.argmax())
        share = explained[best] / templates.areas[best].clamp(min=1.0)[:, None]

        wanted_labels = {
            "shape": (0, SHAPES.index(scene.shape)),
            "size": (1, SIZES.index(scene.size)),
            "row": (2, ROWS.index(scene.row)),
            "column": (3, COLUMNS.index(scene.column)),
        }
        wanted_colours = {"fill": 0, "outline": 1, "background": 2}
        image_scores, image_right = [], []
        for attribute in scenes.ATTRIBUTES:
            if attribute in wanted_colours:
                region = wanted_colours[attribute]
                index = scenes.COLOURS.index(getattr(scene, attribute))
                image_scores.append(share[region, index])
                image_right.append(int(colour[best, region]) == index)
            else:
                column, label = wanted_labels[attribute]
                forced = evidence[templates.labels[:, column] == label].max()
                image_scores.append(torch.exp((forced - evidence[best]) / PIXELS_LOST))
                image_right.append(int(templates.labels[best, column]) == label)
        scores.append(torch.stack(image_scores))
        right.append(torch.tensor(image_right))
    attribute_scores, attribute_right = torch.stack(scores), torch.stack(right)
    return Reading(attribute_scores.mean(-1), attribute_right.all(-1), attribute_scores, attribute_right)
