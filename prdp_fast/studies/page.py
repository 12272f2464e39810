"""A study as a page: study.md with its tables, study.json with its numbers, curves.png."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prdp_fast.core.files import write_json, write_text
from prdp_fast.reporting.curves import CURVES, plot_bands, read_metrics
from prdp_fast.reporting.tables import ABSENT, Table, is_finite, number
from prdp_fast.studies.declaration import Run, Study

PAGE, NUMBERS = "study.md", "study.json"


def write(study: Study, runs: list[Run], arms: dict[str, Any], output: Path, how: dict[str, Any]) -> Path:
    """Write everything. Args: arms: of `findings.collect`; how: command, machine and versions. Returns: the page."""
    record = {"study": study.model_dump(mode="json"), "how": how, "arms": arms}
    write_json(output / NUMBERS, json.loads(json.dumps(record, default=str)))
    curves = {
        arm: [rows for run in runs if run.arm == arm and (rows := metrics_of(output / run.name))] for arm in arms
    }  # fmt: skip
    drawn = plot_bands(output / CURVES, {arm: rows for arm, rows in curves.items() if rows}, "reward")
    write_text(output / PAGE, page(study, arms, how, CURVES if drawn else None))
    return output / PAGE


def metrics_of(directory: Path) -> list[dict[str, Any]]:
    try:
        return read_metrics(directory / "metrics.jsonl")
    except FileNotFoundError:
        return []


def page(study: Study, arms: dict[str, Any], how: dict[str, Any], picture: str | None) -> str:
    """Markdown."""
    parts = [f"# {study.title}", study.question]
    if study.source:
        parts.append(f"Source of the claim: {study.source}.")
    parts += [
        f"Recipe `{study.recipe}`. A gain is after less before, on the same prompts and noise. A number is the mean over the "
        f"seeds ± its standard error. The last columns are the gain less that of `{study.baseline}`, seed by seed, with its 95% "
        "t interval over the seeds, and what that says: higher or lower where the interval leaves 0 out.",
    ]  # fmt: skip
    quantities = dict.fromkeys(name for arm in arms.values() for name in arm["measured"])
    for name in quantities:
        parts += [f"## {name}", table(study, arms, name).markdown()]
    parts += ["## Budgets", budgets(arms).markdown()]
    if failed := [
        f"- {arm}, seed {seed}: {why['reason']}" for arm, found in arms.items() for seed, why in found["failures"].items()
    ]:
        parts += ["## Runs that failed", "\n".join(failed)]
    if picture:
        parts += ["## Reward by epoch", f"Mean over the seeds; the bands reach from the lowest to the highest.\n\n![]({picture})"]
    settings = "\n".join(f"- {arm}: `{json.dumps(changed)}`" for arm, changed in study.arms.items() if arm in arms)
    parts += ["## Settings", f"All: `{json.dumps(study.settings)}`\n\n{settings}"]
    parts += ["## How", "\n".join(f"- {name}: {value}" for name, value in how.items())]
    return "\n\n".join(parts) + "\n"


def table(study: Study, arms: dict[str, Any], name: str) -> Table:
    """One quantity: a row an arm."""
    rows = []
    for arm, found in arms.items():
        measured = found["measured"].get(name)
        if measured is None:
            rows.append((arm, "0", *[ABSENT] * 5))
            continue
        own = [
            number(without_interval(measured[moment]), 4, sign) for moment, sign in (("before", ""), ("after", ""), ("gain", "+"))
        ]
        against = measured["against"]
        other = (ABSENT, ABSENT) if arm == study.baseline else (number(against, 4, "+"), against["verdict"])
        rows.append((arm, str(measured["gain"]["n"]), *own, *other))
    return Table(("arm", "seeds", "before", "after", "gain", f"against {study.baseline}", ""), tuple(rows))


def without_interval(measured: dict[str, float]) -> dict[str, float]:
    return {key: measured[key] for key in ("mean", "stderr")}


def budgets(arms: dict[str, Any]) -> Table:
    def cell(value: Any, digits: int = 0) -> str:
        return f"{value:,.{digits}f}" if is_finite(value) else ABSENT

    rows = []
    for arm, found in arms.items():
        cost = found["cost"]
        spent = (cell(cost.get("images")), cell(cost.get("denoiser_rows")), cell(cost.get("minutes"), 1))
        rows.append((arm, *spent, str(len(found["failures"]))))
    return Table(("arm", "images scored", "denoiser rows", "minutes", "failed runs"), tuple(rows))
