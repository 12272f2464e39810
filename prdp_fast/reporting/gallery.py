"""Pictures before and after in the report: the same prompt and the same noise, side by side or in one place.

The choice is a group of radio buttons: arrow keys turn from one to the other, and no script is needed. Paper always has both.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from prdp_fast.core.visible import visible
from prdp_fast.reporting.images import note
from prdp_fast.reporting.markup import Markup, join, tag
from prdp_fast.reporting.run_data import EvaluatedSet

MOST_SIDE = 384  # pixels: what is larger is made smaller
SMALL = 128  # pixels: such pictures are kept exactly, and shown with sharp pixels
SHEET_SIDE = 1600  # pixels, of a sheet of many pictures
QUALITY = 82  # JPEG
MOST_BYTES = 3_500_000  # of all pictures of a page
MOST_PROMPT = 400  # characters


class Budget:
    """Bytes that the pictures of one page may take together. What does not fit is left out, and counted."""

    def __init__(self, most: int = MOST_BYTES) -> None:
        self.left, self.refused = most, 0

    def take(self, data: str) -> str | None:
        if len(data) > self.left:
            self.refused += 1
            return None
        self.left -= len(data)
        return data


def data_uri(image: Image.Image, most_side: int = MOST_SIDE) -> str:
    """A PNG of a small picture, exactly; a JPEG of a large one, made smaller."""
    buffer = io.BytesIO()
    if max(image.size) <= SMALL:
        kind = "png"
        image.save(buffer, format="PNG", optimize=True)
    else:
        kind = "jpeg"
        image = image.convert("RGB")
        image.thumbnail((most_side, most_side), Image.Resampling.LANCZOS)
        image.save(buffer, format="JPEG", quality=QUALITY, optimize=True)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def picture(image: torch.Tensor, alt: str, budget: Budget) -> Markup | None:
    """Args: image: (3, H, W) uint8."""
    whole = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    data = budget.take(data_uri(whole))
    if data is None:
        return None
    pixels = "pixels" if max(whole.size) <= SMALL else None
    return tag("img", src=data, alt=alt, width=whole.width, height=whole.height, class_=pixels)


def pairs(before: EvaluatedSet, after: EvaluatedSet, count: int, identity: str, heading: str, budget: Budget) -> Markup:
    """The first image of each of the first prompts, before and after. Empty if the two are not of the same prompts."""
    if before.prompts != after.prompts or before.images.shape[1:] != after.images.shape[1:]:
        return Markup()
    shown = [tag("div", part, class_="pair") for part in (pair(before, after, i, budget) for i in range(count)) if part]
    if not shown:
        return Markup()
    switch = tag(
        "fieldset", tag("legend", "Show"),
        *(
            tag("label", tag("input", type="radio", name=f"show-{identity}", class_=css, checked=css == "both"), label)
            for css, label in (("both", "side by side"), ("only-before", "before"), ("only-after", "after, in the same place"))
        ),
    )  # fmt: skip
    return tag("div", tag("h3", heading), switch, tag("div", *shown, class_="pairs"), class_="pictures")


def pair(before: EvaluatedSet, after: EvaluatedSet, number: int, budget: Budget) -> Markup | None:
    """None beyond the last prompt, and where the page has no room."""
    if number >= len(before.prompts):
        return None
    prompt = visible(before.prompts[number], most=MOST_PROMPT)
    cells = []
    for moment, kept in (("before", before), ("after", after)):
        reward = note(float(kept.scores[number].nanmean()))
        alt = f"Generated picture {moment} finetuning for the prompt: {prompt}; {reward}"
        image = picture(kept.images[number * kept.images_per_prompt], alt, budget)
        if image is None:
            return None
        cells.append(tag("figure", image, tag("figcaption", tag("strong", moment), f" {reward}"), class_=moment))
    return join(tag("div", *cells, class_="two"), tag("p", tag("bdi", prompt), class_="prompt"))


def singles(kept: EvaluatedSet, count: int, heading: str, moment: str, budget: Budget) -> Markup:
    """The first image of each of the first prompts, of a run that has no after yet."""
    shown = []
    for number, given in enumerate(kept.prompts[:count]):
        prompt = visible(given, most=MOST_PROMPT)
        reward = note(float(kept.scores[number].nanmean()))
        alt = f"Generated picture {moment} finetuning for the prompt: {prompt}; {reward}"
        image = picture(kept.images[number * kept.images_per_prompt], alt, budget)
        if image is not None:
            caption = tag("figcaption", tag("strong", moment), f" {reward}", tag("p", tag("bdi", prompt), class_="prompt"))
            shown.append(tag("figure", image, caption, class_="pair one"))
    return join(tag("h3", heading), tag("div", *shown, class_="pairs")) if shown else Markup()


def sheet(path: Path, alt: str, heading: str, budget: Budget, faults: list[str]) -> Markup:
    """A picture of the run directory as it is, a grid of samples with their prompts."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            data = budget.take(data_uri(image, SHEET_SIDE))
    except Exception as error:  # Pillow has many ways to say that a file is no picture
        faults.append(f"{path.name} is no picture ({type(error).__name__})")
        return Markup()
    if data is None:
        return Markup()
    shown = tag("img", src=data, alt=alt, width=width, height=height)
    return join(tag("h3", heading), tag("figure", shown, tag("figcaption", alt), class_="one"))


def latest_sheet(samples: Path) -> Path | None:
    """Of the grids that an unfinished run has drawn at its evaluations, the newest."""
    return max(samples.glob("epoch-*.png"), default=None, key=lambda path: path.name)


def finite_scores(sets: Sequence[EvaluatedSet]) -> list[float]:
    """Of every image of all of them that has one."""
    return [value for kept in sets for value in kept.scores.flatten().tolist() if math.isfinite(value)]
