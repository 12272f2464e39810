"""Before and after, in numbers for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table


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


def print_summary(summary: Mapping[str, Any]) -> None:
    if summary.get("evaluation"):
        final_table(summary)
