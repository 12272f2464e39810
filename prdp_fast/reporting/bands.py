"""Runs of one recipe that differ in their seed, as one line with a band."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from prdp_fast.core.run_directory import MAY_CHANGE
from prdp_fast.reporting.run_data import RunData, points_of

BANDS = ("minmax", "stderr")
Points = list[tuple[float, float]]
Band = list[tuple[float, float, float]]  # x, low, high


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone."""

    name: str  # what they have that the other groups have not; "" if there is one group
    runs: tuple[RunData, ...]


def group_runs(runs: Sequence[RunData]) -> list[Group]:
    """In the order of their first runs."""
    by_recipe: dict[str, list[RunData]] = {}
    for run in runs:
        values = {key: value for key, value in flat(run.recipe).items() if key != "seed" and key not in MAY_CHANGE}
        by_recipe.setdefault(json.dumps(values, sort_keys=True, default=str), []).append(run)
    members = list(by_recipe.values())
    names = group_names([flat(part[0].recipe) for part in members])
    return [Group(name, tuple(part)) for name, part in zip(names, members, strict=True)]


def group_names(recipes: Sequence[dict[str, Any]]) -> list[str]:
    """For each recipe what differs, as 'objective.name ddpo'; at most three settings, "" if there is one recipe."""
    if len(recipes) == 1:
        return [""]
    keys = [key for key in different(recipes) if key != "seed" and key not in MAY_CHANGE]
    names = [", ".join(f"{key} {recipe[key]}" for key in keys if key in recipe) for recipe in recipes]
    short = [", ".join(f"{key} {recipe[key]}" for key in keys[:3] if key in recipe) for recipe in recipes]
    return short if len(set(short)) == len(names) else [f"{name or 'group'} ({i + 1})" for i, name in enumerate(short)]


def different(recipes: Sequence[dict[str, Any]]) -> list[str]:
    """Keys whose values are not the same in all."""
    keys = dict.fromkeys(key for recipe in recipes for key in recipe)
    return [key for key in keys if len({json.dumps(recipe.get(key), default=str) for recipe in recipes}) > 1]


def flat(recipe: dict[str, Any]) -> dict[str, Any]:
    """Values by 'section.key'; an item of a list by its number."""

    def walk(value: Any, prefix: str) -> Iterator[tuple[str, Any]]:
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        if not items:
            yield prefix, value
        for key, inner in items:
            yield from walk(inner, f"{prefix}.{key}" if prefix else str(key))

    return dict(walk(recipe, ""))


def band(runs: Sequence[RunData], metric: str, kind: str) -> tuple[Points, Band]:
    """The mean of the runs by epoch, and around it their lowest and highest value or the standard error of the mean.

    Of the epochs that every run has, so that no step in the curve comes from a run that ended. One run has no band.
    """
    of_runs = [dict(points_of(run.rows, metric)) for run in runs]
    epochs = sorted(set.intersection(*(set(points) for points in of_runs))) if of_runs else []
    mean, around = [], []
    for epoch in epochs:
        values = [points[epoch] for points in of_runs]
        centre = statistics.fmean(values)
        mean.append((float(epoch), centre))
        if len(values) > 1:
            error = statistics.stdev(values) / math.sqrt(len(values))
            low, high = (min(values), max(values)) if kind == "minmax" else (centre - error, centre + error)
            around.append((float(epoch), low, high))
    return mean, around
