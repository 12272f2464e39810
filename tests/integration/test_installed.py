"""The package outside its repository: what a wheel holds, and every way to start training from a directory of one's own.

The wheel is installed into a folder that PYTHONPATH names, so that torch and the rest come from this environment. A recipe that
exists in the built copy only shows that a job runs the copy.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import PIPE

import pytest
from launching import free_port
from packaging.requirements import Requirement

from prdp_fast.doctor.requirements import read_setup

ROOT = Path(__file__).resolve().parents[2]
DEEPSPEED = [str(Path(sys.executable).with_name("deepspeed"))]
SMOKE = (ROOT / "configs" / "recipes" / "smoke.yaml").read_text()
ONE_EPOCH = SMOKE.replace("epochs: 3", "epochs: 1").replace("prompts: 16", "prompts: 0")


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A copy of what is packaged, since building leaves files behind, with one recipe more."""
    clone = tmp_path_factory.mktemp("clone")
    for folder in ("prdp_fast", "kernels", "configs"):
        shutil.copytree(ROOT / folder, clone / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, clone)
    (clone / "configs" / "recipes" / "one_epoch.yaml").write_text(ONE_EPOCH)
    return clone


@pytest.fixture(scope="module")
def wheel(clone, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    python("-m", "pip", "wheel", "-q", "--no-deps", "--no-index", "--no-build-isolation", "-w", folder, clone)
    (wheel,) = folder.iterdir()
    return wheel


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("installed") / "site-packages"
    python("-m", "pip", "install", "-q", "--no-deps", "--no-index", "--no-compile", "--target", folder, wheel)
    return folder


def run(command: list[str | Path], directory: Path, *path: Path) -> subprocess.CompletedProcess[str]:
    """A command of this environment in `directory`, where Python finds `path` first."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RANK", "WORLD_SIZE")}
    environment |= {
        "PYTHONPATH": os.pathsep.join(map(str, path)),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }
    process = subprocess.Popen(
        list(map(str, command)), cwd=directory, env=environment, stdout=PIPE, stderr=PIPE, text=True, start_new_session=True
    )
    try:
        out, err = process.communicate(timeout=500)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # a launcher's ranks too
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def python(*arguments: str | Path, directory: Path = ROOT.parent, path: tuple[Path, ...] = ()) -> str:
    done = run([sys.executable, *arguments], directory, *path)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# What is where


def test_a_wheel_holds_everything(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {f"prdp_fast/{file.relative_to(ROOT)}" for file in (ROOT / "configs").rglob("*") if file.is_file()}
    models = (file for name in ("tiny", "tiny_flow", "tiny_scorer") for file in (ROOT / "prdp_fast" / "world" / name).rglob("*"))
    expected |= {str(file.relative_to(ROOT)) for file in models if file.is_file()}
    for root, package in ((ROOT, "prdp_fast"), (ROOT / "kernels", "prdp_kernels")):
        expected |= {str(file.relative_to(root)) for file in (root / package).rglob("*.py")}
    assert "prdp_fast/configs/zero2.json" in expected and "prdp_fast/configs/recipes/tiny.yaml" in expected
    assert expected - names == set()
    assert {name.split("/")[0] for name in names} == {"prdp_fast", "prdp_kernels", "prdp_fast-0.1.0.dist-info"}


WHERE = """
import importlib.util, json
from prdp_fast.config.load import CONFIGS, find_recipe
from prdp_fast.doctor.requirements import requirements, requires_python
extras = ("", "gpu", "rewards", "lora", "data")
found = {extra: sorted(f"{each.name}{each.specifier}" for each in requirements(extra).values()) for extra in extras}
from prdp_fast.core import environment
before = importlib.util.find_spec("prdp_kernels") is not None
environment.prepare()
kernels = importlib.util.find_spec("prdp_kernels")
print(json.dumps([str(CONFIGS), str(find_recipe("one_epoch")), requires_python(), found, before, kernels and kernels.origin]))
"""


def expected_requirements() -> dict[str, list[str]]:
    """Of setup.py, on this platform, as text."""
    setup = read_setup(ROOT / "setup.py")
    lists = {"": setup.core} | {extra: setup.extras[extra] for extra in ("gpu", "rewards", "lora", "data")}
    here = {
        extra: [Requirement(text) for text in texts if Requirement(text).marker is None or Requirement(text).marker.evaluate()]
        for extra, texts in lists.items()
    }
    return {extra: sorted(f"{each.name}{each.specifier}" for each in listed) for extra, listed in here.items()}


def test_a_wheel_finds_its_parts(installed, tmp_path):
    """Also beside a folder `configs` that another distribution put into site-packages."""
    (installed / "configs" / "recipes").mkdir(parents=True, exist_ok=True)
    configs, recipe, versions, found, importable, kernels = json.loads(python("-c", WHERE, directory=tmp_path, path=(installed,)))
    assert Path(configs) == installed / "prdp_fast" / "configs" and Path(recipe) == Path(configs) / "recipes" / "one_epoch.yaml"
    assert importable and Path(kernels) == installed / "prdp_kernels" / "__init__.py"
    assert (versions, found) == (">=3.10", expected_requirements())


def test_an_editable_installation_uses_the_clone(clone, tmp_path):
    build = f"import os, setuptools.build_meta as build; os.chdir({str(clone)!r}); print(build.build_editable({str(tmp_path)!r}))"
    name = python("-c", build).splitlines()[-1]
    zipfile.ZipFile(tmp_path / name).extractall(tmp_path / "site")
    # Python reads .pth files in site folders only. -S leaves out those of this environment, and with them its editable packages.
    code = f"import site; site.addsitedir({str(tmp_path / 'site')!r})\n{WHERE}"
    configs, _, versions, found, importable, kernels = json.loads(
        python("-S", "-c", code, directory=tmp_path, path=(tmp_path / "site", Path(sysconfig.get_paths()["purelib"])))
    )
    assert Path(configs) == clone / "configs"
    assert importable and Path(kernels) == clone / "kernels" / "prdp_kernels" / "__init__.py"
    assert (versions, found) == (">=3.10", expected_requirements())


def test_a_clone_without_an_installation_finds_its_kernels(clone):
    """`python -m prdp_fast.cli` at the top of a clone."""
    site_packages = Path(sysconfig.get_paths()["purelib"])
    configs, _, _, found, importable, kernels = json.loads(python("-S", "-c", WHERE, directory=clone, path=(site_packages,)))
    assert not importable  # -S: no .pth file is read, so an editable installation in this environment is not seen
    assert Path(kernels) == clone / "kernels" / "prdp_kernels" / "__init__.py"
    assert Path(configs) == clone / "configs" and found == expected_requirements()
    code = "import sys; from prdp_fast import cli; from importlib.util import find_spec; print(find_spec('prdp_kernels').origin)"
    assert Path(python("-S", "-c", code, directory=clone, path=(site_packages,))) == Path(kernels)


# Every way to train


@pytest.mark.slow
def test_prdp_train_is_a_job_of_one_rank(installed, tmp_path):
    done = run([installed / "bin" / "prdp", "train", "--recipe", "one_epoch"], tmp_path, installed)
    assert done.returncode == 0, done.stderr
    check_run(done, tmp_path, ranks=1)


@pytest.mark.slow
@pytest.mark.distributed
def test_prdp_train_starts_several_ranks(installed, tmp_path):
    command = [installed / "bin" / "prdp", "train", "--num_gpus", "2", "--recipe", "one_epoch", "--seed", "5"]
    done = run(command, tmp_path, installed)
    assert done.returncode == 0, done.stderr
    check_run(done, tmp_path, ranks=2)


def check_run(done: subprocess.CompletedProcess[str], directory: Path, ranks: int) -> None:
    """A finished run in `runs/` of the current directory, whose path is the last line."""
    (run,) = (directory / "runs").iterdir()
    assert done.stdout.splitlines()[-1] == str(run) and run.name.startswith("one_epoch-seed")
    assert json.loads((run / "run.json").read_text())["world_size"] == ranks
    assert json.loads((run / "summary.json").read_text())["epochs"] == 1
    assert (run / "model" / "unet" / "diffusion_pytorch_model.safetensors").is_file()
    assert [path.name for path in directory.iterdir()] == ["runs"]


@pytest.mark.slow
def test_deepspeed_starts_training(installed, clone, tmp_path):
    """As a module of a wheel, and by its path in a clone. Both at once: most of each is imports on one core."""

    def dry_run(way: str, script: list[str | Path], *path: Path) -> subprocess.CompletedProcess[str]:
        launcher = [*DEEPSPEED, "--master_port", str(free_port()), "--log_level", "warning", *script]
        (tmp_path / way).mkdir()
        return run([*launcher, "--config", "zero2.json", "--recipe", "one_epoch", "--dry-run"], tmp_path / way, *path)

    with ThreadPoolExecutor() as pool:
        ways = {
            "wheel": pool.submit(dry_run, "wheel", ["--module", "prdp_fast.train"], installed),
            "clone": pool.submit(dry_run, "clone", [clone / "prdp_fast" / "train.py"]),
        }
    for way, future in ways.items():
        done = future.result()
        assert done.returncode == 0, (way, done.stderr)
        assert f'"output": "{tmp_path}/{way}/runs/one_epoch-seed' in done.stdout
        assert list((tmp_path / way).iterdir()) == []
