"""`prdp doctor`: it passes here, and every fault it names is found when it is made."""

from __future__ import annotations

import importlib
import json
import logging
import os
import resource
import runpy
import stat
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from packaging.requirements import Requirement

from prdp_fast import cli, doctor
from prdp_fast.core.errors import UserError
from prdp_fast.doctor import Check, Outcome, engine, installation, machine, requirements
from prdp_fast.doctor.checks import fault, note, ok

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
RUNS = Path("runs")


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """As in an activated environment, wherever pytest was started, and without a launcher."""
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    for name in ("RANK", "TRITON_INTERPRET"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def on_a_cpu(monkeypatch):
    monkeypatch.setattr(machine, "has_gpu", lambda: False)
    engine.embedded_model.cache_clear()
    yield
    engine.embedded_model.cache_clear()


def prdp_doctor(*arguments: str, path: str = f"{ROOT}:{ROOT / 'kernels'}", **options) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "prdp_fast.cli", "doctor", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, **options)


def versions(monkeypatch, **changed: str | None) -> None:
    """Pretend that these distributions have these versions; None: that they are not installed."""
    real = installation.installed
    monkeypatch.setattr(installation, "installed", lambda name: changed[name] if name in changed else real(name))


def pins(monkeypatch, **pinned: str | None) -> None:
    """Pretend that these distributions ask for exactly this version of what depends on them or they depend on."""
    monkeypatch.setattr(installation, "pinned", lambda distribution, name: pinned.get(distribution))


# The whole


@pytest.mark.slow
def test_it_passes_here(tmp_path):
    done = prdp_doctor("--json", "--runs", str(tmp_path / "new" / "runs"), cwd=tmp_path)
    report = json.loads(done.stdout)
    assert done.returncode == 0, report
    assert done.stderr == ""
    assert [check["check"] for check in report["checks"]] == [check.name for check in doctor.CHECKS]
    assert report["faults"] == [] and {check["status"] for check in report["checks"]} <= {"ok", "note"}
    assert report["notes"] == [check["check"] for check in report["checks"] if check["status"] == "note"]
    found = {check["check"]: check["found"] for check in report["checks"]}
    assert found["Triton kernel"].startswith("denoise_step equals its reference")
    assert "is finite and decodes to 32 x 32 pixels" in found["embedded model"]
    assert "sdpa, math" in found["attention"] and "one process joins and reduces" in found["process group"]
    assert "with OpenMP and Python's headers" in found["C++ compiler"]
    assert str(tmp_path / "new" / "runs") in found["disk"]
    assert list(tmp_path.iterdir()) == []  # it leaves nothing behind


def test_a_torch_that_cannot_be_imported_is_a_fault_and_no_traceback(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object file')")
    done = prdp_doctor(path=f"{tmp_path}:{ROOT}:{ROOT / 'kernels'}", cwd=tmp_path)
    *lines, last = done.stdout.splitlines()
    assert done.returncode == 1 and done.stderr == "" and "Traceback" not in done.stdout
    assert len(lines) == len(doctor.CHECKS)
    broken = [line for line in lines if line.startswith("fault")]
    assert all("ImportError: libcudart.so.13: cannot open shared object file; " in line for line in broken)
    assert {"torch", "GPUs", "Triton kernel", "embedded model"} <= set(last.replace("(", ", ").replace(")", ", ").split(", "))
    assert last.endswith("mend these first")


def test_only_the_standard_library_is_imported_before_a_check_runs():
    code = (
        "import sys; before = set(sys.modules); import prdp_fast.commands.doctor\n"
        "print({name.split('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "{'prdp_fast'}", done.stderr


# Where the requirements come from


def test_setup_is_read_as_pip_reads_it(monkeypatch):
    """What `read_setup` finds without running setup.py is what running it gives."""
    import setuptools

    given: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", given.update)
    monkeypatch.chdir(ROOT)
    runpy.run_path(str(ROOT / "setup.py"))
    read = requirements.read_setup(ROOT / "setup.py")
    assert read == (given["python_requires"], given["install_requires"], given["extras_require"])
    assert "packaging" in {Requirement(text).name for text in read.core}  # the checks judge versions with it
    assert installation.EXTRAS.keys() == read.extras.keys() - {"dev", "docs"}


def as_texts(extra: str = "") -> dict[str, str]:
    return {name: f"{name}{requirement.specifier}" for name, requirement in requirements.requirements(extra).items()}


SETUP = """
from setuptools import setup
CORE = ["torch>=2.99", "deepspeed>=1; python_version >= '3'", "deepspeed>=0; python_version < '3'"]
GPU = ["xformers>=7"]
setup(name="prdp-fast", python_requires=">=3.5", install_requires=CORE, extras_require={"gpu": GPU, "dev": ["a", *GPU]})
"""
METADATA = """Metadata-Version: 2.4
Name: prdp-fast
Version: 0.1.0
Requires-Python: >=3.4
Requires-Dist: torch>=2.88
Requires-Dist: deepspeed>=1; python_version >= "3"
Requires-Dist: deepspeed>=0; python_version < "3"
Provides-Extra: gpu
Requires-Dist: xformers>=6; extra == "gpu"
Requires-Dist: winformers>=6; platform_system == "Plan 9" and extra == "gpu"
Provides-Extra: dev
Requires-Dist: peft>=1; extra == "dev"
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder where the package pretends to lie, with installed metadata beside it."""
    (tmp_path / "prdp_fast-0.1.0.dist-info").mkdir()
    (tmp_path / "prdp_fast-0.1.0.dist-info" / "METADATA").write_text(METADATA)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(requirements, "ROOT", tmp_path)
    return tmp_path


def test_a_clone_asks_for_what_its_setup_says(place):
    (place / "setup.py").write_text(SETUP)
    (place / "kernels" / "prdp_kernels").mkdir(parents=True)
    assert requirements.requires_python() == ">=3.5"
    assert as_texts() == {"torch": "torch>=2.99", "deepspeed": "deepspeed>=1"}
    assert as_texts("gpu") == {"xformers": "xformers>=7"}
    assert as_texts("dev") == {"a": "a", "xformers": "xformers>=7"}
    status, line = run("torch")
    assert status == "fault" and line.endswith("expected >=2.99; pip install --upgrade 'torch>=2.99'")


@pytest.mark.parametrize("stray", [False, True], ids=["", "a setup.py of others in site-packages"])
def test_an_installed_package_asks_for_what_its_metadata_says(place, stray):
    if stray:
        (place / "setup.py").write_text("raise SystemExit")
    assert requirements.requires_python() == ">=3.4"
    assert as_texts() == {"torch": "torch>=2.88", "deepspeed": "deepspeed>=1"}
    assert as_texts("gpu") == {"xformers": "xformers>=6"}
    status, line = run("torch")
    assert status == "fault" and line.endswith("expected >=2.88; pip install --upgrade 'torch>=2.88'")


def test_without_packaging_no_version_is_judged(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "packaging"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "packaging", None)
    assert run("Python")[0] == "ok"
    for name in ("torch", "other libraries", "extra lora"):
        assert run(name) == ("fault", "packaging is not installed, so no version can be judged; pip install packaging")


# The lines


def pretend(monkeypatch, *checks: Check) -> None:
    monkeypatch.setattr(doctor, "CHECKS", checks)


def test_lines_are_aligned_and_end_with_a_summary(monkeypatch, capsys):
    pretend(
        monkeypatch,
        Check("first", lambda runs: ok("1.0"), ""),
        Check("the second", lambda runs: note("none", "have one"), ""),
        Check("third", lambda runs: fault("broken", "mend it"), ""),
    )
    assert cli.main(["doctor"]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "ok     first       1.0",
        "note   the second  none; have one",
        "fault  third       broken; mend it",
        "3 checks in 0 s: 1 fault (third), 1 note (the second); mend these first",
    ]
    pretend(monkeypatch, Check("first", lambda runs: ok("1.0"), ""))
    assert cli.main(["doctor"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "1 checks in 0 s: no fault, no note; ready for a job"


def test_json(monkeypatch, capsys):
    pretend(
        monkeypatch,
        Check("good", lambda runs: ok(str(runs)), ""),
        Check("bad", lambda runs: fault("broken", "mend it"), "", aside=True),
    )
    assert cli.main(["doctor", "--json", "--runs", "elsewhere"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report.pop("seconds") >= 0
    assert report == {
        "checks": [
            {"check": "good", "status": "ok", "found": "elsewhere", "advice": ""},
            {"check": "bad", "status": "fault", "found": "broken", "advice": "mend it"},
        ],
        "faults": ["bad"],
        "notes": [],
    }


@pytest.mark.parametrize("aside", [False, True])
@pytest.mark.parametrize(
    ("error", "found", "advice"),
    [
        (ValueError("one\ntwo"), "ValueError: one", "mend it"),
        (SystemExit(3), "SystemExit: 3", "mend it"),
        (AssertionError(), "AssertionError", "mend it"),
        (UserError("this is wrong; do that"), "this is wrong; do that", ""),
    ],
)
def test_a_check_that_raises_is_a_fault(error, found, advice, aside):
    def check(runs: Path) -> Outcome:
        raise error

    checks = [Check("it", check, "mend it", aside), Check("next", lambda runs: ok("fine"), "")]
    assert list(doctor.examine(RUNS, checks)) == [("it", "fault", found, advice), ("next", "ok", "fine", "")]


def test_an_interrupt_is_none():
    def check(runs: Path) -> Outcome:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(doctor.examine(RUNS, [Check("it", check, "")]))


def test_what_libraries_say_is_no_line(monkeypatch, capfd):
    logger = logging.getLogger("library")
    handler = logging.StreamHandler(sys.stderr)  # the one that is there before a check

    def check(runs: Path) -> Outcome:
        print("hello")
        print("hello", file=sys.stderr)
        warnings.warn("hello", stacklevel=1)
        logger.error("hello")
        return ok("quiet")

    pretend(monkeypatch, Check("it", check, ""))
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert cli.main(["doctor"]) == 0
    finally:
        logger.removeHandler(handler)
    out, err = capfd.readouterr()
    assert "hello" not in out and err == ""


# The installation


class Wrong(NamedTuple):
    check: str
    versions: dict[str, str | None]
    status: str
    line: str


WRONG = [
    Wrong("torch", {"torch": "2.9.1+cpu"}, "fault", "2.9.1+cpu, expected >=2.10; pip install --upgrade 'torch>=2.10'"),
    Wrong("torch", {"torch": None}, "fault", "not installed; pip install 'torch>=2.10'"),
    Wrong(
        "deepspeed",
        {"deepspeed": "0.19.7"},
        "fault",
        "0.19.7, expected >=0.19.8 (earlier releases lose gradients when many backwards precede one step); "
        "pip install --upgrade 'deepspeed>=0.19.8'",
    ),
    Wrong("transformers", {"transformers": "4.57.1"}, "fault", "4.57.1, expected >=5; pip install --upgrade 'transformers>=5'"),
    Wrong("webdataset", {"webdataset": None}, "fault", "not installed; pip install 'webdataset>=1.0'"),
    Wrong("other libraries", {"pydantic": "1.10"}, "fault", "pydantic 1.10, expected >=2; pip install --upgrade 'pydantic>=2'"),
    Wrong("extra lora", {"peft": None}, "note", "peft not installed; pip install 'prdp-fast[lora]' for recipes with model.lora"),
    Wrong("extra lora", {"peft": "0.17.1"}, "fault", "peft 0.17.1, expected >=0.18; pip install --upgrade 'peft>=0.18'"),
    Wrong(
        "extra rewards",
        {"tenacity": None, "uvicorn": None},
        "note",
        "tenacity, uvicorn not installed; pip install 'prdp-fast[rewards]' for the reward http and 'prdp serve-reward'",
    ),
    Wrong("extra data", {"datasets": None, "pyarrow": "9.0"}, "fault", "pyarrow 9.0, expected >=15"),
]


def run(name: str, runs: Path = RUNS) -> tuple[str, str]:
    """(status, line) of a check, as the report has it."""
    check = next(check for check in doctor.CHECKS if check.name == name)
    (finding,) = doctor.examine(runs, [check])
    return finding.status, str(finding)


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: f"{wrong.check}-{'-'.join(map(str, wrong.versions.values()))}")
def test_a_wrong_version(monkeypatch, wrong):
    assert run(wrong.check)[0] == "ok"
    versions(monkeypatch, **wrong.versions)
    status, line = run(wrong.check)
    assert status == wrong.status and line.startswith(wrong.line)


def test_xformers_is_of_use_on_a_gpu_only(monkeypatch):
    versions(monkeypatch, xformers=None)
    monkeypatch.setattr(machine, "has_gpu", lambda: False)
    assert run("extra gpu") == ("ok", "xformers not installed, of use on a GPU only")
    monkeypatch.setattr(machine, "has_gpu", lambda: True)
    assert run("extra gpu") == ("note", "xformers not installed; pip install 'prdp-fast[gpu]' for one more attention kernel")


def test_a_python_that_is_too_old(monkeypatch):
    assert run("Python")[0] == "ok"
    monkeypatch.setattr(installation, "requires_python", lambda: ">=3.99")
    status, line = run("Python")
    assert status == "fault" and "expected at least 3.99; make the environment with a newer Python" in line


def test_a_triton_that_does_not_go_with_torch(monkeypatch):
    """torch's CUDA builds name theirs; of CPU builds the pair is known from elsewhere, and another may do."""
    pins(monkeypatch, torch="3.7.1")
    versions(monkeypatch, torch="2.13.0+cu130", triton="3.6.0")
    assert run("triton") == ("fault", "3.6.0, but torch 2.13.0+cu130 takes 3.7.1 alone; pip install triton==3.7.1")
    versions(monkeypatch, triton="3.7.1")
    assert run("triton") == ("ok", "3.7.1")
    pins(monkeypatch)
    versions(monkeypatch, torch="2.13.0+cpu", triton="3.6.0")
    assert run("triton") == ("note", "3.6.0, but torch 2.13.0+cpu goes with 3.7; pip install 'triton==3.7.*'")
    versions(monkeypatch, torch="2.12.0+cpu", triton="3.6.0")
    assert run("triton") == ("ok", "3.6.0")
    versions(monkeypatch, triton=None)
    assert run("triton") == ("fault", "not installed; pip install 'triton>=3.6'")


def test_what_a_distribution_pins(monkeypatch):
    asked = {
        "cuda": ["filelock", 'triton==3.7.1; platform_system == "Linux"'],
        "other": ['triton==3.7.1; platform_system == "Plan 9"'],
        "extra": ['triton==3.7.1; extra == "fast"'],
        "open": ["triton>=3.6"],
        "bare": ["triton"],
        "none": None,
    }
    monkeypatch.setattr(installation.importlib.metadata, "requires", asked.get)
    assert {name: installation.pinned(name, "triton") for name in asked} == dict.fromkeys(asked) | {"cuda": "3.7.1"}


def test_guests_that_do_not_go_with_torch(monkeypatch, tmp_path):
    versions(monkeypatch, torchvision="0.27.0+cpu", open_clip_torch="3.2.0", torch="2.13.0+cpu")
    pins(monkeypatch, torchvision="2.12.0")
    assert run("torchvision") == ("fault", "0.27.0+cpu takes torch 2.12.0, here is 2.13.0+cpu; pip uninstall torchvision")
    # A pair by its numbers that was built for another torch fails when it is imported.
    pins(monkeypatch, torchvision="2.13.0")
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    (tmp_path / "open_clip.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert run("torchvision") == (
        "fault",
        "RuntimeError: operator torchvision::nms does not exist; pip uninstall torchvision",
    )
    assert run("open_clip") == ("ok", "3.2.0, goes with torch 2.13.0+cpu")


def test_a_package_that_takes_the_name_kernels(monkeypatch, tmp_path):
    assert run("name 'kernels'") == ("ok", "free")  # this repository's folder is on the path, and no package
    monkeypatch.delitem(sys.modules, "kernels", raising=False)
    (tmp_path / "kernels").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert run("name 'kernels'") == ("ok", "free")
    (tmp_path / "kernels" / "__init__.py").write_text("")
    importlib.invalidate_caches()
    status, line = run("name 'kernels'")
    assert status == "fault" and line.startswith(f"'import kernels' finds {tmp_path / 'kernels' / '__init__.py'}, which")
    assert line.endswith(f"rename it, or take {tmp_path} off Python's path")
    # Hugging Face's own is known by its metadata, and hidden by another that comes first.
    (tmp_path / "kernels-0.15.0.dist-info").mkdir()
    (tmp_path / "kernels-0.15.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.15.0\n")
    importlib.invalidate_caches()
    assert run("name 'kernels'") == ("ok", "Hugging Face's kernels 0.15.0")
    (tmp_path / "first" / "kernels").mkdir(parents=True)
    (tmp_path / "first" / "kernels" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path / "first"))
    assert run("name 'kernels'")[0] == "fault"


# The machine


@pytest.fixture
def gpus(monkeypatch):
    """Gives this machine GPUs, each (name, capability, free bytes, total bytes)."""
    import torch

    def have(*each: tuple[str, tuple[int, int], int, int]) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(each))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(each))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: each[index][0])
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: each[index][1])
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: each[index][2:])
        monkeypatch.setattr(machine, "multiplies", lambda index, dtype: True)
        monkeypatch.setattr(machine, "nvidia_smi", lambda *arguments: ["580.95.05"] if "-L" not in arguments else [])

    return have


GIB = 2**30


def test_gpus(gpus, monkeypatch):
    gpus(("H100", (9, 0), 79 * GIB, 80 * GIB), ("H100", (9, 0), 78 * GIB, 80 * GIB))
    assert run("GPUs") == ("ok", "2 x H100 (sm_90, bf16, 83.8 GB of 85.9 GB free), driver 580.95.05")
    gpus(("H100", (9, 0), 79 * GIB, 80 * GIB), ("H100", (9, 0), 30 * GIB, 80 * GIB))
    status, line = run("GPUs")
    assert (
        status == "note" and "32.2 GB of 85.9 GB free" in line and line.endswith("another process holds the rest: see nvidia-smi")
    )
    gpus(("T4", (7, 5), 15 * GIB, 15 * GIB))
    status, line = run("GPUs")
    assert status == "note" and "1 x T4 (sm_75, no bf16" in line and 'enable "fp16" in the DeepSpeed file' in line
    asked = []
    monkeypatch.setattr(machine, "multiplies", lambda index, dtype: asked.append((index, dtype)))
    assert run("GPUs")[0] == "fault" and asked == [(0, "float16")]


def test_gpus_that_torch_does_not_see(gpus, monkeypatch):
    gpus()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert run("GPUs") == ("note", "none: jobs run on the CPU, in float32")
    monkeypatch.setattr(machine, "nvidia_smi", lambda *arguments: ["GPU 0: H100 (UUID: GPU-1)", "GPU 1: H100 (UUID: GPU-2)"])
    status, line = run("GPUs")
    assert status == "fault" and line.startswith("nvidia-smi lists 2, torch ") and "install a CUDA build of torch" in line
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert run("GPUs") == ("note", "none: CUDA_VISIBLE_DEVICES is ''; unset it to use this machine's GPUs")


def program(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_nvidia_smi(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.nvidia_smi("-L") == []
    program(tmp_path / "nvidia-smi", 'echo "GPU 0: $1"')
    assert machine.nvidia_smi("-L") == ["GPU 0: -L"]
    program(tmp_path / "nvidia-smi", 'echo "no driver"; exit 9')
    assert machine.nvidia_smi("-L") == []


def test_a_missing_compiler(monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    assert run("C++ compiler")[0] == "ok"
    monkeypatch.setenv("PATH", str(tmp_path))
    status, line = run("C++ compiler")
    assert status == "fault" and line.startswith("none on PATH; install a C++ compiler") and "apt install g++ python3-dev" in line
    monkeypatch.setenv("CXX", "icpx")
    status, line = run("C++ compiler")
    assert status == "fault" and line.startswith("CXX is 'icpx', which is no program; ")


def test_a_compiler_that_does_not_work(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", str(tmp_path / "c++"))
    program(tmp_path / "c++", 'echo "answer.cpp:2:10: fatal error: Python.h: No such file or directory" >&2; exit 1')
    status, line = run("C++ compiler")
    assert status == "fault" and "does not compile: answer.cpp:2:10: fatal error: Python.h: No such file" in line
    assert line.endswith("apt install g++ python3-dev")
    program(tmp_path / "c++", "exit 0")  # and nothing is there
    status, line = run("C++ compiler")
    assert status == "fault" and "answer.so" in line and line.endswith("apt install g++ python3-dev")
    # One that leaves something out.
    monkeypatch.delenv("CXX")
    monkeypatch.setattr(machine, "PROGRAM", machine.PROGRAM.replace("return sum", "return sum - 1"))
    assert "compiles wrongly: 42 became 41" in run("C++ compiler")[1]


def test_a_missing_ninja(monkeypatch, tmp_path):
    assert run("ninja")[0] == "ok"
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert run("ninja") == ("fault", "not on PATH; pip install ninja")
    program(tmp_path / "ninja", "echo 1.13")
    assert run("ninja") == ("fault", f"in {tmp_path}, which is not on PATH; source {tmp_path / 'activate'}")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run("ninja") == ("ok", f"{tmp_path / 'ninja'} 1.13")
    program(tmp_path / "ninja", "exit 1")
    status, line = run("ninja")
    assert status == "fault" and line.endswith("pip install --force-reinstall ninja")


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_little_room(monkeypatch, tmp_path):
    def room(free: float) -> None:
        monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: Usage(int(64e9), 0, int(free)))

    room(40e9)
    assert run("shared memory") == ("ok", "40.0 GB of 64.0 GB free in /dev/shm")
    assert run("disk", tmp_path) == ("ok", f"40.0 GB free for {tmp_path}")
    room(64e6)
    status, line = run("shared memory")
    assert status == "note" and line.startswith("0.1 GB of") and "start a container with --shm-size=8g" in line
    assert run("disk", tmp_path) == ("fault", f"0.1 GB free for {tmp_path}; make room, or run jobs with --output DIR")
    room(12e9)
    status, line = run("disk", tmp_path)
    assert status == "note" and "a checkpoint of SD v1.4 takes 10 GB" in line
    assert machine.check_shared_memory(RUNS, str(tmp_path / "none")).found == f"no {tmp_path / 'none'} on this system"


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    status, line = run("disk", tmp_path / "file" / "runs")
    assert status == "fault" and line.startswith(f"{tmp_path / 'file'} cannot be written (Not a directory); run jobs elsewhere")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))  # files may be made and not filled, as where a quota is used up
    try:
        status, line = run("disk", tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == "fault" and line.startswith(f"{tmp_path} cannot be written (File too large)")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_hub(monkeypatch, tmp_path):
    from huggingface_hub import constants

    (tmp_path / "models--a--b").mkdir()
    (tmp_path / "datasets--a--b").mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert run("hub") == (
        "note",
        f"{tmp_path} holds 1 models, HF_HUB_OFFLINE is set; unset it to load models that are not in the cache",
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert run("hub") == ("ok", f"{tmp_path} holds 1 models, HF_HUB_OFFLINE is not set")
    monkeypatch.setattr(machine.os, "access", lambda path, mode: False)  # root may write anywhere
    assert run("hub") == ("fault", f"{tmp_path} holds 1 models and cannot be written; set HF_HOME to a folder that can")


# The engine


def test_another_python(monkeypatch):
    monkeypatch.setenv("PRDP_TEST", "here")
    engine.run_python("import os, prdp_fast, prdp_kernels; assert os.environ['PRDP_TEST'] == 'here'", 60)
    engine.run_python("import os; assert 'PRDP_TEST' not in os.environ and os.environ['A'] == '1'", 60, PRDP_TEST=None, A="1")
    for code, message in [
        ("print('hello'); raise ValueError('not so')", "^ValueError: not so$"),
        ("raise SystemExit(4)", "^exit status 4$"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "^its process was ended by SIGSEGV$"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            engine.run_python(code, 60)
    with pytest.raises(RuntimeError, match=r"^not done after 0\.5 s$"):
        engine.run_python("import time; time.sleep(60)", 0.5)


def test_a_kernel_that_fails(monkeypatch):
    monkeypatch.setattr(machine, "has_gpu", lambda: False)
    code = []

    def fail(text: str, timeout: float, **variables: Any) -> None:
        code.append((text, variables))
        raise RuntimeError("ValueError: off by 1.0e+00, expected at most 1e-04")

    monkeypatch.setattr(engine, "run_python", fail)
    assert run("Triton kernel") == (
        "fault",
        "denoise_step fails in Triton's interpreter: ValueError: off by 1.0e+00, expected at most 1e-04; "
        "set kernels to torch in the recipe, or mend triton",
    )
    monkeypatch.setattr(machine, "has_gpu", lambda: True)
    assert "fails on the GPU" in run("Triton kernel")[1]
    assert [variables for _, variables in code] == [{"TRITON_INTERPRET": "1"}, {"TRITON_INTERPRET": None}]
    assert "compare_kernel('cpu')" in code[0][0] and "compare_kernel('cuda')" in code[1][0]
    versions(monkeypatch, triton=None)
    assert run("Triton kernel") == ("note", "no Triton: operators run as plain torch")


def test_a_kernel_that_disagrees(monkeypatch):
    import prdp_kernels

    real = prdp_kernels.denoise_step

    def step(*arguments: Any, backend: str, **named: Any) -> Any:
        previous, log_prob = real(*arguments, backend="torch", **named)
        return previous, log_prob + (shift if backend == "triton" else 0)

    monkeypatch.setattr(prdp_kernels, "denoise_step", step)
    shift = 1e-5
    engine.compare_kernel("cpu")
    for shift in (1e-2, float("nan")):  # noqa: B007
        with pytest.raises(ValueError, match="off by"):
            engine.compare_kernel("cpu")


def test_a_step_that_is_not_finite(monkeypatch, on_a_cpu):
    from prdp_fast.sampling.policy import Policy

    real = Policy.sample_step
    monkeypatch.setattr(Policy, "sample_step", lambda *arguments: tuple(float("nan") * x for x in real(*arguments)))
    status, line = run("embedded model")
    assert status == "fault" and line.startswith("a U-Net step on ") and "is not finite" in line


def test_attention_that_does_not_work(monkeypatch, on_a_cpu):
    from prdp_fast.acceleration import attention

    real = attention.set_attention

    def refuse(denoiser: Any, name: str) -> None:
        if name == refused:
            raise RuntimeError("no kernel image is available")
        real(denoiser, name)

    monkeypatch.setattr(attention, "set_attention", refuse)
    refused = "math"
    status, line = run("attention")
    assert status == "ok" and line.startswith("sdpa work in float32, no math (RuntimeError: no kernel image is available)")
    refused = "sdpa"
    assert run("attention") == ("fault", f"RuntimeError: no kernel image is available; {doctor.REINSTALL}")


def test_a_group_is_left_alone_under_a_launcher(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    assert run("process group") == ("note", "not tried: RANK is set, by a launcher it seems; run 'prdp doctor' by itself")


def test_a_group_that_adds_up_wrongly(monkeypatch):
    import torch.distributed as dist

    monkeypatch.setenv("LOCAL_RANK", "0")  # set by the start of a group, and taken back by this
    monkeypatch.setattr("prdp_fast.core.distributed.all_reduce", lambda values: [0.0])
    status, line = run("process group")
    assert status == "fault" and line.endswith("adds up one rank's 42 to 0; reinstall torch")
    assert not dist.is_initialized()
