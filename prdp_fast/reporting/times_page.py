"""Where a run's time went: its phases against each other, and against the least that their denoiser rows would take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prdp_fast.core.visible import visible
from prdp_fast.reporting.markup import Markup, join, tag
from prdp_fast.reporting.run_data import RunData, at, finite
from prdp_fast.reporting.svg import bar
from prdp_fast.reporting.tables import ABSENT, Table, percent
from prdp_fast.reporting.words import phase_rows

# A backward is two matrix products for each of the forward's; one, where most weights are frozen.
BACKWARD, BACKWARD_OF_ADAPTER = 2.0, 1.0
FORWARDS = ("rollout", "reference")
MOST_PHASES = 20


def times_of(runs: Sequence[RunData]) -> Markup | None:
    return phase_table(runs[0]) if len(runs) == 1 else tables_beside(runs)


def seconds_by_phase(run: RunData) -> dict[str, float]:
    """Over all finished epochs, the longest phase first."""
    seconds: dict[str, float] = {}
    for row in phase_rows(run):
        for name, value in row.items():
            seconds[name] = seconds.get(name, 0.0) + max(value, 0.0)
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def tables_beside(runs: Sequence[RunData]) -> Markup | None:
    """Of several runs: a row for every run, a column for every phase."""
    of_runs = [seconds_by_phase(run) for run in runs]
    names = list(dict.fromkeys(name for seconds in of_runs for name in seconds))[:MOST_PHASES]
    rows = []
    for run, seconds in zip(runs, of_runs, strict=True):
        whole = sum(seconds.values())
        cells = (f"{seconds[name]:.1f} ({percent(seconds[name] / whole)})" if seconds.get(name) else ABSENT for name in names)
        rows.append((visible(run.name, most=60), f"{len(run.rows)}", f"{whole:.1f}", *cells))
    heads = ("run", "epochs", "seconds", *(visible(name, most=40) for name in names))
    return Table(heads, tuple(rows)).html("Seconds by phase, and their share") if names else None


def phase_table(run: RunData) -> Markup | None:
    """Seconds and shares by phase; and of the phases that run the denoiser, rows, time a row and the least time."""
    seconds = seconds_by_phase(run)
    whole = sum(seconds.values())
    if not whole:
        return None
    rows = {name: count for name, count in counted_rows(run).items() if seconds.get(name)}
    floors = least_seconds(run, seconds, rows)
    cells: list[tuple[Any, ...]] = []
    for name, value in list(seconds.items())[:MOST_PHASES]:
        share = tag("span", percent(value / whole), bar(value / whole))
        line: tuple[Any, ...] = (visible(name, most=40), f"{value:.1f}", share)
        if floors:
            count, floor = rows.get(name), floors.get(name)
            line += (
                f"{count:,.0f}" if count else ABSENT, f"{1000 * value / count:.2f}" if count else ABSENT,
                f"{floor:.1f}" if floor else ABSENT, f"{value / floor:.2f}" if floor else ABSENT,
            )  # fmt: skip
        cells.append(line)
    heads: tuple[str, ...] = ("phase", "seconds", "share")
    if floors:
        heads += ("denoiser rows", "ms a row", "least seconds", "times the least")
    table = Table(heads, tuple(cells)).html(f"Seconds by phase, over {len(run.rows)} epochs")
    return join(table, tag("p", FLOOR, class_="note") if floors else None)


FLOOR = (
    "The least is an estimate from the run itself: every denoiser row at the speed of the faster of its two forward passes, and "
    "a backward at twice a forward (once with an adapter). What the machine could do at its peak is not known here."
)


def counted_rows(run: RunData) -> dict[str, float]:
    """Denoiser rows by phase over the whole run, of one that is finished."""
    found = at(run.summary, "unet_forwards", kind=dict) or {}
    return {str(name): count for name, value in found.items() if (count := finite(value)) is not None and count > 0}


def least_seconds(run: RunData, seconds: dict[str, float], rows: dict[str, float]) -> dict[str, float]:
    """By phase; empty if no forward pass was timed."""
    rates = [seconds[name] / rows[name] for name in FORWARDS if name in rows]
    if not rates:
        return {}
    backward = BACKWARD_OF_ADAPTER if at(run.recipe, "model", "lora", kind=dict) else BACKWARD
    recomputed = 1.0 if at(run.recipe, "performance", "activation_checkpointing", kind=bool) else 0.0
    work = {"update": 1.0 + backward + recomputed}
    return {name: count * min(rates) * work.get(name, 1.0) for name, count in rows.items()}
