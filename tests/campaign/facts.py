"""What is there: processes, checkpoints, rows, weights; read without the engine."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from campaign.settings import EPOCHS

EPS = torch.finfo(torch.float32).eps
STEP_ERROR = 0.02  # of a step of Adam, by the rounding of a gradient
METRIC_ERROR = 0.01  # of a reward or a loss: a pixel on the edge between two values may fall to the other
MEASURED = ("seconds/", "images_per_s", "memory")  # by a clock, and so otherwise in every run


# Processes.


def fields_of(pid: int) -> list[str]:
    """Of /proc/PID/stat from the state on; none if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def is_alive(pid: int) -> bool:
    fields = fields_of(pid)
    return bool(fields) and fields[0] not in "ZX"


def group(number: int) -> list[int]:
    """The processes of a process group that live."""
    found = (int(entry.name) for entry in Path("/proc").glob("[0-9]*"))
    return [pid for pid in found if (fields := fields_of(pid)) and fields[0] not in "ZX" and int(fields[2]) == number]


def rank_files(run: Path) -> list[dict[str, Any]]:
    """What the ranks of a run say of themselves, of those whose process lives."""
    found = []
    for path in sorted((run / "ranks").glob("rank-*.json")):
        with contextlib.suppress(OSError, ValueError, KeyError):
            one = json.loads(path.read_text())
            if is_alive(one["pid"]):
                found.append(one)
    return found


# Checkpoints.


def checkpoints(run: Path) -> dict[int, Path]:
    """By epoch, whole or not."""
    return {int(path.name[6:]): path for path in sorted((run / "checkpoints").glob("epoch-*")) if path.name[6:].isdecimal()}


def newest(run: Path) -> int:
    """Epoch of the newest checkpoint, whole or not; 0 if there is none."""
    return max(checkpoints(run), default=0)


def fault_of(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint by its manifest; None if nothing is."""
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_bytes())
        expected = {name: (file["bytes"], file["sha256"]) for name, file in manifest["files"].items()}
        own = manifest.pop("sha256")
        if own != hashlib.sha256(json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()).hexdigest():
            return "manifest.json"
        epoch = json.loads((checkpoint / "state.json").read_bytes())["epoch"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "manifest.json or state.json"
    there = {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()} - {"manifest.json"}
    if there != set(expected):
        return ", ".join(sorted(there ^ set(expected)))
    for name, (size, digest) in expected.items():
        data = (checkpoint / name).read_bytes()
        if len(data) != size or hashlib.sha256(data).hexdigest() != digest:
            return name
    return None if checkpoint.name == f"epoch-{epoch:06d}" else "state.json"


def newest_whole(run: Path) -> int:
    """Epoch of the newest checkpoint that is whole; 0 if none is."""
    return next((epoch for epoch, path in sorted(checkpoints(run).items(), reverse=True) if fault_of(path) is None), 0)


# Results.


def epochs(run: Path) -> int:
    """Rows of metrics.jsonl."""
    path = run / "metrics.jsonl"
    return path.read_text(errors="replace").count("\n") if path.exists() else 0


def rows(run: Path) -> list[Any]:
    """Those of metrics.jsonl, without what a clock measured; None for one that is no JSON."""
    found = []
    for line in (run / "metrics.jsonl").read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
            found.append({name: value for name, value in row.items() if not name.startswith(MEASURED)})
        except (ValueError, AttributeError):
            found.append(None)
    return found


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the exported model, by file and name."""
    return {
        f"{path.relative_to(run)}:{name}": tensor
        for path in sorted((run / "model").rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def difference(run: Path, other: Path, *, rate: float | None = None) -> str | None:
    """In what the results of two finished runs differ; None if they do not.

    Args: rate: the learning rate, of runs that need only be equal to rounding; None: bit for bit.
    """
    for path in (run, other):
        if not (path / "summary.json").exists():
            return f"{path.name} is not finished"
    return difference_of_weights(weights(run), weights(other), rate) or difference_of_files(run, other, exact=rate is None)


def difference_of_weights(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], rate: float | None) -> str | None:
    """A step rounds a weight to eps of it, and moves it by the rate; an error of the gradient is a share of that."""
    if not found or found.keys() != expected.keys():
        return "the exported files"
    for name, tensor in found.items():
        if not tensor.isfinite().all():
            return f"{name} is not finite"
        if torch.equal(tensor, expected[name]):
            continue
        far, largest = float((tensor - expected[name]).abs().max()), float(expected[name].abs().max())
        if rate is None or far > EPOCHS * (EPS * largest + STEP_ERROR * rate):
            return f"{name} by up to {far:.1e}"
    return None


def difference_of_files(run: Path, other: Path, *, exact: bool) -> str | None:
    """Rows of metrics and evaluations."""
    ours, theirs = rows(run), rows(other)
    if [row and row["epoch"] for row in ours] != [row["epoch"] for row in theirs]:
        return f"metrics.jsonl has the epochs {[row and row['epoch'] for row in ours]}"
    for one, two in zip(ours, theirs):
        if exact and one != two:
            return f"metrics.jsonl, epoch {one['epoch']}: {next(name for name in one | two if one.get(name) != two.get(name))}"
        for name in () if exact else ("reward", "loss"):
            if not math.isclose(one[name], two[name], rel_tol=METRIC_ERROR):
                return f"metrics.jsonl, epoch {one['epoch']}: {name} {one[name]:.6g}, expected {two[name]:.6g}"
    evaluations = [json.loads((path / "summary.json").read_text())["evaluation"] for path in (run, other)]
    if exact and evaluations[0] != evaluations[1]:
        return "summary.json: evaluation"
    before = [torch.load(path / "evaluation_before.pt", weights_only=True) for path in (run, other)]
    return None if same(*before) else "evaluation_before.pt"


def same(one: Any, other: Any) -> bool:
    """Whether nested values are equal, NaN to NaN."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.shape == other.shape and bool(((one == other) | ((one != one) & (other != other))).all())
    return one == other


def stop_process(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
