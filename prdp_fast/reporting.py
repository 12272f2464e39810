"""What a run leaves for people's eyes: sample grids, the final table, curves."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from rich import box
from rich.console import Console
from rich.table import Table

PADDING = 8  # pixels between cells
FONT_SIZE = 12  # pixels
SMALLEST_GRID_CELL, SMALLEST_CELL = 128, 144  # pixels: narrower images are magnified, in a grid and in a comparison
INK, FAINT, PAPER = (20, 20, 20), (110, 110, 110), (255, 255, 255)


# Pictures


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
            notes = None if scores is None else [f"reward {score:.2f}" for score in scores[part]]
            captions = list(prompts[part]) if label == "after" else None
            rows.append(_Row(images[part], label=label, notes=notes, captions=captions))
    scale = max(1, math.ceil(SMALLEST_CELL / before.shape[-1]))
    return _draw(rows, path, columns=min(columns, len(before)), scale=scale)


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

    def texts(self, font: Any, width: int) -> list[list[tuple[str, tuple[int, int, int]]]]:
        """For every image the lines below it, with their colours."""
        cells: list[list[tuple[str, tuple[int, int, int]]]] = [[] for _ in self.images]
        for i, cell in enumerate(cells):
            if self.notes is not None:
                cell.append((self.notes[i], FAINT))
            if self.captions is not None:
                cell.extend((text, INK) for text in wrap(self.captions[i], font, width))
        return cells


def _draw(rows: Sequence[_Row], path: Path, *, columns: int, scale: int) -> Path:
    font = ImageFont.load_default(FONT_SIZE)
    line = round(FONT_SIZE * 1.3)
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
            draw.text((PADDING, y + (height - line) // 2), row.label, font=font, fill=INK)
        for i, (image, cell) in enumerate(zip(row.images, cells, strict=True)):
            x = gutter + i * (width + PADDING)
            picture = Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())
            sheet.paste(picture.resize((width, height), Image.Resampling.NEAREST), (x, y))
            for number, (text, colour) in enumerate(cell):
                draw.text((x, y + height + 4 + number * line), text, font=font, fill=colour)
        y += row_height + gap
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    sheet.save(partial, format="PNG", optimize=True)
    os.replace(partial, path)
    return path


def wrap(text: str, font: Any, width: float) -> list[str]:
    """`text` in lines of at most `width` pixels, broken at spaces, and inside a word that is wider than a line."""
    lines: list[str] = []
    current = ""
    for word in text.split():
        if current and font.getlength(f"{current} {word}") > width:
            lines.append(current)
            current = word
        else:
            current = f"{current} {word}" if current else word
        while len(current) > 1 and font.getlength(current) > width:
            cut = next((n for n in range(len(current) - 1, 1, -1) if font.getlength(current[:n]) <= width), 1)
            lines.append(current[:cut])
            current = current[cut:]
    return lines + [current] if current else lines


# The final table


def final_table(summary: Mapping[str, Any], console: Console | None = None) -> Table:
    """Print, and return, the reward before and after on every prompt set of `summary["evaluation"]`, with standard errors.

    The difference is paired, prompt by prompt and with the same noise; "s.e." is that difference in its own standard errors.
    """
    evaluation: Mapping[str, Any] = summary.get("evaluation") or {}
    has_strict = any("strict" in part for sets in evaluation.values() for part in (sets["before"], sets["after"]))
    # Fits 80 columns, the width of a log; wider figures wrap, they are never cut.
    table = Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        caption=_totals(summary) or None,
        caption_justify="left",
    )
    table.add_column("reward", no_wrap=True)
    for heading in ("n", "before", "after", "difference", "s.e.") + (("all right",) if has_strict else ()):
        table.add_column(heading, justify="right")
    for name, sets in evaluation.items():
        before, after, difference = sets["before"], sets["after"], sets["difference"]
        cells = [
            name,
            str(before.get("n", "-")),
            _mean(before),
            _mean(after),
            _mean(difference, sign="+"),
            _in_errors(difference),
        ]
        if has_strict:
            cells.append(f"{_percent(before.get('strict'))} > {_percent(after.get('strict'))}")
        table.add_row(*cells)
    (console or Console()).print(table)
    return table


def _mean(part: Mapping[str, Any], sign: str = "") -> str:
    mean, error = part.get("mean"), part.get("stderr")
    if mean is None:
        return "-"
    return f"{mean:{sign}.3f}" + ("" if error is None else f" ± {error:.3f}")


def _in_errors(difference: Mapping[str, Any]) -> str:
    mean, error = difference.get("mean"), difference.get("stderr")
    return f"{mean / error:+.1f}" if mean is not None and error else "-"


def _percent(value: Any) -> str:
    if isinstance(value, Mapping):
        value = value.get("mean")
    return "-" if value is None else f"{100 * value:.1f}%"


def _totals(summary: Mapping[str, Any]) -> str:
    parts = []
    if "epochs" in summary:
        parts.append(f"{summary['epochs']} epochs")
    if "images" in summary:
        parts.append(f"{summary['images']:,} images")
    if "wall_s" in summary:
        parts.append(f"{summary['wall_s'] / 60:.1f} min")
    lines = [", ".join(parts)] if parts else []
    forwards = summary.get("unet_forwards")
    if forwards:
        lines.append("U-Net forwards: " + ", ".join(f"{name} {count:,}" for name, count in forwards.items()))
    return "\n".join(lines)


# Curves

# Title, names of metrics or of groups of them ("drift" takes "drift" and "drift/..."), logarithmic.
PANELS: tuple[tuple[str, tuple[str, ...], bool], ...] = (
    ("reward", ("reward",), False),
    ("spread of the reward", ("reward_std",), False),
    ("loss", ("loss",), False),
    ("drift of the log-prob, sampler to trainer", ("drift",), True),
    ("gradient norm before clipping", ("grad_norm",), True),
    ("share clipped", ("clip_fraction",), False),
    ("log-ratio to the reference", ("kl_to_reference", "log_ratio"), False),
    ("images per second", ("images_per_s",), False),
    ("seconds per epoch", ("seconds",), False),
)
MOST_LINES = 8  # in a panel, spread evenly over what there is; more would be unreadable


def plot_curves(run_directory: Path) -> Path:
    """curves.png in the run directory, from its metrics.jsonl: one panel for every kind of metric that the run has.

    Raises: FileNotFoundError without a metrics.jsonl, ValueError if it has no epoch yet.
    """
    from matplotlib.figure import Figure  # no pyplot: draws with Agg, keeps no global state

    run_directory = Path(run_directory)
    rows = read_metrics(run_directory / "metrics.jsonl")
    if not rows:
        raise ValueError(f"{run_directory / 'metrics.jsonl'} has no finished epoch to plot")
    names = list(dict.fromkeys(name for row in rows for name in row if name != "epoch"))
    panels = []
    for title, groups, logarithmic in PANELS:
        members = [name for name in names if any(name == group or name.startswith(f"{group}/") for group in groups)]
        series = {name: [(row["epoch"], row[name]) for row in rows if _is_number(row.get(name))] for name in members}
        series = {name: points for name, points in series.items() if points}
        if series:
            chosen = list(series.items())
            if len(chosen) > MOST_LINES:
                chosen = [chosen[round(i * (len(chosen) - 1) / (MOST_LINES - 1))] for i in range(MOST_LINES)]
            panels.append((title, dict(chosen), logarithmic))
    if not panels:
        raise ValueError(f"{run_directory / 'metrics.jsonl'} has none of the metrics that are plotted")
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(5 * columns, 3.2 * lines), layout="constrained")
    for number, (title, series, logarithmic) in enumerate(panels, start=1):
        axes = figure.add_subplot(lines, columns, number)
        for name, points in series.items():
            epochs, values = zip(*points, strict=True)
            label = name.partition("/")[2] or name  # the title says the rest
            axes.plot(epochs, values, label=label, linewidth=1.2, marker="o" if len(points) == 1 else None)
        if logarithmic and all(value > 0 for points in series.values() for _, value in points):
            axes.set_yscale("log")
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("epoch", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        if len(series) > 1:
            axes.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))  # beside the curves, not on them
    path = run_directory / "curves.png"
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, format="png", dpi=120)
    os.replace(partial, path)
    return path


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl by epoch. A torn last line, left by a run that is still writing or was killed, is skipped."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; is {path.parent} a run directory?")
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and isinstance(row.get("epoch"), int):
            rows.append(row)
    return sorted(rows, key=lambda row: row["epoch"])


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
