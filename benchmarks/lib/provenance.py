"""What a result says of where it came from: date, commit, command, machine and versions."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.lib.command import ROOT, module_name
from prdp_fast.core import distributed

PACKAGES = ("torch", "triton", "diffusers", "transformers", "deepspeed", "numpy")


def provenance(file: str, arguments: list[str]) -> dict[str, Any]:
    """Date (UTC), commit, command and machine of a result. To be called at the start: the tree may change while it is measured.

    Args:
        file: the `__file__` of the script.
        arguments: its command line. The launcher's --local_rank is left out.
    """
    head, dirty = commit()
    ranks = distributed.world_size()
    launcher = ["python", "-m"] if ranks == 1 else ["deepspeed", "--num_gpus", str(ranks), "--module"]
    given = [word for word in arguments if not word.startswith("--local_rank")]
    return {
        "date": now(),
        "commit": head,
        "dirty": dirty,
        "command": shlex.join([*launcher, module_name(file), *given]),
        "machine": machine(),
    }


def now() -> str:
    """UTC, ISO 8601."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def commit() -> tuple[str, bool | None]:
    """(commit, whether the tree differs from it; None if git could not say). Results files do not make a tree dirty."""
    head = output_of(["git", "rev-parse", "HEAD"])
    changes = output_of(["git", "status", "--porcelain", "--", ".", ":!benchmarks/results"])
    return head or "unknown", None if changes is None else bool(changes)


def output_of(command: list[str]) -> str | None:
    """What a command prints; None if there is no such command or it fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def driver_version() -> str | None:
    return output_of(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"])


def machine() -> dict[str, Any]:
    """The processor, the GPU if there is one, and versions of what computes."""
    described: dict[str, Any] = {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }
    if torch.cuda.is_available():
        described["gpu"] = torch.cuda.get_device_name(0)
        described["cuda"] = torch.version.cuda
        described["driver"] = driver_version()
    return described | {name: package_version(name) for name in PACKAGES}


def cpu_name() -> str:
    """The model's name with family and model number: the name alone says little in a virtual machine."""
    try:
        lines = (line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
        fields = {key.strip(): value.strip() for key, value in lines}
    except OSError:
        return platform.processor() or "unknown"
    name = fields.get("model name", platform.processor() or "unknown")
    return f"{name} (family {fields['cpu family']}, model {fields['model']})" if "cpu family" in fields else name


def package_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
