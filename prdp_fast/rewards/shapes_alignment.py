"""Does the image show what the prompt says? A checker for the drawn world of `prdp_fast.scenes`.

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

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch

from prdp_fast import scenes
from prdp_fast.errors import RewardError, UserError
from prdp_fast.rewards.base import Reward, RewardOutput
from prdp_fast.scenes import COLOURS, COLUMNS, IMAGE_SIZE, ROWS, SHAPES, SIZES

COLOUR_SIGMA = 0.12  # unit-cube distance; the closest two colours are 0.33 apart, so their midpoint is well resolved
PIXELS = 8.0  # an attribute that costs this many to force keeps 1/e of its score; a shape this large is believed to 1 - 1/e
CHUNK = 8  # images read together: large enough for a good matrix product, small enough for its 1 MB an image to stay in cache

_GRID = (len(SHAPES), len(SIZES), len(ROWS), len(COLUMNS), (2 * scenes.JITTER + 1) ** 2)  # K templates, in this order
_LABELS = {"shape": SHAPES, "size": SIZES, "row": ROWS, "column": COLUMNS}  # the first four axes of the grid
_REGIONS = ("fill", "outline", "background")


class _Templates(NamedTuple):
    masks: torch.Tensor  # (H*W, 2*K) float32: fill coverage of the K templates, then outline coverage
    areas: torch.Tensor  # (3, K) float32, pixels of fill, outline, background


@cache
def _templates(device: torch.device) -> _Templates:
    jitter = range(-scenes.JITTER, scenes.JITTER + 1)
    masks = torch.stack(
        [
            scenes.region_masks(shape, size, y + dy, x + dx).flatten(1)
            for shape in SHAPES
            for size in SIZES
            for y in scenes.CENTRES
            for x in scenes.CENTRES
            for dy in jitter
            for dx in jitter
        ],
        dim=1,
    )  # (3, K, H*W)
    return _Templates(masks[:2].flatten(0, 1).T.contiguous().to(device), masks.sum(-1).to(device))


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
    return torch.softmax(closeness / COLOUR_SIGMA**2, dim=1)


def _read_chunk(images: torch.Tensor, wanted: Sequence[scenes.Scene]) -> tuple[torch.Tensor, torch.Tensor]:
    """Attribute scores (n, 7) float32 and attribute readings right (n, 7) bool of n images."""
    templates = _templates(images.device)
    n, rows = len(images), torch.arange(len(images), device=images.device)
    shares = _colour_shares(images)
    # Pixels of each region in each colour, (n, 11, K) a region. Coverages add up to 1, so the background is what remains.
    fill, outline = (shares.flatten(0, 1) @ templates.masks).view(n, len(COLOURS), 2, -1).unbind(2)
    whole = shares.sum(-1, keepdim=True)
    background = whole - fill - outline
    regions = (fill, outline, background)
    evidence = fill.amax(1) + outline.amax(1) + background.amax(1)  # (n, K) pixels explained
    most, best = evidence.max(-1)
    presence = 1 - torch.exp((whole.amax((1, 2)) - most).clamp(max=0) / PIXELS)

    def indices(attribute: str, names: Sequence[str]) -> torch.Tensor:
        return torch.tensor([names.index(getattr(scene, attribute)) for scene in wanted], device=images.device)

    scores, right = {}, {}
    for number, attribute in enumerate(_REGIONS):
        colour = indices(attribute, COLOURS)
        pixels = regions[number][rows, :, best]  # (n, 11)
        scores[attribute] = (pixels[rows, colour] / templates.areas[number, best].clamp(min=1.0)).clamp(0, 1)
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


class ShapesAlignment(Reward):
    """`read_images` as a reward: the mean score of the chosen attributes, in [0, 1].

    Details, whichever are chosen: "strict", 1 where all seven attributes are read right, "seven", the mean score of all seven,
    and every attribute's own.
    """

    name = "shapes_alignment"

    def __init__(self, *, attributes: Sequence[str] = scenes.ATTRIBUTES) -> None:
        unknown = [attribute for attribute in attributes if attribute not in scenes.ATTRIBUTES]
        if unknown or not attributes or len(set(attributes)) < len(attributes):
            raise UserError(f"attributes is {list(attributes)}; expected different ones of {', '.join(scenes.ATTRIBUTES)}")
        self.columns = [scenes.ATTRIBUTES.index(attribute) for attribute in attributes]

    def score(self, images: torch.Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> RewardOutput:
        try:
            reading = read_images(images, prompts)
        except ValueError as error:
            raise RewardError(f'reward {self.name!r}: {error}; it scores prompts of the source "scenes" only') from error
        details = {"strict": reading.strict.float(), "seven": reading.scores}
        details.update(zip(scenes.ATTRIBUTES, reading.attribute_scores.unbind(1), strict=True))
        return RewardOutput(reading.attribute_scores[:, self.columns].mean(1), details)
