"""The metrics of a run as curves."""

from __future__ import annotations

import errno
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prdp_fast.core.files import whole
from prdp_fast.core.run_directory import METRICS

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
CURVES = "curves.png"  # in the run directory
MOST_LINES = 8  # in a panel, spread evenly over what there is; more would be unreadable


def plot_curves(run_directory: Path) -> Path:
    """Draw curves.png in the run directory, from its metrics.jsonl: one panel for every kind of metric that the run has.

    Raises: FileNotFoundError without a metrics.jsonl, ValueError if it has no epoch yet, OSError if nothing can be written.
    """
    from matplotlib.figure import Figure  # no pyplot: draws with Agg, keeps no global state
    from matplotlib.ticker import MaxNLocator

    run_directory = Path(run_directory)
    rows = read_metrics(run_directory / METRICS)
    if not rows:
        raise ValueError(f"{run_directory / METRICS} has no finished epoch to plot")
    panels = [(title, series, log) for title, groups, log in PANELS if (series := choose_series(rows, groups))]
    if not panels:
        raise ValueError(f"{run_directory / METRICS} has none of the metrics that are plotted")
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(5 * columns, 3.2 * lines), layout="constrained")
    for number, (title, series, logarithmic) in enumerate(panels, start=1):
        axes = figure.add_subplot(lines, columns, number)
        for name, points in series.items():
            epochs, values = zip(*points, strict=True)
            label = (name.partition("/")[2] or name).replace("$", r"\$")  # the title says the rest; $ would begin a formula
            axes.plot(epochs, values, label=label, linewidth=1.2, marker="o" if len(points) == 1 else None)
        if logarithmic and all(value > 0 for points in series.values() for _, value in points):
            axes.set_yscale("log")
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("epoch", fontsize=8)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
        axes.tick_params(labelsize=8, which="both")
        axes.yaxis.get_offset_text().set_fontsize(8)
        axes.grid(alpha=0.3)
        if len(series) > 1:
            axes.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))  # beside the curves, not on them
    path = run_directory / CURVES
    with whole(path) as partial:
        figure.savefig(partial, format="png", dpi=120)
    return path


def plot_bands(path: Path, arms: Mapping[str, list[list[dict[str, Any]]]], metric: str) -> bool:
    """Draw one metric of several arms by epoch: the mean over an arm's runs, in a band from the lowest to the highest.

    Args: arms: the rows of each run, by arm. An arm's curve ends with its shortest run.
    Returns: whether there was anything to draw.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for arm, runs in arms.items():
        values = [[float(row[metric]) for row in rows if _is_number(row.get(metric))] for rows in runs]
        length = min(map(len, values), default=0)
        if not length:
            continue
        columns = list(zip(*(one[:length] for one in values), strict=True))
        epochs = range(length)
        (line,) = axes.plot(epochs, [sum(column) / len(column) for column in columns], label=arm, linewidth=1.4)
        axes.fill_between(
            epochs, list(map(min, columns)), list(map(max, columns)), color=line.get_color(), alpha=0.15, linewidth=0
        )
    if not axes.lines:
        return False
    axes.set_xlabel("epoch")
    axes.set_ylabel(metric)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    with whole(path) as partial:
        figure.savefig(partial, format="png", dpi=120)
    return True


def choose_series(rows: list[dict[str, Any]], groups: Sequence[str]) -> dict[str, list[tuple[int, float]]]:
    """The lines of a panel: (epoch, value) points by the metric's name, of the metrics in the groups that have a number."""
    names = dict.fromkeys(name for row in rows for name in row)
    members = [name for name in names if any(name == group or name.startswith(f"{group}/") for group in groups)]
    series = {name: [(row["epoch"], row[name]) for row in rows if _is_number(row.get(name))] for name in members}
    chosen = [(name, points) for name, points in series.items() if points]
    if len(chosen) > MOST_LINES:
        chosen = [chosen[round(i * (len(chosen) - 1) / (MOST_LINES - 1))] for i in range(MOST_LINES)]
    return dict(chosen)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl by epoch. A torn last line, left by a run that is still writing or was killed, is skipped."""
    if not path.exists():
        raise FileNotFoundError(errno.ENOENT, f"it does not exist; is {path.parent} a run directory?", str(path))
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and isinstance(row.get("epoch"), int):
            rows.append(row)
    return sorted(rows, key=lambda row: row["epoch"])


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
