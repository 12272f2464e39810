"""A run directory as the report and `prdp watch` read it, at any time: before its first epoch, half written, or damaged.

Every file may have been written by somebody else, or by an earlier version: what is not as expected is left out, and told.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prdp_fast.core.errors import UserError, brief
from prdp_fast.core.files import read_json
from prdp_fast.core.paths import fault
from prdp_fast.core.run_directory import ACCELERATION, EVALUATION, EVALUATION_AFTER, EVALUATION_BEFORE, METRICS, RUN, SUMMARY
from prdp_fast.reporting.curves import read_metrics

if TYPE_CHECKING:
    import torch

RESULT = "evaluation.json"  # in EVALUATION, by `prdp evaluate`
LAST_EPOCH = 10**9  # a number beyond is no epoch's
LARGEST = 1e100  # float32 ends at 3e38; sums and differences of these are finite


@dataclass(frozen=True)
class EvaluatedSet:
    """Pictures of one prompt set and their rewards, as training keeps them."""

    prompts: list[str]  # P
    images: torch.Tensor  # (P * B, 3, H, W) uint8, prompt-major
    scores: torch.Tensor  # (P, B) float32, NaN without one; of runs of earlier versions (P, 1), means of a prompt's images

    @property
    def images_per_prompt(self) -> int:
        return len(self.images) // len(self.prompts)


@dataclass(frozen=True)
class RunData:
    directory: Path
    record: dict[str, Any]  # run.json; empty if it is damaged
    rows: list[dict[str, Any]]  # of metrics.jsonl, one an epoch, in order
    summary: dict[str, Any] | None  # of a run that came to its end
    before: dict[str, EvaluatedSet] = field(default_factory=dict)
    after: dict[str, EvaluatedSet] = field(default_factory=dict)
    acceleration: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] | None = None  # of `prdp evaluate`
    faults: tuple[str, ...] = ()  # what could not be read, for the user

    @property
    def name(self) -> str:
        return self.directory.resolve().name

    @property
    def recipe(self) -> dict[str, Any]:
        return at(self.record, "recipe", kind=dict) or {}

    @property
    def epochs(self) -> int:
        """Finished ones."""
        return self.rows[-1]["epoch"] + 1 if self.rows else 0

    @property
    def total_epochs(self) -> int | None:
        return at(self.recipe, "schedule", "epochs", kind=int)

    @property
    def seed(self) -> int | None:
        return at(self.recipe, "seed", kind=int)


def at(value: Any, *keys: str, kind: type) -> Any:
    """value[key][key]..., None if it is not there or of another kind."""
    for key in keys:
        if not isinstance(value, dict) or key not in value:
            return None
        value = value[key]
    return value if isinstance(value, kind) and not (kind is not bool and isinstance(value, bool)) else None


def finite(value: Any) -> float | None:
    """A number of a file, None if it is none, not finite, or beyond what a run can have computed."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) and abs(number) <= LARGEST else None


def points_of(rows: list[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    """(epoch, value) of a metric, epochs counted from 1; without the epochs in which it is no finite number."""
    found = ((row["epoch"] + 1, finite(row.get(name))) for row in rows)
    return [(epoch, value) for epoch, value in found if value is not None]


def total(rows: list[dict[str, Any]], name: str) -> float:
    """Over all epochs."""
    return sum(value for _, value in points_of(rows, name))


def is_run(directory: Path) -> bool:
    return (directory / RUN).is_file()


def check_run(directory: Path) -> None:
    """Raises: UserError if the directory is no run."""
    if not is_run(directory):
        raise UserError(f"{directory} is no run directory ({RUN} is missing); give the path that training printed last")


def read_rows(directory: Path) -> list[dict[str, Any]]:
    """Of metrics.jsonl, one an epoch; none if there is no such file yet. Raises: OSError."""
    try:
        rows = read_metrics(directory / METRICS)
    except FileNotFoundError:
        return []
    by_epoch = {row["epoch"]: row for row in rows if not isinstance(row["epoch"], bool) and 0 <= row["epoch"] < LAST_EPOCH}
    return [by_epoch[epoch] for epoch in sorted(by_epoch)]


def read_run(directory: Path) -> RunData:
    """Raises: UserError if the directory is no run."""
    check_run(directory)
    faults: list[str] = []

    def json_of(path: str) -> dict[str, Any] | None:
        try:
            value = read_json(directory / path)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            faults.append(f"{path} cannot be read ({error.strerror if isinstance(error, OSError) else brief(error)})")
            return None
        if not isinstance(value, dict):
            faults.append(f"{path} holds no JSON object")
            return None
        return value

    try:
        rows = read_rows(directory)
    except OSError as error:
        faults.append(fault(error).replace(f"{directory}/", ""))
        rows = []
    return RunData(
        directory, json_of(RUN) or {}, rows, json_of(SUMMARY), read_sets(directory / EVALUATION_BEFORE, faults),
        read_sets(directory / EVALUATION_AFTER, faults), json_of(ACCELERATION) or {}, json_of(f"{EVALUATION}/{RESULT}"),
        tuple(faults),
    )  # fmt: skip


def read_sets(path: Path, faults: list[str]) -> dict[str, EvaluatedSet]:
    """The evaluation that training keeps, by prompt set. Pictures stay on the disk until they are looked at."""
    if not path.exists():
        return {}
    import torch  # here: `prdp watch` needs none

    try:
        kept = torch.load(path, weights_only=True, mmap=True)
        return {str(name): evaluated_set(part) for name, part in kept.items()}
    except Exception as error:  # what pickle, zip and torch say of a damaged file, and what is missing in it
        faults.append(f"{path.name} cannot be read ({type(error).__name__})")
        return {}


def evaluated_set(part: dict[str, Any]) -> EvaluatedSet:
    """Raises: ValueError, KeyError, AttributeError, TypeError if it is none."""
    import torch

    prompts, images, rewards = [str(prompt) for prompt in part["prompts"]], part["images"], part["rewards"]
    scores = part.get("scores")
    scores = (rewards[:, None] if scores is None else scores).float()
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or not prompts or len(images) % len(prompts):
        raise ValueError(f"expected (P * B, 3, H, W) uint8 of {len(prompts)} prompts, got {tuple(images.shape)} {images.dtype}")
    if not len(images) or scores.ndim != 2 or len(scores) != len(prompts):
        raise ValueError(f"expected (P, B) scores of {len(prompts)} prompts, got {tuple(scores.shape)}")
    return EvaluatedSet(prompts, images, scores)
