"""Every table of results: rows of text, laid out here and drawn for a terminal, as markdown or as HTML.

A measured number comes as JSON: "mean", and where known "stderr" (its standard error) and "low" and "high" (its interval).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import rich.table
from rich import box
from rich.console import Console
from rich.text import Text

from prdp_fast.core.visible import visible
from prdp_fast.reporting.markup import Markup, join, tag

ABSENT = "-"  # in place of a number that there is none of
TRAINED = {"yes": " (trained on)", "other options": " (trained on with other options)", "no": ""}


@dataclass(frozen=True)
class Table:
    """Rows of text. The first column names the rows. The others hold numbers, which stand at the right."""

    heads: tuple[str, ...]  # one a column
    rows: tuple[tuple[str, ...], ...]  # as many cells each as there are heads

    def markdown(self) -> str:
        """Lines of a pipe table, without a newline at the end."""

        def line(cells: tuple[str, ...]) -> str:
            return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

        rule = "|---|" + "---:|" * (len(self.heads) - 1)
        return "\n".join([line(self.heads), rule, *map(line, self.rows)])

    def html(self, caption: str, *, numbers: bool = True) -> Markup:
        """A table element. It scrolls by itself where it is wider than the page, by keyboard too.

        numbers: False of columns of words, which stand at the left. A cell may be markup.
        """
        first, *others = self.heads
        css = "number" if numbers else None
        head = tag("tr", tag("th", first, scope="col"), *(tag("th", name, scope="col", class_=css) for name in others))
        body = (
            tag("tr", tag("th", row[0], scope="row"), *(tag("td", parted(one), class_=css) for one in row[1:]))
            for row in self.rows
        )
        table = tag("table", tag("caption", caption), tag("thead", head), tag("tbody", *body))
        return tag("div", table, class_="scroll", tabindex=0, role="region", aria_label=caption)

    def terminal(self, caption: str = "") -> rich.table.Table:
        """For rich's console. On a narrow one, numbers wrap; none is ever cut. Nothing in it commands the terminal."""
        table = rich.table.Table(
            box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0),
            caption=visible(caption, lines=True) or None, caption_justify="left",
        )  # fmt: skip
        first, *others = map(visible, self.heads)
        table.add_column(first, no_wrap=True)
        for head in others:
            table.add_column(head, justify="right")
        for row in self.rows:
            table.add_row(*map(Text, map(visible, row)))  # not a str, in which rich would look for markup
        return table


# Cells


def parted(cell: str) -> Markup:
    """A cell for HTML, which wraps before an interval and nowhere else if it is a number."""
    if isinstance(cell, Markup):
        return cell
    number_part, bracket, interval = cell.partition(" [")
    return join(tag("span", number_part), " ", tag("span", f"[{interval}")) if bracket else tag("span", cell)


def number(measured: Mapping[str, Any], digits: int, sign: str = "") -> str:
    """'mean ± standard error [interval]', as much of it as is known and finite.

    Args: sign: "+" writes the sign of a positive mean too.
    """
    mean, error, low, high = (measured.get(key) for key in ("mean", "stderr", "low", "high"))
    if not is_finite(mean):
        return ABSENT
    text = f"{mean:{sign}.{digits}f}"
    if is_finite(error):
        text += f" ± {error:.{digits}f}"
    if is_finite(low) and is_finite(high):
        text += f" [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"
    return text


def in_standard_errors(difference: Mapping[str, Any]) -> str:
    """How many of its own standard errors a difference is away from 0."""
    mean, error = difference.get("mean"), difference.get("stderr")
    return f"{mean / error:+.1f}" if is_finite(mean) and is_finite(error) and error else ABSENT


def percent(share: Any) -> str:
    return f"{100 * share:.1f}%" if is_finite(share) else ABSENT


def is_finite(value: Any) -> bool:
    """Whether there is a number. In JSON one that is not finite is null."""
    return value is not None and math.isfinite(value)


# Before and after: the terminal's last table, `prdp report` and the model card


def before_after(evaluation: Mapping[str, Any], digits: int = 3) -> Table:
    """The reward before and after on every prompt set of a summary's "evaluation", with standard errors.

    The difference is paired, prompt by prompt and with the same noise. "s.e." is that difference in its own standard errors.
    Rewards that were held out have a row each. Where a reward gives verdicts, "all right" is the share of images that pass,
    before and after. Three digits fit 80 columns, the width of a log. Where images without a score are left out, n is of before,
    after and difference; see `left_out`.
    """
    has_verdicts = any("strict" in sets[moment] for sets in evaluation.values() for moment in ("before", "after"))
    rows = []
    for name, sets in evaluation.items():
        before, after, difference = sets["before"], sets["after"], sets["difference"]
        cells = [
            name, prompt_counts(before, after, difference), number(before, digits), number(after, digits),
            number(difference, digits, "+"), in_standard_errors(difference),
        ]  # fmt: skip
        if has_verdicts:
            cells.append(f"{percent(before.get('strict'))} > {percent(after.get('strict'))}")
        rows.append(tuple(cells))
        for reward, held in sets.get("held", {}).items():
            rows.append((
                f"{name}, {reward} (held out)", prompt_counts(*held.values()), number(held["before"], digits),
                number(held["after"], digits), number(held["difference"], digits, "+"), in_standard_errors(held["difference"]),
                *([ABSENT] if has_verdicts else []),
            ))  # fmt: skip
    heads = ("reward", "n", "before", "after", "difference", "s.e.")
    return Table((*heads, "all right") if has_verdicts else heads, tuple(rows))


def prompt_counts(*measured: Mapping[str, Any]) -> str:
    """n; if it is not the same of all, each."""
    counts = [str(part.get("n", ABSENT)) for part in measured]
    known = dict.fromkeys(count for count in counts if count != ABSENT)
    return next(iter(known), ABSENT) if len(known) < 2 else "/".join(counts)


def left_out(evaluation: Mapping[str, Any]) -> str:
    """A sentence on the images that a summary's means leave out, by prompt set; empty if there are none."""
    parts = []
    for name, sets in evaluation.items():
        before, after = (sets[moment].get("unscored") or 0 for moment in ("before", "after"))
        if before or after:
            parts.append(f"{name} {before} before and {after} after")
    if not parts:
        return ""
    return f"Images without a score are left out: {', '.join(parts)}; the difference is over those that have one both times."


def print_summary(summary: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the reward before and after, and below it what the run cost. Nothing if the run evaluated nothing."""
    if summary.get("evaluation"):
        caption = "\n".join(filter(None, [left_out(summary["evaluation"]), cost(summary)]))
        (console or Console()).print(before_after(summary["evaluation"]).terminal(caption))


def cost(summary: Mapping[str, Any]) -> str:
    """A line of epochs, images and minutes, and one of rows of the denoiser; what the summary has of it."""
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
        lines.append("denoiser rows: " + ", ".join(f"{name} {count:,}" for name, count in forwards.items()))
    return "\n".join(lines)


# One model, or two compared: the page of `prdp evaluate`


def reward_table(models: Mapping[str, str], sets: Mapping[str, Any]) -> Table:
    """A column for every reward of every prompt set; a row for every model, and for two of them their difference and win rate.

    Args:
        models: titles by role.
        sets: of an evaluation's record.
    """
    columns = [(f"{name}: {reward}", entry) for name, part in sets.items() for reward, entry in part["rewards"].items()]
    heads = [f"{head}{TRAINED[entry['trained']]}" for head, entry in columns]
    entries = [entry for _, entry in columns]
    rows = [(title, *(number(entry[role], 4) for entry in entries)) for role, title in models.items()]
    if len(models) > 1:
        rows.append(("difference", *(number(entry["difference"], 4, "+") for entry in entries)))
        rows.append(("win rate", *(number(entry["win_rate"], 3) for entry in entries)))
    return Table(("model", *heads), tuple(rows))


def diversity_table(models: Mapping[str, str], sets: Mapping[str, Any]) -> Table:
    """A column for every prompt set; a row for every model, and for two of them their ratio. Arguments as of `reward_table`."""
    entries = [part["diversity"] for part in sets.values()]
    rows = [(title, *(number(entry[role], 4) for entry in entries)) for role, title in models.items()]
    if len(models) > 1:
        rows.append(("ratio", *(number(entry["ratio"], 3) for entry in entries)))
    return Table(("model", *sets), tuple(rows))
