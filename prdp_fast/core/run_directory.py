"""The directory of a run: what is in it, and whether a job may use it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prdp_fast.core.errors import UserError
from prdp_fast.core.files import write_json

RUN = "run.json"  # the job: resolved recipe, DeepSpeed configuration, ranks
SUMMARY = "summary.json"  # of a finished run
METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
ACCELERATION = "acceleration.json"  # what was chosen when the run first started
CHECKPOINTS = "checkpoints"
SAMPLES = "samples"
COMPARISON = "samples/before_after.png"
EXPORT = "model"
EVALUATION = "evaluation"  # what `prdp evaluate` found
EVALUATION_BEFORE, EVALUATION_AFTER = "evaluation_before.pt", "evaluation_after.pt"

# What a resumed run may change: how long it goes on and what it keeps, never what an epoch computes.
MAY_CHANGE = (
    "schedule.epochs", "schedule.time_limit_minutes", "schedule.on_failure", "schedule.max_repeats", "checkpoint.every",
    "checkpoint.keep", "model.push_to_hub",
)  # fmt: skip


def claim(directory: Path, job: dict[str, Any], resume: str) -> None:
    """Make `directory` this job's, or refuse it.

    Args:
        job: resolved recipe, DeepSpeed configuration and rank count, as JSON.
        resume: "never" wants a directory without a run; anything else continues the same job's run.
    Raises: UserError; nothing in the directory is touched then.
    """
    record = directory / RUN
    if not record.exists():
        if directory.is_dir() and any(directory.iterdir()):
            raise UserError(f"--output {directory} is not empty and holds no run of prdp_fast; choose a new directory")
        directory.mkdir(parents=True, exist_ok=True)
        write_json(record, job)
        return
    if resume == "never":
        raise UserError(f"--output {directory} holds a run already; choose another directory, or continue it with --resume auto")
    difference = first_difference(json.loads(record.read_text()), json.loads(json.dumps(job)))
    if difference:
        raise UserError(f"--output {directory} holds another run: {difference}; choose another directory, or give the same job")
    write_json(record, job)


def first_difference(old: Any, new: Any, place: str = "") -> str | None:
    """The first setting in which two jobs differ, as 'schedule.epochs was 3, now 4'; None if they may share a directory."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            found = first_difference(old.get(key), new.get(key), f"{place}.{key}" if place else key)
            if found:
                return found
        return None
    allowed = place.removeprefix("recipe.") in MAY_CHANGE
    return None if old == new or allowed else f"{place} was {old!r}, now {new!r}"
