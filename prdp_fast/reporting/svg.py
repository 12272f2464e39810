"""Charts as inline SVG, drawn with classes of the page's style, so that they follow its theme: lines, bands, histograms.

A chart has a title and a description in words, which is what a screen reader reads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from prdp_fast.reporting.markup import Markup, join, tag

WIDTH, HEIGHT = 420, 250  # of a chart, in its own units: a phone shows them at about 0.8 pixels
LEFT, RIGHT, TOP, BOTTOM = 58, 10, 10, 38  # around the axes
STYLES = 6  # colours with dash patterns of their own, see `style.py`
MOST_POINTS = 300  # of a line: more would not be seen

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Line:
    label: str
    points: Points
    style: int = 0
    band: Sequence[tuple[float, float, float]] = ()  # x, low, high
    faint: bool = False  # drawn thin, and not in the legend


@dataclass(frozen=True)
class Chart:
    """What is drawn around lines or steps."""

    identity: str  # of the elements of this chart, one word
    title: str
    description: str
    x_label: str
    y_label: str
    logarithmic: bool = False  # ignored where a value is not above 0
    level: tuple[str, float] | None = None  # a horizontal line, and what it is
    x_whole: bool = True  # ticks at whole numbers only
    lines: Sequence[Line] = field(default_factory=tuple)


@dataclass(frozen=True)
class Scale:
    """From values to places."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = (math.log10(v) if self.logarithmic else v for v in (self.low, self.high, value))
        return self.start + (at - low) / (high - low) * (self.end - self.start)


def figure(chart: Chart, drawing: Markup, legend: Sequence[Line], notes: str = "") -> Markup:
    """A chart with its title, and a legend if there is more than one line."""
    entries = [tag("li", swatch(line.style), line.label) for line in legend] if len(legend) > 1 else []
    caption = tag(
        "figcaption", tag("strong", chart.title), notes and tag("span", f" {notes}", class_="note"),
        tag("ul", *entries, class_="legend") if entries else None,
    )  # fmt: skip
    title, description = f"{chart.identity}-title", f"{chart.identity}-description"
    svg = tag(
        "svg", tag("title", chart.title, id=title), tag("desc", chart.description, id=description), drawing, role="img",
        viewBox=f"0 0 {WIDTH} {HEIGHT}", aria_labelledby=f"{title} {description}", class_="chart",
    )  # fmt: skip
    return tag("figure", svg, caption, class_="panel")


def swatch(style: int) -> Markup:
    """A piece of the line, in the legend."""
    line = tag("path", d="M1 6H33", class_=f"line s{style % STYLES}")
    return tag("svg", line, viewBox="0 0 34 12", class_="swatch", aria_hidden="true")


def line_chart(chart: Chart, notes: str = "") -> Markup:
    lines = [line for line in chart.lines if line.points]
    values = [y for line in lines for _, y in line.points] + [y for line in lines for _, *ends in line.band for y in ends]
    if chart.level is not None:
        values.append(chart.level[1])
    logarithmic = chart.logarithmic and all(value > 0 for value in values)
    xs = [x for line in lines for x, _ in line.points]
    x = Scale(*spread(min(xs), max(xs), margin=0.0), LEFT, WIDTH - RIGHT)
    low, high = (min(values), max(values)) if logarithmic else spread(min(values), max(values))
    if logarithmic and high / low < 10:
        low, high = low / math.sqrt(10), high * math.sqrt(10)
    y = Scale(low, high, HEIGHT - BOTTOM, TOP, logarithmic)
    parts: list[Markup] = [axes(chart, x, y)]
    if chart.level is not None:
        name, value = chart.level
        place = shown(y(value))
        parts.append(tag("path", d=f"M{LEFT} {place}H{WIDTH - RIGHT}", class_="level"))
        above = y(value) - 4 if y(value) > TOP + 14 else y(value) + 13
        parts.append(tag("text", name, x=WIDTH - RIGHT - 2, y=shown(above), text_anchor="end", class_="tick"))
    for line in sorted(lines, key=lambda line: not line.faint):
        parts += drawn(line, x, y)
    return figure(chart, join(*parts), [line for line in lines if not line.faint], notes)


def drawn(line: Line, x: Scale, y: Scale) -> list[Markup]:
    style, parts = f"s{line.style % STYLES}", []
    if line.band:
        around = thinned_band(line.band)
        there = [f"{shown(x(at))} {shown(y(high))}" for at, _, high in around]
        back = [f"{shown(x(at))} {shown(y(low))}" for at, low, _ in reversed(around)]
        parts.append(tag("path", d=f"M{'L'.join(there + back)}Z", class_=f"band {style}"))
    points = thinned(line.points)
    if len(points) == 1:
        ((at, value),) = points
        parts.append(tag("circle", cx=shown(x(at)), cy=shown(y(value)), r=3.5, class_=f"dot {style}"))
    else:
        path = "L".join(f"{shown(x(at))} {shown(y(value))}" for at, value in points)
        parts.append(tag("path", d=f"M{path}", class_=f"line {style}{' faint' if line.faint else ''}"))
    return parts


def histogram(chart: Chart, samples: Sequence[tuple[str, Sequence[float]]], bins: int = 24, notes: str = "") -> Markup:
    """Shares of each sample in common bins, as steps over each other. Every sample has at least one finite value."""
    low = min(min(values) for _, values in samples)
    high = max(max(values) for _, values in samples)
    low, high = (low, high) if high > low else spread(low, high)
    width = (high - low) / bins
    lines = []
    for style, (label, values) in enumerate(samples):
        counts = [0] * bins
        for value in values:
            counts[min(bins - 1, int((value - low) / width))] += 1
        points = [(low, 0.0)]
        for number, count in enumerate(counts):
            share = 100 * count / len(values)
            points += [(low + number * width, share), (low + (number + 1) * width, share)]
        lines.append(Line(label, [*points, (high, 0.0)], style, band=[(at, 0.0, share) for at, share in points]))
    top = max(share for line in lines for _, share in line.points)
    x, y = Scale(low, high, LEFT, WIDTH - RIGHT), Scale(0.0, 1.05 * top, HEIGHT - BOTTOM, TOP)
    parts = [axes(chart, x, y), *(part for line in lines for part in drawn(line, x, y))]
    return figure(chart, join(*parts), lines, notes)


def bar(share: float) -> Markup:
    """A bar of a table's cell, as long as the share of 1 that it shows. The cell has the number in words too."""
    path = tag("rect", x=0, y=2, width=shown(100 * min(max(share, 0.0), 1.0)), height=10, class_="bar")
    return tag("svg", path, viewBox="0 0 100 14", class_="share", aria_hidden="true", preserveAspectRatio="none")


# Axes


def axes(chart: Chart, x: Scale, y: Scale) -> Markup:
    parts: list[Markup] = []
    for value in log_ticks(y.low, y.high) if y.logarithmic else ticks(y.low, y.high, 5):
        place = shown(y(value))
        parts.append(tag("path", d=f"M{LEFT} {place}H{WIDTH - RIGHT}", class_="grid"))
        parts.append(tag("text", tick(value), x=LEFT - 6, y=shown(y(value) + 4), text_anchor="end", class_="tick"))
    for value in ticks(x.low, x.high, 6, whole=chart.x_whole):
        parts.append(tag("path", d=f"M{shown(x(value))} {HEIGHT - BOTTOM}v4", class_="axis"))
        parts.append(tag("text", tick(value), x=shown(x(value)), y=HEIGHT - BOTTOM + 16, text_anchor="middle", class_="tick"))
    parts.append(tag("path", d=f"M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}", class_="axis"))
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(tag("text", chart.x_label, x=middle, y=HEIGHT - 6, text_anchor="middle", class_="label"))
    half = (TOP + HEIGHT - BOTTOM) / 2
    turned = f"rotate(-90 12 {half})"
    parts.append(tag("text", chart.y_label, x=12, y=half, text_anchor="middle", transform=turned, class_="label"))
    return join(*parts)


def spread(low: float, high: float, margin: float = 0.05) -> tuple[float, float]:
    """Ends of an axis that are apart, with a margin of its length."""
    if high - low <= 1e-12 * max(abs(low), abs(high)):
        around = abs(low) / 2
        return (low - around, high + around) if around else (0.0, 1.0)
    return low - margin * (high - low), high + margin * (high - low)


def ticks(low: float, high: float, count: int, *, whole: bool = False) -> list[float]:
    """Round values between two ends, about `count`."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough)) if rough > 0 else 1.0
    step = next((size * power for size in (1, 2, 5, 10) if size * power >= rough), 10 * power)
    if whole:
        step = max(1.0, step)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)] if last - first < 10 * count else []


def log_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Powers of ten; with 2 and 5 between them where there are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    steps = (1.0, 2.0, 5.0) if last - first <= 2 else (1.0,)
    every = max(1, math.ceil((last - first) / most))
    found = (step * 10.0**power for power in range(first, last + 1, every) for step in steps)
    return [value for value in found if low <= value * (1 + 1e-9) and value <= high * (1 + 1e-9)]


def tick(value: float) -> str:
    """A short number: 0.05, 1200, 2.5e7, 1e-5."""
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e5:
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
    digits, _, power = f"{value:.2e}".partition("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(power)}"


def shown(place: float) -> str:
    return f"{place:.1f}".removesuffix(".0")


def thinned(points: Points) -> list[tuple[float, float]]:
    """At most about MOST_POINTS, with the lowest and the highest of each stretch: no spike is lost."""
    if len(points) <= MOST_POINTS:
        return list(points)
    size = math.ceil(2 * len(points) / MOST_POINTS)
    kept = []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        kept += sorted({min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])})
    return kept


def thinned_band(band: Sequence[tuple[float, float, float]]) -> list[tuple[float, float, float]]:
    if len(band) <= MOST_POINTS:
        return list(band)
    size = math.ceil(len(band) / MOST_POINTS)
    parts = [band[start : start + size] for start in range(0, len(band), size)]
    return [(part[0][0], min(low for _, low, _ in part), max(high for *_, high in part)) for part in parts]
