"""Pictures side by side: grids of samples, and before against after."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from prdp_fast.core.files import whole
from prdp_fast.reporting.captions import MOST_LINES, Typeface, typeface, wrap

PADDING = 8  # pixels between cells
FONT_SIZE = 12  # pixels
SMALLEST_GRID_CELL, SMALLEST_CELL = 128, 144  # pixels: narrower images are magnified, in a grid and in a comparison
PAIR_COLUMNS = 3  # pairs beside each other in a picture of two models
PAIR_GAP = 2  # white pixels of an image between the two of a pair
INK, FAINT, PAPER = (20, 20, 20), (110, 110, 110), (255, 255, 255)


def image_grid(
    images: torch.Tensor, path: Path, *, columns: int = 8, scale: int | None = None, captions: Sequence[str] | None = None
) -> Path:
    """A PNG of (N, 3, H, W) uint8 images, row by row, each with its caption wrapped below it.

    scale: whole-number magnification; None takes the smallest that makes an image 128 pixels wide, 1 for photographs.
    """
    check_images(images, "images")
    if captions is not None and len(captions) != len(images):
        raise ValueError(f"{len(images)} images but {len(captions)} captions")
    if scale is None:
        scale = max(1, math.ceil(SMALLEST_GRID_CELL / images.shape[-1]))
    if columns < 1 or scale < 1:
        raise ValueError(f"columns and scale are at least 1, got {columns} and {scale}")
    rows = []
    for start in range(0, len(images), columns):
        part = slice(start, start + columns)
        rows.append(_Row(images[part], captions=None if captions is None else list(captions[part])))
    return _draw(rows, path, columns=min(columns, len(images)), scale=scale)


def comparison_grid(
    before: torch.Tensor,
    after: torch.Tensor,
    prompts: Sequence[str],
    path: Path,
    scores_before: Sequence[float] | None = None,
    scores_after: Sequence[float] | None = None,
    *,
    columns: int = 6,
) -> Path:
    """A PNG of pairs of rows: the images before, with their scores; those after, with theirs; the prompts they share below.

    before, after: (N, 3, H, W) uint8, image i of both made from prompts[i].
    """
    check_images(before, "before")
    check_images(after, "after")
    lengths = [len(before), len(after), len(prompts)] + [
        len(scores) for scores in (scores_before, scores_after) if scores is not None
    ]
    if len(set(lengths)) != 1 or before.shape != after.shape:
        raise ValueError(
            f"one image before, one after, one prompt and one score each are compared; got shapes {tuple(before.shape)}, "
            f"{tuple(after.shape)}, {len(prompts)} prompts and lengths {lengths}"
        )
    rows = []
    for start in range(0, len(before), columns):
        part = slice(start, start + columns)
        for label, images, scores in (("before", before, scores_before), ("after", after, scores_after)):
            notes = None if scores is None else [note(score) for score in scores[part]]
            captions = list(prompts[part]) if label == "after" else None
            rows.append(_Row(images[part], label=label, notes=notes, captions=captions))
    scale = max(1, math.ceil(SMALLEST_CELL / before.shape[-1]))
    return _draw(rows, path, columns=min(columns, len(before)), scale=scale)


def note(score: float) -> str:
    """Below an image. A number that has many digits is written with its power of ten: a note is one line of the cell."""
    if not math.isfinite(score):
        return "no score"
    return f"reward {score:.2f}" if abs(score) < 1e6 else f"reward {score:.2e}"


def model_grid(models: Sequence[torch.Tensor], prompts: Sequence[str], path: Path) -> Path:
    """A PNG of what one model made of each prompt; or two models, in pairs, the first at the left. The prompts stand below.

    Args: models: (N, 3, H, W) uint8 of each, image i made from prompts[i]; further prompts are left out.
    """
    captions = list(prompts[: len(models[0])])
    if len(models) == 1:
        return image_grid(models[0], path, columns=2 * PAIR_COLUMNS, captions=captions)
    left, right = models
    if left.shape != right.shape:
        raise ValueError(f"pairs are of equal shapes; got {tuple(left.shape)} and {tuple(right.shape)}")
    white = torch.full((*left.shape[:3], PAIR_GAP), 255, dtype=torch.uint8)
    pairs = torch.cat([left, white, right], dim=-1)
    scale = max(1, math.ceil(2 * SMALLEST_GRID_CELL / pairs.shape[-1]))
    return image_grid(pairs, path, columns=PAIR_COLUMNS, scale=scale, captions=captions)


def file_name(label: str) -> str:
    """A prompt set's label as the name of a file."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", label).strip("-.") or "set"


def check_images(images: torch.Tensor, name: str) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or images.shape[0] == 0:
        raise ValueError(f"{name}: expected (N, 3, H, W) uint8 with N > 0, got {tuple(images.shape)} {images.dtype}")


class _Row:
    """Images beside each other; a label at the left; below each image a note (one line), then a caption (wrapped)."""

    def __init__(
        self,
        images: torch.Tensor,
        *,
        label: str | None = None,
        notes: Sequence[str] | None = None,
        captions: Sequence[str] | None = None,
    ) -> None:
        self.images, self.label, self.notes, self.captions = images, label, notes, captions

    def texts(self, font: Typeface, width: int) -> list[list[tuple[str, tuple[int, int, int]]]]:
        """For every image the lines below it, with their colours."""
        cells: list[list[tuple[str, tuple[int, int, int]]]] = [[] for _ in self.images]
        for i, cell in enumerate(cells):
            if self.notes is not None:
                cell.append((self.notes[i], FAINT))
            if self.captions is not None:
                cell.extend((text, INK) for text in wrap(font.shown(self.captions[i]), font, width, MOST_LINES))
        return cells


def _draw(rows: Sequence[_Row], path: Path, *, columns: int, scale: int) -> Path:
    font = typeface(FONT_SIZE)
    line, ascent = round(FONT_SIZE * 1.3), font.faces[0].font.getmetrics()[0]
    height, width = (side * scale for side in rows[0].images.shape[2:])
    labels = [row.label for row in rows if row.label]
    gutter = PADDING + max((math.ceil(font.getlength(label)) for label in labels), default=-PADDING) + PADDING
    texts = [row.texts(font, width) for row in rows]
    heights = [height + line * max(map(len, cells)) + (4 if any(cells) else 0) for cells in texts]
    # A row without captions belongs to the one below it.
    gaps = [PADDING if row.captions is None else 2 * PADDING for row in rows]
    sheet = Image.new("RGB", (gutter + columns * (width + PADDING), PADDING + sum(heights) + sum(gaps)), PAPER)
    draw = ImageDraw.Draw(sheet)
    y = PADDING
    for row, cells, row_height, gap in zip(rows, texts, heights, gaps, strict=True):
        if row.label:
            font.draw(draw, (PADDING, y + (height - line) // 2 + ascent), row.label, INK)
        for i, (image, cell) in enumerate(zip(row.images, cells, strict=True)):
            x = gutter + i * (width + PADDING)
            picture = Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())
            sheet.paste(picture.resize((width, height), Image.Resampling.NEAREST), (x, y))
            for number, (text, colour) in enumerate(cell):
                font.draw(draw, (x, y + height + 4 + number * line + ascent), text, colour)
        y += row_height + gap
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as partial:
        sheet.save(partial, format="PNG", optimize=True)
    return path
