"""Is the machine fit? GPUs, compiler, ninja, shared memory, disk, the hub's cache, and a process group."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from prdp_fast.doctor.checks import Outcome, fault, note, ok

BUILDS_OF_TORCH = "https://pytorch.org/get-started/locally"
INSTALL_COMPILER = "install a C++ compiler with OpenMP and Python's headers, e.g. apt install g++ python3-dev"
GB = 1e9
SHARED_MEMORY = 1 * GB  # below, ranks that share a machine may find no room; a container has 64 MB by default
DISK_NOTE, DISK_FAULT = 20 * GB, 0.5 * GB  # a checkpoint of SD v1.4 holds 859.5 M weights and two Adam moments of each: 10 GB
TAKEN = 0.1  # of a GPU's memory: a driver and a context hold less, so more means another process
# DeepSpeed's operators, torch.compile's CPU code and Triton's launchers need C++, OpenMP and Python's headers. So does this
# shared library, whose function returns 42.
PROGRAM = """
#include <Python.h>
#include <vector>
extern "C" int answer() {
    std::vector<int> ones(42, 1);
    int sum = 0;
    #pragma omp parallel for reduction(+ : sum)
    for (int i = 0; i < 42; ++i) sum += ones[i];
    return sum;
}
"""


def gigabytes(count: float) -> str:
    return f"{count / GB:.1f} GB"


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def build_of_torch() -> str:
    import torch

    if torch.version.cuda:
        return f"built for CUDA {torch.version.cuda}"
    return f"built for ROCm {torch.version.hip}" if torch.version.hip else "built for CPUs"


def nvidia_smi(*arguments: str) -> list[str]:
    """Lines of its output; none where there is no such program or it fails."""
    try:
        done = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.split("\n")[:-1] if done.returncode == 0 else []


def multiplies(index: int, dtype: str) -> bool:
    """Whether a GPU's product of two matrices of ones is right, of numbers that a half-precision float holds exactly."""
    import torch

    ones = torch.ones(64, 64, dtype=getattr(torch, dtype), device=f"cuda:{index}")
    return bool(((ones @ ones) == 64).all())


def check_gpus(runs: Path) -> Outcome:
    """Multiplies matrices on every GPU."""
    import torch

    if not torch.cuda.is_available():
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        listed = [line for line in nvidia_smi("-L") if line.startswith("GPU ")]
        if listed and hidden in ("", "-1"):
            return note(f"none: CUDA_VISIBLE_DEVICES is {hidden!r}", "unset it to use this machine's GPUs")
        if listed:
            return fault(
                f"nvidia-smi lists {len(listed)}, torch {torch.__version__} ({build_of_torch()}) sees none",
                f"install a CUDA build of torch that this driver can run ({BUILDS_OF_TORCH})",
            )
        return note("none: jobs run on the CPU, in float32")
    groups: dict[tuple[str, tuple[int, int]], list[tuple[int, int]]] = {}
    for index in range(torch.cuda.device_count()):
        name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
        if not multiplies(index, "bfloat16" if capability >= (8, 0) else "float16"):
            return fault(f"GPU {index} multiplies wrongly", "check the machine: nvidia-smi -q -d ECC")
        groups.setdefault((name, capability), []).append(torch.cuda.mem_get_info(index))
    parts = []
    for (name, (major, minor)), memory in groups.items():
        free, total = min(memory)
        precision = "bf16" if major >= 8 else "no bf16"
        parts.append(f"{len(memory)} x {name} (sm_{major}{minor}, {precision}, {gigabytes(free)} of {gigabytes(total)} free)")
    driver = (nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader") or ["unknown"])[0].strip()
    found = f"{', '.join(parts)}, driver {driver}"
    if any(major < 8 for _, (major, _) in groups):
        return note(found, 'enable "fp16" in the DeepSpeed file, whose "auto" means bf16')
    if any(free < (1 - TAKEN) * total for memory in groups.values() for free, total in memory):
        return note(found, "another process holds the rest: see nvidia-smi")
    return ok(found)


def check_compiler(runs: Path) -> Outcome:
    """Compiles a shared library and calls it."""
    asked = os.environ.get("CXX")
    found = next(filter(None, map(shutil.which, [asked] if asked else ["c++", "g++", "clang++"])), None)
    if found is None:
        return fault(f"CXX is {asked!r}, which is no program" if asked else "none on PATH", f"{INSTALL_COMPILER}, or set CXX")
    with tempfile.TemporaryDirectory(prefix="prdp-doctor-") as folder:
        source, library = Path(folder, "answer.cpp"), Path(folder, "answer.so")
        source.write_text(PROGRAM, encoding="utf-8")
        flags = ["-shared", "-fPIC", f"-I{sysconfig.get_paths()['include']}"]
        flags += ["-fopenmp"] if sys.platform == "linux" else ["-undefined", "dynamic_lookup"]
        done = subprocess.run([found, *flags, str(source), "-o", str(library)], capture_output=True, text=True, timeout=60)
        if done.returncode:
            wrong = [line for line in done.stderr.splitlines() if "error" in line.lower()] or ["no reason given"]
            return fault(f"{found} does not compile: {wrong[0].strip()[-160:]}", INSTALL_COMPILER)
        if (answer := ctypes.CDLL(str(library)).answer()) != 42:
            return fault(f"{found} compiles wrongly: 42 became {answer}", INSTALL_COMPILER)
    version = subprocess.run([found, "-dumpfullversion", "-dumpversion"], capture_output=True, text=True, timeout=10)
    return ok(f"{found} {version.stdout.strip()} with OpenMP and Python's headers")


def check_ninja(runs: Path) -> Outcome:
    """The program: torch looks for it on PATH when it builds an operator."""
    program = shutil.which("ninja")
    if program is None and Path(sys.executable).with_name("ninja").is_file():
        folder = Path(sys.executable).parent
        return fault(f"in {folder}, which is not on PATH", f"source {folder / 'activate'}")
    if program is None:
        return fault("not on PATH", "pip install ninja")
    done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=10, check=True)
    return ok(f"{program} {done.stdout.strip()}")


def check_shared_memory(runs: Path, path: str = "/dev/shm") -> Outcome:
    if not Path(path).is_dir():
        return ok(f"no {path} on this system")
    total, _, free = shutil.disk_usage(path)
    found = f"{gigabytes(free)} of {gigabytes(total)} free in {path}"
    if free < SHARED_MEMORY:
        return note(found, "several ranks on one machine may need more; start a container with --shm-size=8g")
    return ok(found)


def existing(path: Path) -> Path:
    """The path or the nearest folder above it that is there."""
    path = path.resolve()
    return next(candidate for candidate in (path, *path.parents) if candidate.exists())


def check_disk(runs: Path) -> Outcome:
    """Writes a file where runs will go."""
    place = existing(runs)
    try:
        with tempfile.NamedTemporaryFile(dir=place, prefix=".prdp-doctor-") as file:
            file.write(b"\0" * 4096)
            file.flush()
    except OSError as error:
        return fault(f"{place} cannot be written ({error.strerror})", "run jobs elsewhere, or with --output DIR")
    free = shutil.disk_usage(place).free
    found = f"{gigabytes(free)} free for {runs.resolve()}"
    if free < DISK_FAULT:
        return fault(found, "make room, or run jobs with --output DIR")
    if free < DISK_NOTE:
        return note(found, "a checkpoint of SD v1.4 takes 10 GB with its optimizer; make room, or use --output DIR")
    return ok(found)


def check_hub(runs: Path) -> Outcome:
    from huggingface_hub import constants

    cache_folder = Path(constants.HF_HUB_CACHE)
    models = len(list(cache_folder.glob("models--*"))) if cache_folder.is_dir() else 0
    found = f"{cache_folder} holds {models} models"
    if constants.HF_HUB_OFFLINE:
        return note(f"{found}, HF_HUB_OFFLINE is set", "unset it to load models that are not in the cache")
    if not os.access(existing(cache_folder), os.W_OK):
        return fault(f"{found} and cannot be written", "set HF_HOME to a folder that can")
    return ok(f"{found}, HF_HUB_OFFLINE is not set")


def check_process_group(runs: Path) -> Outcome:
    """A group of one, as a job without a launcher starts it, DeepSpeed included."""
    if "RANK" in os.environ:
        return note("not tried: RANK is set, by a launcher it seems", "run 'prdp doctor' by itself")
    import torch.distributed as dist

    from prdp_fast.core import distributed

    distributed.init()
    try:
        backend, total = dist.get_backend(), distributed.all_reduce([42.0])
    finally:
        distributed.shutdown()
    if total != [42.0]:
        return fault(f"{backend} adds up one rank's 42 to {total[0]:g}", "reinstall torch")
    others = [name for name, there in (("nccl", dist.is_nccl_available()), ("gloo", dist.is_gloo_available())) if there]
    return ok(f"one process joins and reduces over {backend}; torch has {', '.join(others)}")
