"""The drawn world behind the embedded model: grammar, renderer, splits.

Every prompt describes one outlined shape by seven independent attributes:

    a {size} {fill} {shape} with a {outline} outline at the {row} {column} on a {background} background

3 sizes, 6 shapes, 3 rows, 3 columns and three different colours out of 11 give 3*6*9*(11*10*9) = 160,380 prompts, each of
which a program can draw (`render`) and check (`rewards/shapes_alignment.py`). The embedded model, its prompt shards and its
reward all read the world from here, and from nowhere else.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch

IMAGE_SIZE = 32  # pixels, height and width
OUTLINE_WIDTH = 2.0  # pixels, measured inwards from the shape's edge

# sRGB, chosen so that the two closest colours (orange, yellow) stay 0.33 apart in the unit cube.
PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (215, 35, 40),
    "green": (40, 160, 65),
    "blue": (40, 70, 220),
    "yellow": (245, 225, 50),
    "orange": (245, 140, 30),
    "purple": (130, 45, 170),
    "cyan": (60, 205, 225),
    "pink": (250, 145, 195),
    "white": (250, 250, 250),
    "black": (10, 10, 10),
    "gray": (128, 128, 128),
}
COLOURS = tuple(PALETTE)
SIZES = ("small", "medium", "large")
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "bar")
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "center", "right")

RADII = {"small": 6.0, "medium": 8.0, "large": 10.0}  # pixels
CENTRES = (9, 16, 23)  # pixels, of the three rows and of the three columns
JITTER = 1  # pixels: a drawn centre lies within this of its cell's centre, in both directions

# One (fill, shape) pair per shape that no training prompt contains, so that a model must compose it from its parts.
HELD_OUT_BINDINGS = frozenset(
    {("purple", "circle"), ("orange", "square"), ("cyan", "triangle"), ("red", "diamond"), ("yellow", "cross"), ("blue", "bar")}
)
HELD_OUT_COMBINATIONS = 0.08  # share of the remaining prompts that is held out whole, chosen by a hash of the text

Split = Literal["train", "unseen_combination", "unseen_binding"]


class Scene(NamedTuple):
    """What one prompt says. The field order is the order of `ATTRIBUTES`."""

    size: str
    fill: str
    shape: str
    outline: str
    row: str
    column: str
    background: str

    def prompt(self) -> str:
        return (
            f"a {self.size} {self.fill} {self.shape} with a {self.outline} outline "
            f"at the {self.row} {self.column} on a {self.background} background"
        )


ATTRIBUTES = Scene._fields

_PATTERN = re.compile(
    "a ({size}) ({colour}) ({shape}) with a ({colour}) outline at the ({row}) ({column}) on a ({colour}) background".format(
        size="|".join(SIZES), colour="|".join(COLOURS), shape="|".join(SHAPES), row="|".join(ROWS), column="|".join(COLUMNS)
    )
)


def parse(prompt: str) -> Scene:
    """The scene a prompt describes.

    Raises: ValueError, showing the grammar, if the prompt is not a sentence of this world.
    """
    match = _PATTERN.fullmatch(prompt.strip())
    if match is None:
        raise ValueError(
            f"prompt {prompt!r} is not a scene of the embedded world; expected "
            "'a SIZE COLOUR SHAPE with a COLOUR outline at the ROW COLUMN on a COLOUR background', "
            f"e.g. {scene_at(0).prompt()!r}"
        )
    return Scene(*match.groups())


_COLOUR_TRIPLES = tuple((f, o, b) for f in COLOURS for o in COLOURS for b in COLOURS if len({f, o, b}) == 3)
NUM_SCENES = len(SIZES) * len(SHAPES) * len(ROWS) * len(COLUMNS) * len(_COLOUR_TRIPLES)


def scene_at(index: int) -> Scene:
    """Scene number `index` of the fixed enumeration, 0 <= index < NUM_SCENES (mixed radix, colours fastest)."""
    if not 0 <= index < NUM_SCENES:
        raise IndexError(f"scene index {index} is outside 0..{NUM_SCENES - 1}")
    index, triple = divmod(index, len(_COLOUR_TRIPLES))
    index, column = divmod(index, len(COLUMNS))
    index, row = divmod(index, len(ROWS))
    size, shape = divmod(index, len(SHAPES))
    fill, outline, background = _COLOUR_TRIPLES[triple]
    return Scene(SIZES[size], fill, SHAPES[shape], outline, ROWS[row], COLUMNS[column], background)


def split_of(scene: Scene) -> Split:
    """The split a scene belongs to; a property of the text alone, so that it never moves."""
    if (scene.fill, scene.shape) in HELD_OUT_BINDINGS:
        return "unseen_binding"
    digest = hashlib.blake2b(scene.prompt().encode(), digest_size=4).digest()
    held_out = int.from_bytes(digest, "little") < HELD_OUT_COMBINATIONS * 2**32
    return "unseen_combination" if held_out else "train"


def shape_distance(shape: str, radius: float, dx: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
    """Signed distance in pixels (negative inside) of offsets (dx, dy) from the centre of `shape`; y grows downwards.

    The extents are balanced so that equal radii look equally large.
    """
    ax, ay = dx.abs(), dy.abs()
    if shape == "circle":
        return torch.hypot(dx, dy) - radius
    if shape == "square":
        return torch.maximum(ax, ay) - 0.85 * radius
    if shape == "diamond":
        return (ax + ay - 1.25 * radius) / 2**0.5
    if shape == "triangle":  # equilateral, point up, inradius 0.62 radius
        side = ax * (3**0.5 / 2) - dy * 0.5
        return torch.maximum(dy, side) - 0.62 * radius
    # Small crosses and bars would have no fill left inside a 2-pixel outline.
    radius = max(radius, 6.5)
    if shape == "cross":
        arm = 0.45 * radius
        return torch.minimum(torch.maximum(ax - radius, ay - arm), torch.maximum(ax - arm, ay - radius))
    if shape == "bar":
        return torch.maximum(ax - 1.1 * radius, ay - 0.5 * radius)
    raise ValueError(f"unknown shape {shape!r}; expected one of {', '.join(SHAPES)}")


def region_masks(shape: str, size: str, centre_y: int, centre_x: int) -> torch.Tensor:
    """Anti-aliased coverage of fill, outline and background, (3, 32, 32) float32, summing to 1 at every pixel."""
    axis = torch.arange(IMAGE_SIZE, dtype=torch.float32)
    distance = shape_distance(shape, RADII[size], (axis - centre_x)[None, :], (axis - centre_y)[:, None])
    outer = (0.5 - distance).clamp(0, 1)
    inner = (0.5 - (distance + OUTLINE_WIDTH)).clamp(0, 1)
    return torch.stack([inner, outer - inner, 1 - outer])


def render(scenes: Sequence[Scene], generator: torch.Generator | None = None) -> torch.Tensor:
    """Draw scenes.

    Args:
        scenes: N scenes.
        generator: CPU generator for the jitter of the centres; None draws every shape at the centre of its cell.
    Returns: (N, 3, 32, 32) uint8, sRGB.
    """
    if generator is None:
        jitter = torch.zeros(len(scenes), 2, dtype=torch.int64)
    else:
        jitter = torch.randint(-JITTER, JITTER + 1, (len(scenes), 2), generator=generator)
    images = []
    for scene, (jitter_y, jitter_x) in zip(scenes, jitter.tolist(), strict=True):
        masks = region_masks(
            scene.shape, scene.size, CENTRES[ROWS.index(scene.row)] + jitter_y, CENTRES[COLUMNS.index(scene.column)] + jitter_x
        )
        colours = torch.tensor([PALETTE[scene.fill], PALETTE[scene.outline], PALETTE[scene.background]], dtype=torch.float32)
        images.append(torch.einsum("rhw,rc->chw", masks, colours))
    return torch.stack(images).round().to(torch.uint8)
