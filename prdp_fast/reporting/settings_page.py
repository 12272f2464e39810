"""The report's last part: what the run was, so that it can be made again. Without addresses, secrets and places of a machine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import yaml

from prdp_fast.core.visible import visible
from prdp_fast.reporting.bands import different, flat
from prdp_fast.reporting.markup import Markup, join, tag
from prdp_fast.reporting.private import recipe_for_others, without_places
from prdp_fast.reporting.run_data import RunData, at
from prdp_fast.reporting.tables import Table

MOST_LINES = 400  # of a recipe
MOST_CELL = 60  # characters
MOST_KEYS = 12  # columns


def settings_of(runs: Sequence[RunData]) -> Markup:
    first = runs[0]
    recipes = [recipe_for_others(run.recipe) for run in runs]
    parts: list[object] = []
    if len(runs) > 1:
        parts.append(differences(runs, recipes))
    what = "" if len(runs) == 1 else f" of {visible(first.name)}"
    if recipes[0]:
        parts += [tag("h3", f"Recipe{what}"), tag("pre", tag("code", yaml_of(recipes[0])), tabindex=0)]
    if deepspeed := at(first.record, "deepspeed", kind=dict):
        text = json.dumps(without_places(deepspeed), indent=2)
        parts += [tag("h3", f"DeepSpeed{what}"), tag("pre", tag("code", shortened(text)), tabindex=0)]
    parts += [machine(first), versions(first), choices(first), commands(runs)]
    return join(*parts)


def yaml_of(recipe: dict[str, Any]) -> str:
    """Raises: nothing; values that came from JSON can all be written."""
    return shortened(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True).rstrip())


def shortened(text: str) -> str:
    lines = text.splitlines()
    return "\n".join(lines if len(lines) <= MOST_LINES else [*lines[:MOST_LINES], f"... {len(lines) - MOST_LINES} more lines"])


def cell(value: Any) -> str:
    return visible(value, most=MOST_CELL)


def differences(runs: Sequence[RunData], recipes: Sequence[dict[str, Any]]) -> Markup:
    """A column for every setting in which the runs differ."""
    flats = [flat(recipe) for recipe in recipes]
    keys = different(flats)
    if not keys:
        return tag("p", "The runs have the same settings.")
    shown = keys[:MOST_KEYS]
    rows = tuple((cell(run.name), *(cell(one.get(key, "-")) for key in shown)) for run, one in zip(runs, flats, strict=True))
    more = f" (the first {MOST_KEYS} of {len(keys)})" if len(keys) > MOST_KEYS else ""
    return Table(("run", *map(cell, shown)), rows).html(f"Settings in which the runs differ{more}", numbers=False)


def machine(run: RunData) -> Markup | None:
    """Records of earlier versions have the number of ranks alone."""
    rows = []
    if (ranks := at(run.record, "world_size", kind=int)) is not None:
        rows.append(("ranks", str(ranks)))
    told = at(run.record, "machine", kind=dict) or {}
    rows += [(cell(name), cell(value)) for name, value in told.items() if isinstance(value, (str, int, float))]
    return Table(("machine", "value"), tuple(rows)).html("Machine", numbers=False) if rows else None


def versions(run: RunData) -> Markup | None:
    found = at(run.record, "versions", kind=dict)
    rows = tuple((cell(name), cell(version or "-")) for name, version in (found or {}).items())
    return Table(("library", "version"), rows).html("Versions at the last start", numbers=False) if rows else None


def choices(run: RunData) -> Markup | None:
    """What `performance: auto` became, and why."""
    rows = []
    for name, choice in run.acceleration.items():
        value, reason = (at(choice, key, kind=str) for key in ("value", "reason"))
        if value is not None:
            rows.append((cell(name), cell(value), visible(reason or "-", most=200)))
    return Table(("choice", "value", "reason"), tuple(rows)).html("What was chosen for speed", numbers=False) if rows else None


def commands(runs: Sequence[RunData]) -> Markup:
    """Commands that work with what is on the page, in the folder that holds the run directories."""
    names = [visible(run.name) for run in runs]
    ranks = at(runs[0].record, "world_size", kind=int) or 1
    launch = f"prdp train{f' --num_gpus {ranks}' if ranks > 1 else ''} --config FILE.json --recipe FILE.yaml"
    lines = [f"{launch}   # the two files above", *(f"prdp evaluate {name}" for name in names), f"prdp report {' '.join(names)}"]
    return join(tag("h3", "Commands"), tag("pre", tag("code", "\n".join(lines)), tabindex=0))
