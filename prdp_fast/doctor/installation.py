"""Is this machine fit for a job? Short checks, each of which does the thing that it is about.

No check raises: what fails is its finding. Only the standard library is imported before a check runs, so that a broken
installation can be looked at too.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.metadata
import importlib.util
import io
import logging
import os
import platform
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from prdp_fast.core.errors import UserError

if TYPE_CHECKING:
    from prdp_fast.models.pipeline import Pipeline

Status = Literal["ok", "note", "fault"]

# What setup.py asks for; a test holds the two together. Installed metadata may be older than the code beside it.
CORE = (
    "torch>=2.10",
    "triton>=3.6; platform_system == 'Linux'",
    "diffusers>=0.42; python_version >= '3.11'",
    "diffusers>=0.41; python_version < '3.11'",
    "transformers>=5",
    "accelerate>=1.0",
    "deepspeed>=0.19.8",
    "ninja",
    "safetensors",
    "huggingface_hub>=1",
    "webdataset>=1.0",
    "pydantic>=2",
    "PyYAML>=6",
    "numpy>=1.26",
    "pillow>=10.1",
    "tensorboard>=2.16",
    "matplotlib>=3.8",
    "rich>=13",
)
EXTRAS = {
    "gpu": ("xformers>=0.0.35",),
    "rewards": ("httpx2>=2", "tenacity>=9", "fastapi>=0.115", "uvicorn>=0.30"),
    "lora": ("peft>=0.18",),
    "data": ("pyarrow>=15", "datasets>=3"),
}
PYTHON = (3, 10)
ON_LINES_OF_THEIR_OWN = ("torch", "triton", "diffusers", "transformers", "deepspeed", "webdataset", "ninja")
# Of builds of torch whose metadata names no Triton, which are those for CPUs.
TRITON_OF_TORCH = {"2.11": "3.6", "2.13": "3.7"}
WHY = {"deepspeed": " (earlier releases lose gradients when many backwards precede one step)"}

GB = 1e9
SHARED_MEMORY = 1 * GB  # below, ranks that share a machine may find no room; a container has 64 MB by default
DISK_NOTE, DISK_FAULT = 20 * GB, 0.5 * GB  # a checkpoint of SD v1.4 holds 859.5 M weights and two Adam moments of each: 10 GB
TAKEN = 0.1  # share of a GPU's memory that a driver and a context may hold before somebody else must be there
KERNEL_TOLERANCE = 1e-4  # of values up to 20 in float32; two orders of summation differ by 1e-6
# A shared library by the tools that build DeepSpeed's operators, torch.compile's CPU code and Triton's launchers: C++, OpenMP and
# Python's headers. It answers 42.
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


class Outcome(NamedTuple):
    status: Status
    found: str
    advice: str = ""  # the next move, where there is one


class Finding(NamedTuple):
    """One line of the report."""

    check: str
    status: Status
    found: str
    advice: str

    def __str__(self) -> str:
        return f"{self.found}; {self.advice}" if self.advice else self.found


class Check(NamedTuple):
    name: str
    run: Callable[[Path], Outcome]  # of the directory that runs go to
    advice: str  # if the check itself raises
    aside: bool = False  # its work is another process's, which starts at once


ok = partial(Outcome, "ok")
note = partial(Outcome, "note")
fault = partial(Outcome, "fault")


def examine(runs: Path, checks: Iterable[Check] | None = None) -> Iterator[Finding]:
    """Every check's finding, in order, as soon as it is there. Args: runs: the directory that runs will go to."""
    checks = CHECKS if checks is None else tuple(checks)
    with ThreadPoolExecutor(1) as pool:
        aside: dict[str, Future[Outcome]] = {check.name: pool.submit(attempt, check, runs) for check in checks if check.aside}
        for check in checks:
            if check.aside:
                outcome = aside[check.name].result()
            else:
                with silence():
                    outcome = attempt(check, runs)
            yield Finding(check.name, *outcome)


def attempt(check: Check, runs: Path) -> Outcome:
    try:
        return check.run(runs)
    except KeyboardInterrupt:
        raise
    except UserError as error:  # says what to do by itself
        return fault(str(error))
    except BaseException as error:  # libraries raise, and exit, in every way there is
        return fault(one_line(error), check.advice)


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """What libraries say while they are imported is none of the report's lines."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def gigabytes(count: float) -> str:
    return f"{count / GB:.1f} GB"


# -------------------------------------------------------------------------------------------------------------- installation
def check_python(runs: Path) -> Outcome:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if sys.version_info[:2] < PYTHON:
        return fault(f"{found}, expected at least {PYTHON[0]}.{PYTHON[1]}", "make the environment with a newer Python")
    return ok(found)


def installed(name: str) -> str | None:
    """Version of a distribution, as pip knows it; nothing is imported."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def judge(requirement_text: str) -> Outcome | None:
    """A requirement against what is installed; None if it is none of this platform's."""
    from packaging.requirements import Requirement

    requirement = Requirement(requirement_text)
    if requirement.marker is not None and not requirement.marker.evaluate():
        return None
    version, wanted = installed(requirement.name), f"'{requirement.name}{requirement.specifier}'"
    if version is None:
        return fault("not installed", f"pip install {wanted}")
    if not requirement.specifier.contains(version, prereleases=True):
        why = WHY.get(requirement.name, "")
        return fault(f"{version}, expected {requirement.specifier}{why}", f"pip install --upgrade {wanted}")
    return ok(version)


def check_library(name: str, runs: Path) -> Outcome:
    judged = [judge(text) for text in CORE if named(text) == name]
    return next((outcome for outcome in judged if outcome is not None), ok("not needed on this platform"))


def named(requirement_text: str) -> str:
    from packaging.requirements import Requirement

    return Requirement(requirement_text).name


def check_torch(runs: Path) -> Outcome:
    outcome = check_library("torch", runs)
    if outcome.status != "ok":
        return outcome
    import torch

    return ok(f"{torch.__version__}, {build_of_torch()}")


def build_of_torch() -> str:
    import torch

    if torch.version.cuda:
        return f"built for CUDA {torch.version.cuda}"
    return f"built for ROCm {torch.version.hip}" if torch.version.hip else "built for CPUs"


def pinned(distribution: str, name: str) -> str | None:
    """The one version of `name` that an installed distribution takes; None if it takes several, or says nothing."""
    from packaging.requirements import Requirement

    for text in importlib.metadata.requires(distribution) or []:
        requirement = Requirement(text)
        if requirement.name == name and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            (only, *others) = requirement.specifier or [None]
            if only is not None and not others and only.operator == "==":
                return only.version
    return None


def check_triton(runs: Path) -> Outcome:
    outcome = check_library("triton", runs)
    version = installed("triton")
    if outcome.status != "ok" or version is None:
        return outcome
    torch_version = installed("torch") or "0.0"
    pair = pinned("torch", "triton")
    if pair is not None and version != pair:
        return fault(f"{version}, but torch {torch_version} takes {pair} alone", f"pip install triton=={pair}")
    usual = TRITON_OF_TORCH.get(".".join(torch_version.split(".")[:2]))
    if pair is None and usual is not None and not version.startswith(f"{usual}."):
        return note(f"{version}, but torch {torch_version} goes with {usual}", f"pip install 'triton=={usual}.*'")
    return ok(version)


def check_others(runs: Path) -> Outcome:
    found = []
    for text in CORE:
        outcome = judge(text) if named(text) not in ON_LINES_OF_THEIR_OWN else None
        if outcome is not None and outcome.status == "fault":
            return fault(f"{named(text)} {outcome.found}", outcome.advice)
        if outcome is not None:
            found.append(f"{named(text)} {outcome.found}")
    return ok(", ".join(found))


def check_extra(extra: str, runs: Path) -> Outcome:
    """An extra is nobody's need before a recipe asks for it; a version that is too old is a fault all the same."""
    judged = {named(text): outcome for text in EXTRAS[extra] if (outcome := judge(text)) is not None}
    missing = [name for name in judged if installed(name) is None]
    for name, outcome in judged.items():
        if outcome.status == "fault" and name not in missing:
            return fault(f"{name} {outcome.found}", outcome.advice)
    if missing and extra == "gpu" and not has_gpu():
        return ok(f"{', '.join(missing)} not installed, of use on a GPU only")
    if missing:
        return note(f"{', '.join(missing)} not installed", f"pip install 'prdp-fast[{extra}]' for {FOR[extra]}")
    return ok(", ".join(f"{name} {outcome.found}" for name, outcome in judged.items()))


FOR = {
    "gpu": "one more attention kernel",
    "rewards": "the reward http and 'prdp serve-reward'",
    "lora": "recipes with model.lora",
    "data": "prompt sets from parquet files and the hub",
}


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def check_guest(module: str, distribution: str, runs: Path) -> Outcome:
    """A library that nothing here uses and others import where it is there: it must go with the torch that is there."""
    version = installed(distribution)
    if version is None:
        return ok("not installed, and not needed")
    pair, torch_version = pinned(distribution, "torch"), installed("torch") or "none"
    if pair is not None and pair.partition("+")[0] != torch_version.partition("+")[0]:
        return fault(f"{version} takes torch {pair}, here is {torch_version}", f"pip uninstall {distribution}")
    importlib.import_module(module)  # one built for another torch fails here
    return ok(f"{version}, goes with torch {torch_version}")


def check_kernels_name(runs: Path) -> Outcome:
    """`kernels` must be Hugging Face's client or nothing: diffusers and transformers import it where they find it."""
    spec = importlib.util.find_spec("kernels")
    if spec is None or spec.origin is None:  # a folder without __init__.py, such as this repository's, hides nothing
        return ok("free")
    origin = Path(spec.origin).resolve()
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        distribution = importlib.metadata.distribution("kernels")
        if origin == Path(str(distribution.locate_file("kernels/__init__.py"))).resolve():
            return ok(f"Hugging Face's kernels {distribution.version}")
    return fault(
        f"'import kernels' finds {origin}, which diffusers and transformers take for Hugging Face's kernel client",
        f"rename it, or take {origin.parent.parent if origin.name == '__init__.py' else origin.parent} off Python's path",
    )


# ------------------------------------------------------------------------------------------------------------------- machine
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
                "install a CUDA build of torch that this driver can run (https://pytorch.org/get-started/locally)",
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


INSTALL_COMPILER = "install a C++ compiler with OpenMP and Python's headers, e.g. apt install g++ python3-dev"


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


# ----------------------------------------------------------------------------------------------------------- the engine itself
def run_python(code: str, timeout: float, **variables: str | None) -> None:
    """Run code in a process that imports from where this one does.

    Args: variables: of its environment; None takes one out.
    Raises: RuntimeError with the last line of what it said, if it fails, crashes or takes longer than `timeout` seconds.
    """
    environment = {name: value for name, value in os.environ.items() if name not in variables}
    environment |= {name: value for name, value in variables.items() if value is not None}
    environment["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, errors="replace", timeout=timeout
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"not done after {timeout:g} s") from None
    if done.returncode < 0:
        raise RuntimeError(f"its process was ended by {signal.Signals(-done.returncode).name}")
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1])


def check_kernel(runs: Path) -> Outcome:
    """A kernel against its reference, in a process of its own: a kernel that crashes takes its process along, and Triton chooses
    between GPU and interpreter when it is imported."""
    if installed("triton") is None:
        return note("no Triton: operators run as plain torch")
    device = "cuda" if has_gpu() else "cpu"
    where = "on the GPU" if device == "cuda" else "in Triton's interpreter"
    code = f"from prdp_fast.doctor import compare_kernel; compare_kernel({device!r})"
    try:
        run_python(code, timeout=120, TRITON_INTERPRET=None if device == "cuda" else "1")
    except RuntimeError as error:
        return fault(f"denoise_step fails {where}: {error}", "set kernels to torch in the recipe, or mend triton")
    return ok(f"denoise_step equals its reference {where}")


def compare_kernel(device: str) -> None:
    """Raises: ValueError if the Triton kernel and the reference in plain torch disagree."""
    import torch

    from prdp_kernels import denoise_step

    generator = torch.Generator().manual_seed(0)
    output, sample = torch.randn(4, 4, 16, 16, generator=generator), torch.randn(2, 4, 16, 16, generator=generator)
    arguments = [tensor.to(device) for tensor in (output, sample, *torch.rand(3, 2, generator=generator) + 0.1)]
    seeds = torch.tensor([1, 2], device=device)
    fused, plain = (denoise_step(*arguments, seeds=seeds, guidance_scale=5.0, backend=backend) for backend in ("triton", "torch"))
    differences = [(own - other).abs().flatten() for own, other in zip(fused, plain, strict=True)]
    error = float(torch.cat(differences).max())  # NaN if one is
    if not error <= KERNEL_TOLERANCE:
        raise ValueError(f"off by {error:.1e}, expected at most {KERNEL_TOLERANCE:.0e}")


@cache
def embedded_model() -> Pipeline:
    import torch

    from prdp_fast.models.pipeline import Pipeline

    return Pipeline.load("tiny", torch.device("cuda" if has_gpu() else "cpu"), torch.float32)


def check_embedded_model(runs: Path) -> Outcome:
    """Encodes a prompt, takes one guided step as a rollout does, and decodes what comes out."""
    import torch

    from prdp_fast.core.records import Prompt
    from prdp_fast.models.text import TextEncoder
    from prdp_fast.sampling.policy import Policy
    from prdp_fast.sampling.transitions import Transitions

    pipeline = embedded_model()
    device = pipeline.denoiser.device
    embeddings = TextEncoder(pipeline, torch.float32).encode([Prompt(0, "a large red circle", {})])
    policy = Policy(Transitions.from_scheduler(pipeline.scheduler, 10), guidance_scale=2.0, predict=pipeline.family.predict)
    latents = torch.randn(1, *pipeline.latent_shape, generator=torch.Generator().manual_seed(0)).to(device)
    start = time.perf_counter()
    with torch.no_grad():
        previous, log_prob = policy.sample_step(pipeline.denoiser, latents, 0, embeddings, torch.tensor([1], device=device))
    finite = bool(previous.isfinite().all() and log_prob.isfinite().all())
    milliseconds = (time.perf_counter() - start) * 1000
    if not finite:
        return fault(f"a U-Net step on {device} is not finite", "reinstall torch: its arithmetic is wrong on this machine")
    _, _, height, width = pipeline.decode(previous).shape
    return ok(f"a guided U-Net step on {device} took {milliseconds:.0f} ms, is finite and decodes to {height} x {width} pixels")


def check_attention(runs: Path) -> Outcome:
    """Every kernel that `performance.attention: auto` would try, forward and backward, against torch's own."""
    import torch

    from prdp_fast.acceleration.attention import candidates, set_attention
    from prdp_fast.acceleration.probe import Probe, choose_variant

    pipeline = embedded_model()
    device = pipeline.denoiser.device
    half = torch.bfloat16 if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    dtype = half if device.type == "cuda" else torch.float32
    denoiser = pipeline.frozen_denoiser(dtype)
    names = candidates(device)
    variants: dict[str, Any] = {name: partial(set_attention, denoiser, name) for name in names}
    probe = Probe(denoiser, pipeline.family, rows=2, device=device, dtype=dtype, gradients=True)
    _, _, reasons = choose_variant(probe, variants, "sdpa")
    out = "".join(f", no {name} ({reason})" for name, reason in reasons.items())
    return ok(f"{', '.join(name for name in names if name not in reasons)} work in {str(dtype).removeprefix('torch.')}{out}")


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


REINSTALL = "pip install -c constraints.txt -e ."
CHECKS = (
    Check("Python", check_python, ""),
    Check("torch", check_torch, "reinstall torch: pip install -c constraints.txt torch"),
    Check("triton", check_triton, REINSTALL),
    *(Check(name, partial(check_library, name), REINSTALL) for name in ("diffusers", "transformers", "deepspeed", "webdataset")),
    Check("other libraries", check_others, REINSTALL),
    *(Check(f"extra {extra}", partial(check_extra, extra), f"pip install 'prdp-fast[{extra}]'") for extra in EXTRAS),
    Check("torchvision", partial(check_guest, "torchvision", "torchvision"), "pip uninstall torchvision"),
    Check("open_clip", partial(check_guest, "open_clip", "open_clip_torch"), "pip uninstall open_clip_torch"),
    Check("name 'kernels'", check_kernels_name, "see what 'import kernels' finds"),
    Check("GPUs", check_gpus, "install a build of torch for this GPU and its driver (https://pytorch.org/get-started/locally)"),
    Check("C++ compiler", check_compiler, INSTALL_COMPILER, aside=True),
    Check("ninja", check_ninja, "pip install --force-reinstall ninja"),
    Check("shared memory", check_shared_memory, "see that /dev/shm is mounted"),
    Check("disk", check_disk, "see that the directory exists and can be written"),
    Check("hub", check_hub, REINSTALL),
    Check("embedded model", check_embedded_model, REINSTALL),
    Check("attention", check_attention, REINSTALL),
    Check("process group", check_process_group, REINSTALL),
    Check("Triton kernel", check_kernel, REINSTALL, aside=True),
)
