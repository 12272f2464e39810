"""What a result has to say of where it came from."""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_check import answer_of, commit

PACKAGES = ("torch", "triton", "diffusers", "transformers", "deepspeed", "numpy")


def provenance(script: str, arguments: list[str]) -> dict[str, Any]:
    """Date (UTC), commit, command and machine of a result.

    Args:
        script: the `__file__` of what was run.
        arguments: its command line.
    """
    head, dirty = commit()
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": head,
        "dirty": dirty,
        "command": shlex.join(["python", f"benchmarks/{Path(script).name}", *arguments]),
        "machine": machine(),
    }


def machine() -> dict[str, Any]:
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
        described["driver"] = answer_of(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"])
    return described | {name: package_version(name) for name in PACKAGES}


def cpu_name() -> str:
    """As the system calls it, with family and model where it says them: a virtual machine's name alone says little."""
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


def result_file(parser: argparse.ArgumentParser) -> None:
    """The option that every measurement has."""
    parser.add_argument("--output", type=Path, help="JSON: the numbers, and the machine, versions, commit and command")


def arguments_of(arguments: list[str] | None) -> list[str]:
    return sys.argv[1:] if arguments is None else arguments
