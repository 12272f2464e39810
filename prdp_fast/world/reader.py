"""Does the image show what the prompt says? A checker for the drawn world of `scenes`.

The reading does not depend on the prompt. Every pixel is assigned softly to the 11 palette colours; every template (shape,
size, centre) splits the picture into fill, outline and background, and explains as many pixels as its three regions hold of
their best colours. The best template and its colours are what the image shows.

Seven attributes are then compared with the prompt:

    fill, outline, background   share of the region's pixels that have the prompt's colour
    shape, size, row, column    exp(-lost / 8), lost = pixels no longer explained when the attribute is forced to the prompt's,
                                times 1 - exp(-gained / 8), gained = pixels explained beyond those of one plain colour

The last factor is above 0.99 for every drawn shape and 0 for an empty picture, which would lose nothing by any attribute.
`score` is their mean, in [0, 1]; `strict` says whether all seven readings equal the prompt's attributes. A drawn picture of
the prompt scores above 0.9 and a mismatched one about 0.2 (`tests/rewards/test_shapes_alignment.py` holds both).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch

from prdp_fast.world import scenes
from prdp_fast.world.scenes import COLOURS, COLUMNS, IMAGE_SIZE, ROWS, SHAPES, SIZES

COLOUR_SIGMA = 0.12  # unit-cube distance; the closest two colours are 0.33 apart, so their midpoint is well resolved
PIXELS = 8.0  # an attribute that costs this many to force keeps 1/e of its score; a shape this large is believed to 1 - 1/e
SMALLEST = 1e-30  # share of a pixel that counts; with denormal numbers a matrix product takes twice as long
CHUNK = 64  # images read together: a block's pixels of all of them stay in cache

_JITTER = range(-scenes.JITTER, scenes.JITTER + 1)
_GRID = (len(SHAPES), len(SIZES), len(ROWS), len(COLUMNS), len(_JITTER) ** 2)  # the templates, in this order
_LABELS = {"shape": SHAPES, "size": SIZES, "row": ROWS, "column": COLUMNS}  # the first four axes of the grid
_REGIONS = ("fill", "outline", "background")


class _Block(NamedTuple):
    """Templates of one size in one row of cells: outside a band of rows they are background, so only the band is read."""

    band: slice  # of the picture's pixels, row by row
    masks: torch.Tensor  # (P, 2*C) float32, coverage of the band's P pixels by the fill of the block's C templates, then outline


class _Templates(NamedTuple):
    masks: torch.Tensor  # (K, 3, H*W) float32: coverage by fill, outline and background of all templates, in the grid's order
    blocks: list[_Block]  # by size, then row; in each, templates by shape, column, jitter


@cache
def _templates(device: torch.device) -> _Templates:
    masks = torch.stack(
        [
            scenes.region_masks(shape, size, y + dy, x + dx).flatten(1)
            for shape in SHAPES
            for size in SIZES
            for y in scenes.CENTRES
            for x in scenes.CENTRES
            for dy in _JITTER
            for dx in _JITTER
        ]
    )
    grid = masks.view(*_GRID, 3, IMAGE_SIZE, IMAGE_SIZE)
    blocks = []
    for size in range(len(SIZES)):
        for row in range(len(ROWS)):
            shapes = grid[:, size, row, :, :, :2].flatten(0, 2)  # (C, 2, H, W)
            used = shapes.amax((0, 1, 3)).nonzero().flatten().tolist()
            first, end = used[0], used[-1] + 1
            band = shapes[:, :, first:end].flatten(2)  # (C, 2, P)
            pixels = slice(first * IMAGE_SIZE, end * IMAGE_SIZE)
            blocks.append(_Block(pixels, band.transpose(0, 1).flatten(0, 1).T.contiguous().to(device)))
    return _Templates(masks.to(device), blocks)


class Reading(NamedTuple):
    """N images read against N prompts."""

    scores: torch.Tensor  # (N,) float32 in [0, 1], mean over the attributes
    strict: torch.Tensor  # (N,) bool, every attribute read right
    attribute_scores: torch.Tensor  # (N, 7) float32, in the order of scenes.ATTRIBUTES
    attribute_right: torch.Tensor  # (N, 7) bool


def _colour_shares(images: torch.Tensor) -> torch.Tensor:
    """(N, 3, H, W) uint8 -> (N, 11, H*W) float32, soft assignment of each pixel to the palette."""
    palette = torch.tensor(list(scenes.PALETTE.values()), dtype=torch.float32, device=images.device) / 255
    pixels = images.float().flatten(2) / 255  # (N, 3, H*W)
    # Minus half the squared distance, without the pixel's own square: it is the same for all colours.
    closeness = palette @ pixels - palette.square().sum(-1, keepdim=True) / 2
    shares = torch.softmax(closeness / COLOUR_SIGMA**2, dim=1)
    return torch.nn.functional.threshold_(shares, SMALLEST, 0.0)


def _read_chunk(images: torch.Tensor, wanted: Sequence[scenes.Scene]) -> tuple[torch.Tensor, torch.Tensor]:
    """Attribute scores (n, 7) float32 and attribute readings right (n, 7) bool of n images."""
    templates = _templates(images.device)
    n, rows = len(images), torch.arange(len(images), device=images.device)
    shares = _colour_shares(images)
    whole = shares.sum(-1, keepdim=True)  # (n, 11, 1) pixels of each colour
    explained = []
    for block in templates.blocks:
        # Pixels of each region in each colour, (n, 11, C). Coverages add up to 1, so the background is what remains.
        fill, outline = (shares[..., block.band] @ block.masks).chunk(2, dim=-1)
        background = whole - fill - outline
        explained.append(fill.amax(1) + outline.amax(1) + background.amax(1))
    blocks = torch.stack(explained, 1).view(n, len(SIZES), len(ROWS), len(SHAPES), len(COLUMNS), -1)
    evidence = blocks.permute(0, 3, 1, 2, 4, 5).flatten(1)  # (n, K) pixels explained, in the grid's order
    most, best = evidence.max(-1)
    presence = 1 - torch.exp((whole.amax((1, 2)) - most).clamp(max=0) / PIXELS)
    masks = templates.masks[best]  # (n, 3, H*W)
    regions, areas = masks @ shares.transpose(1, 2), masks.sum(-1)  # (n, 3, 11) and (n, 3) pixels, of the best template

    def indices(attribute: str, names: Sequence[str]) -> torch.Tensor:
        return torch.tensor([names.index(getattr(scene, attribute)) for scene in wanted], device=images.device)

    scores, right = {}, {}
    for number, attribute in enumerate(_REGIONS):
        colour = indices(attribute, COLOURS)
        pixels = regions[:, number]  # (n, 11)
        scores[attribute] = (pixels[rows, colour] / areas[:, number].clamp(min=1.0)).clamp(0, 1)
        right[attribute] = pixels.argmax(-1) == colour
    grid = evidence.view(n, *_GRID)
    best_labels = torch.unravel_index(best, _GRID)
    for axis, (attribute, names) in enumerate(_LABELS.items()):
        label = indices(attribute, names)
        forced = grid.amax([other for other in range(1, grid.ndim) if other != axis + 1])[rows, label]
        scores[attribute] = torch.exp((forced - most) / PIXELS) * presence
        right[attribute] = best_labels[axis] == label
    order = scenes.ATTRIBUTES
    return torch.stack([scores[attribute] for attribute in order], 1), torch.stack([right[attribute] for attribute in order], 1)


def read_images(images: torch.Tensor, prompts: Sequence[str]) -> Reading:
    """Read images and compare them with their prompts.

    Args:
        images: (N, 3, 32, 32) uint8, sRGB; read on the device they are on.
        prompts: N sentences of the embedded world.
    Returns: the reading, on the CPU.
    Raises: ValueError if the shapes disagree or a prompt is not of this world.
    """
    if images.dtype != torch.uint8 or images.shape[1:] != (3, IMAGE_SIZE, IMAGE_SIZE) or len(images) != len(prompts):
        raise ValueError(
            f"shapes_alignment: images are {tuple(images.shape)} {images.dtype} for {len(prompts)} prompts; "
            f"expected ({len(prompts)}, 3, {IMAGE_SIZE}, {IMAGE_SIZE}) torch.uint8"
        )
    wanted = [scenes.parse(prompt) for prompt in prompts]
    scores = torch.zeros(len(images), len(scenes.ATTRIBUTES))
    right = torch.zeros(scores.shape, dtype=torch.bool)
    for start in range(0, len(images), CHUNK):
        chunk = slice(start, start + CHUNK)
        scores[chunk], right[chunk] = _read_chunk(images[chunk], wanted[chunk])
    return Reading(scores.mean(-1), right.all(-1), scores, right)
