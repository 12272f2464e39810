"""Whether compiling pays: the seconds it would save in the rest of a job against the seconds it takes."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from prdp_fast.acceleration.compile import is_one_of
from prdp_fast.acceleration.probe import Decision
from prdp_fast.core.files import read_json, write_json

# Until this machine has compiled such a model itself: measured with the U-Net of SD 1 on an H200 with 16 cores, torch 2.11.
BLOCKS, SECONDS = 38, {"trained": 145.0, "rollout": 54.0, "reference": 35.0}
# Of the time of a plain call, what the compiled one saved there: forward and backward of compiled blocks, a whole forward.
SAVED = {"trained": 0.12, "rollout": 0.32, "reference": 0.32}
KEPT = "prdp_compile_seconds.json"  # in the compiler's cache directory


@dataclass(frozen=True)
class WorkLeft:
    """What is left of a job on one rank."""

    rows: Mapping[str, float]  # denoiser rows by role: trained (forward and backward), rollout, reference
    seconds: float | None = None  # until the job's time limit


@dataclass(frozen=True)
class Payback:
    saves: float  # seconds
    costs: float

    @property
    def pays(self) -> bool:
        return self.saves > self.costs

    def __str__(self) -> str:
        if self.saves <= 0:
            return "would be slower than the project's own kernels, by what compiling saved elsewhere"
        return f"saves about {self.saves:.0f} s of this job, costs about {self.costs:.0f} s"


def payback(
    role: str, work: WorkLeft, seconds_per_row: float, blocks: int, learnt: Mapping[str, float], gained: float = 1.0
) -> Payback:
    """Args:
    seconds_per_row: of the call that would be made instead, forward and backward for the trained denoiser.
    blocks: repeated blocks of the denoiser.
    learnt: seconds that compiling took here before, by role.
    gained: how many times faster than diffusers' own that call is. What is compiled is diffusers' own.
    """
    spent = work.rows[role] * seconds_per_row
    if work.seconds is not None:
        spent = min(spent, work.seconds)
    saved = 1 - (1 - SAVED[role]) * gained
    return Payback(saved * spent, learnt.get(role, SECONDS[role] * blocks / BLOCKS))


def count_blocks(denoiser: nn.Module, names: tuple[str, ...]) -> int:
    return sum(is_one_of(module, names) for module in denoiser.modules())


def cache_directory() -> Path | None:
    """Of the compiler, where it was set; what was compiled there is there again."""
    place = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    return Path(place) if place else None


def key_of(denoiser: nn.Module, rows: int, device: torch.device) -> str:
    """Of what decides how long compiling takes: the model's size, the rows, the machine and the compiler."""
    parameters = sum(parameter.numel() for parameter in denoiser.parameters())
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return f"{type(denoiser).__name__} {parameters} parameters, {rows} rows, {name}, torch {torch.__version__}"


def learnt_seconds(key: str) -> dict[str, float]:
    """Seconds that compiling took on this machine before, by role; of a warm cache few."""
    directory = cache_directory()
    if directory is None:
        return {}
    with contextlib.suppress(OSError, ValueError, AttributeError):  # the file is a convenience, and anybody may write to a cache
        return {role: float(value) for role, value in read_json(directory / KEPT).get(key, {}).items()}
    return {}


def learn_seconds(key: str, decisions: Mapping[str, Decision]) -> None:
    """Keep what the first call of each compiled denoiser took."""
    directory = cache_directory()
    took = {
        role: decision.milliseconds["first call"] / 1000
        for role in SECONDS
        if (decision := decisions.get(f"compile {role}")) is not None and "first call" in decision.milliseconds
    }
    if directory is None or not took:
        return
    with contextlib.suppress(OSError, ValueError, json.JSONDecodeError):
        path = directory / KEPT
        kept = read_json(path) if path.is_file() else {}
        write_json(path, {**kept, key: {**kept.get(key, {}), **took}})
