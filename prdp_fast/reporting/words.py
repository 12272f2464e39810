"""What a run's numbers say, in sentences: the first paragraph of the report, and what a chart shows to who does not see it."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

from prdp_fast.reporting.private import without_places
from prdp_fast.reporting.run_data import RunData, at, finite, points_of
from prdp_fast.reporting.svg import Line, tick
from prdp_fast.reporting.tables import percent


def title(runs: Sequence[RunData]) -> str:
    first = runs[0]
    method = (at(first.recipe, "objective", "name", kind=str) or "training").upper()
    model = without_places(at(first.recipe, "model", "pretrained", kind=str) or "a model")
    return f"{method} on {model}" if len(runs) == 1 else f"{len(runs)} runs on {model}"


def rewards_of(run: RunData) -> str:
    names = [at(reward, "name", kind=str) for reward in at(run.recipe, "rewards", kind=list) or []]
    return ", ".join(filter(None, names)) or "a reward"


def what_was_done(run: RunData) -> str:
    """'PRDP finetuned tiny on shapes_alignment: 97 of 110 epochs, 12,416 images, 7.0 minutes.'"""
    method = (at(run.recipe, "objective", "name", kind=str) or "training").upper()
    model = without_places(at(run.recipe, "model", "pretrained", kind=str) or "a model")
    total = f" of {run.total_epochs}" if run.total_epochs is not None else ""
    parts = [f"{run.epochs}{total} epochs"]
    if (images := images_of(run)) is not None:
        parts.append(f"{images:,} images")
    if (seconds := seconds_of(run)) > 0:
        parts.append(duration(seconds))
    return f"{method} finetuned {model} on {rewards_of(run)}: {', '.join(parts)}."


def images_of(run: RunData) -> int | None:
    if (counted := at(run.summary, "images", kind=int)) is not None:
        return counted
    shape = [at(run.recipe, "schedule", name, kind=int) for name in ("prompts_per_epoch", "images_per_prompt")]
    return None if None in shape else run.epochs * shape[0] * shape[1]  # type: ignore[operator]


def seconds_of(run: RunData) -> float:
    """As its summary says; of one that goes on, the seconds of its epochs."""
    told = finite((run.summary or {}).get("wall_s"))
    return sum(sum(phases.values()) for phases in phase_rows(run)) if told is None else told


def phase_rows(run: RunData) -> list[dict[str, float]]:
    """For every epoch the seconds of its phases, evaluations and checkpoints included."""
    prefix = "seconds/"
    found = []
    for row in run.rows:
        named = ((name.removeprefix(prefix), finite(value)) for name, value in row.items() if name.startswith(prefix))
        found.append({name: value for name, value in named if value is not None})
    return found


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.1f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def what_came_of_it(evaluation: Mapping[str, Any], over: str = "prompts") -> str:
    """Of the prompts that training never saw, or of the last set: before, after, the difference, and whether it is one.

    Args: over: what the n of the evaluation counts, "prompts" or "runs".
    """
    if not evaluation:
        return ""
    name = "unseen" if "unseen" in evaluation else list(evaluation)[-1]
    before, after, difference = (evaluation[name].get(moment) or {} for moment in ("before", "after", "difference"))
    means = [value for part in (before, after, difference) if (value := finite(part.get("mean"))) is not None]
    if len(means) < 3:
        return ""
    on = f"{difference.get('n', '?')} {name} prompts, with the same noise," if over == "prompts" else f"{name} prompts"
    whose = "the mean reward" if over == "prompts" else f"the mean reward of {difference.get('n', '?')} runs"
    text = f"On {on} {whose} went from {means[0]:.3f} to {means[1]:.3f}: {means[2]:+.3f}"
    error, low, high = (finite(difference.get(key)) for key in ("stderr", "low", "high"))
    if error is not None:
        text += f" ± {error:.3f}" + ("" if over == "prompts" else " (standard error over runs)")
    if low is not None and high is not None:
        text += f", 95% interval {low:+.3f} to {high:+.3f}"
        if low <= 0 <= high:
            text += ", which these prompts do not tell from no change"
    text += "."
    rates = [finite(part.get("strict")) for part in (before, after)]
    if None not in rates:
        text += f" Pictures that are all right: {percent(rates[0])} before, {percent(rates[1])} after."
    return text


def mean_of(values: Sequence[float]) -> dict[str, Any]:
    """Mean over runs, standard error over runs and their number, as JSON; nothing without a value."""
    if not values:
        return {}
    found: dict[str, Any] = {"mean": statistics.fmean(values), "n": len(values)}
    if len(values) > 1:
        found["stderr"] = statistics.stdev(values) / math.sqrt(len(values))
    return found


def state(run: RunData) -> str:
    """Whether the run has ended, and when its last epoch was."""
    if run.summary is not None:
        return "The run is finished." if run.epochs >= (run.total_epochs or 0) else "The run came to its time limit."
    if not run.rows:
        return "The run has not finished an epoch yet."
    count = None if run.total_epochs is None else run.total_epochs - run.epochs
    left = "it has no summary yet" if count is None else "1 epoch is left" if count == 1 else f"{count} epochs are left"
    return f"The run is not finished: {left}. These numbers are of {time.strftime('%Y-%m-%d %H:%M:%S')}."


def describe(lines: Sequence[Line], x: str = "epoch") -> str:
    """What a chart of lines shows."""
    parts = []
    for line in lines:
        if line.points and not line.faint:
            (first_x, first), (last_x, last) = line.points[0], line.points[-1]
            values = [value for _, value in line.points]
            ends = f"{tick(first)} at {x} {tick(first_x)}"
            if len(line.points) > 1:
                ends += f", {tick(last)} at {x} {tick(last_x)}, lowest {tick(min(values))}, highest {tick(max(values))}"
            parts.append(f"{line.label}: {ends}")
    return ". ".join(parts) + "."


def describe_samples(samples: Sequence[tuple[str, Sequence[float]]]) -> str:
    """What a histogram shows: quartiles of each sample."""
    parts = []
    for label, values in samples:
        ordered = sorted(values)
        quartiles = [ordered[round(part * (len(ordered) - 1))] for part in (0.25, 0.5, 0.75)]
        parts.append(f"{label}: {len(ordered)} values, quartiles {', '.join(map(tick, quartiles))}")
    return ". ".join(parts) + "."


def last_value(run: RunData, name: str) -> float | None:
    points = points_of(run.rows, name)
    return points[-1][1] if points else None
