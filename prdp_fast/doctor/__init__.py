"""Is this machine fit for a job? Short checks, each of which does the thing that it is about.

`checks.py` says what a check is. `installation.py`, `machine.py` and `engine.py` hold the checks of their subject, and this file
lists them in the order of the report.
"""

from __future__ import annotations

from functools import partial

from prdp_fast.doctor import engine, installation, machine
from prdp_fast.doctor.checks import Check, Finding, Outcome, Status, examine
from prdp_fast.doctor.requirements import is_clone

__all__ = ["CHECKS", "Check", "Finding", "Outcome", "Status", "examine"]

REINSTALL = "pip install -c constraints.txt -e ." if is_clone() else "reinstall prdp-fast from its wheel"


def _library(name: str) -> Check:
    return Check(name, partial(installation.check_library, name), REINSTALL)


def _extra(name: str) -> Check:
    return Check(f"extra {name}", partial(installation.check_extra, name), f"pip install 'prdp-fast[{name}]'")


def _guest(module: str, distribution: str) -> Check:
    return Check(module, partial(installation.check_guest, module, distribution), f"pip uninstall {distribution}")


CHECKS = (
    Check("Python", installation.check_python, REINSTALL),
    Check("torch", installation.check_torch, f"reinstall torch: pip install {'-c constraints.txt ' if is_clone() else ''}torch"),
    Check("triton", installation.check_triton, REINSTALL),
    *(_library(name) for name in ("diffusers", "transformers", "deepspeed", "webdataset")),
    Check("other libraries", installation.check_others, REINSTALL),
    *(_extra(name) for name in installation.EXTRAS),
    _guest("torchvision", "torchvision"),
    _guest("open_clip", "open_clip_torch"),
    Check("name 'kernels'", installation.check_kernels_name, "see what 'import kernels' finds"),
    Check("GPUs", machine.check_gpus, f"install a build of torch for this GPU and its driver ({machine.BUILDS_OF_TORCH})"),
    Check("C++ compiler", machine.check_compiler, machine.INSTALL_COMPILER, aside=True),
    Check("ninja", machine.check_ninja, "pip install --force-reinstall ninja"),
    Check("shared memory", machine.check_shared_memory, "see that /dev/shm is mounted"),
    Check("disk", machine.check_disk, "see that the directory exists and can be written"),
    Check("hub", machine.check_hub, REINSTALL),
    Check("embedded model", engine.check_embedded_model, REINSTALL),
    Check("attention", engine.check_attention, REINSTALL),
    Check("process group", machine.check_process_group, REINSTALL),
    Check("Triton kernel", engine.check_kernel, REINSTALL, aside=True),
)
