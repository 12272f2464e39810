"""Are the right libraries installed? Python, libraries, extras, their versions, and the import name `kernels`."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from prdp_fast.doctor import machine
from prdp_fast.doctor.checks import Outcome, fault, note, ok
from prdp_fast.doctor.requirements import requirements, requires_python

if TYPE_CHECKING:
    from packaging.requirements import Requirement

# The extras that a user may want, and what each is for.
EXTRAS = {
    "gpu": "one more attention kernel",
    "rewards": "the reward http and 'prdp serve-reward'",
    "lora": "recipes with model.lora",
    "data": "prompt sets from parquet files and the hub",
    "s3": "prompts from s3://",
    "gcs": "prompts from gs://",
    "wandb": "recipes with tracking.wandb",
    "mlflow": "recipes with tracking.mlflow",
    "prometheus": "recipes with tracking.prometheus",
}
ON_LINES_OF_THEIR_OWN = ("torch", "triton", "diffusers", "transformers", "deepspeed", "webdataset", "ninja")
# For builds of torch whose metadata names no Triton, which are those for CPUs.
TRITON_OF_TORCH = {"2.11": "3.6", "2.13": "3.7"}
WHY = {"deepspeed": " (earlier releases lose gradients when many backwards precede one step)"}


def check_python(runs: Path) -> Outcome:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    least = requires_python().removeprefix(">=")
    if sys.version_info[:2] < tuple(map(int, least.split("."))):
        return fault(f"{found}, expected at least {least}", "make the environment with a newer Python")
    return ok(found)


def installed(name: str) -> str | None:
    """Version of a distribution, as pip knows it; nothing is imported."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def judge(requirement: Requirement) -> Outcome:
    """A requirement against what is installed."""
    version, wanted = installed(requirement.name), f"'{requirement.name}{requirement.specifier}'"
    if version is None:
        return fault("not installed", f"pip install {wanted}")
    if not requirement.specifier.contains(version, prereleases=True):
        why = WHY.get(requirement.name, "")
        return fault(f"{version}, expected {requirement.specifier}{why}", f"pip install --upgrade {wanted}")
    return ok(version)


def check_library(name: str, runs: Path) -> Outcome:
    requirement = requirements().get(name)
    return judge(requirement) if requirement is not None else ok("not needed on this platform")


def check_torch(runs: Path) -> Outcome:
    outcome = check_library("torch", runs)
    if outcome.status != "ok":
        return outcome
    import torch

    return ok(f"{torch.__version__}, {machine.build_of_torch()}")


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
    """Every library of the package that has no line of its own."""
    found = []
    for name, requirement in requirements().items():
        if name in ON_LINES_OF_THEIR_OWN:
            continue
        outcome = judge(requirement)
        if outcome.status == "fault":
            return fault(f"{name} {outcome.found}", outcome.advice)
        found.append(f"{name} {outcome.found}")
    return ok(", ".join(found))


def check_extra(extra: str, runs: Path) -> Outcome:
    """A library that is missing is a note, since only some recipes need it. A version that is too old is a fault."""
    judged = {name: judge(requirement) for name, requirement in requirements(extra).items()}
    missing = [name for name in judged if installed(name) is None]
    for name, outcome in judged.items():
        if outcome.status == "fault" and name not in missing:
            return fault(f"{name} {outcome.found}", outcome.advice)
    if missing and extra == "gpu" and not machine.has_gpu():
        return ok(f"{', '.join(missing)} not installed, of use on a GPU only")
    if missing:
        return note(f"{', '.join(missing)} not installed", f"pip install 'prdp-fast[{extra}]' for {EXTRAS[extra]}")
    return ok(", ".join(f"{name} {outcome.found}" for name, outcome in judged.items()))


def check_guest(module: str, distribution: str, runs: Path) -> Outcome:
    """A library that nothing here uses. Others import it if it is there, so it must go with the torch that is there."""
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
