"""The floors of the house: who may import whom. Read from the source with `ast`, so that an import inside a function counts too.

A unit is a module or folder directly under `prdp_fast/`. Arrows go down, never up or sideways; a folder's own files may import
each other, but not in a circle. A new unit needs a place in FLOORS, and gets one here, on purpose, by hand.
"""

from __future__ import annotations

import ast
import itertools
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]


# From the ground up. Units of a floor never import each other: they meet in the records they pass.
FLOORS = (
    frozenset({"core"}),
    frozenset({"config", "world"}),
    frozenset({"prompts", "models", "acceleration", "sampling", "rewards", "objectives"}),
    frozenset({"planning", "evaluation", "reporting", "doctor"}),
    frozenset({"training", "studies"}),
    frozenset({"commands", "cli", "train"}),
)
ROOT_MODULES = {"cli", "train"}
# Libraries with one door: a unit, or a file of it. A key matches a module and everything under it.
DOORS = {
    "deepspeed": {"training/engine.py"},
    "diffusers": {"models", "acceleration", "sampling", "world"},
    "tensorboard": {"training/trackers/tensorboard.py"},
    "tensorboardX": {"training/trackers/tensorboard.py"},
    "torch.utils.tensorboard": {"training/trackers/tensorboard.py"},
    "wandb": {"training/trackers/wandb.py"},
    "mlflow": {"training/trackers/mlflow.py"},
    "prometheus_client": {"training/trackers/prometheus.py"},
    "argparse": {"commands", "cli", "train", "world/make_model.py", "world/make_flow_model.py", "world/make_scorer.py"},
}
# Imported by a reward on first use only: a recipe that does not name the reward runs without the library.
REWARD_LIBRARIES_AT_THE_TOP = {"torch", "numpy", "PIL", "prdp_fast", "prdp_kernels"}
KERNELS_MAY_IMPORT = {"torch", "triton", "prdp_kernels"}


class Import(NamedTuple):
    module: str  # absolute; of other libraries with the imported name at the end
    line: int
    at_the_top: bool  # runs when the file is imported


def imports_of(path: Path, package: str, is_module) -> Iterator[Import]:
    """Every import in a file, also those in functions, under TYPE_CHECKING, and `import_module("...")`.

    package: the dotted package that relative imports start from. is_module: tells whether `package.name` is a module.
    """

    def walk(node: ast.AST, at_the_top: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            if isinstance(child, ast.Import):
                yield from (Import(alias.name, child.lineno, at_the_top) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    above = package.split(".")[: len(package.split(".")) - child.level + 1]
                    base = ".".join(above + ([base] if base else []))
                for alias in child.names:
                    deeper = f"{base}.{alias.name}"
                    ours = base.split(".")[0] in ("prdp_fast", "prdp_kernels")
                    yield Import(base if ours and not is_module(deeper) else deeper, child.lineno, at_the_top)
            elif isinstance(child, ast.Call):
                name = child.func.attr if isinstance(child.func, ast.Attribute) else getattr(child.func, "id", "")
                first = child.args[0] if child.args else None
                if name in ("import_module", "__import__") and isinstance(first, ast.Constant) and isinstance(first.value, str):
                    yield Import(first.value, child.lineno, at_the_top)
            yield from walk(child, at_the_top and not inside)

    yield from walk(ast.parse(path.read_text(encoding="utf-8")), True)


def files_of(base: Path, package: str) -> Iterator[tuple[Path, str, str]]:
    """(file, the package it is in, its unit) for every Python file of a package under `base`; the unit of `__init__` is ""."""
    for path in sorted((base / package).rglob("*.py")):
        inner = path.relative_to(base / package)
        yield (
            path,
            ".".join((package, *inner.parts[:-1])),
            "" if inner.parts == ("__init__.py",) else inner.parts[0].removesuffix(".py"),
        )


def module_of(path: Path, root: Path) -> str:
    """Dotted; of an `__init__.py` the package."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def floor_of(unit: str) -> int | None:
    return next((number for number, units in enumerate(FLOORS) if unit in units), None)


def arrow_fault(source: str, target: str) -> str | None:
    """Why unit `source` may not import unit `target`; None if it may."""
    if source == target or target == "":  # "" is the package itself, which is empty
        return None
    if source == "":
        return "prdp_fast/__init__.py runs before everything and imports nothing"
    low, high = floor_of(target), floor_of(source)
    if low is None or high is None:
        return f"{target if low is None else source} has no floor yet; give it one in FLOORS"
    if low > high:
        return "the arrow goes up"
    if low == high:
        return "units of one floor never import each other; they meet in the records they pass"
    return None


def faults_in(root: Path) -> list[str]:
    """Every broken rule of the house under `root`, one line each."""
    found = []
    arrows: dict[str, set[str]] = {}  # between units
    inner: dict[str, set[str]] = {}  # between files

    def is_module(name: str) -> bool:
        top, *rest = name.split(".")
        base = {"prdp_fast": root, "prdp_kernels": root / "kernels"}.get(top)
        return base is not None and (base.joinpath(top, *rest).is_dir() or base.joinpath(top, *rest).with_suffix(".py").is_file())

    for path, package, unit in files_of(root, "prdp_fast"):
        name = path.relative_to(root / "prdp_fast").as_posix()
        if unit and floor_of(unit) is None:
            found.append(f"{path.relative_to(root)}: {unit} has no floor yet; give it one in FLOORS")
            continue
        for module, line, at_the_top in imports_of(path, package, is_module):
            where = f"{path.relative_to(root)}:{line}: imports {module}"
            top, *rest = module.split(".")
            if top == "prdp_fast":
                target = rest[0] if rest else ""
                arrows.setdefault(unit, set()).add(target)
                if at_the_top:
                    inner.setdefault(module_of(path, root), set()).add(module)
                fault = arrow_fault(unit, target)
                if fault:
                    found.append(f"{where}: {fault}")
            for library, doors in DOORS.items():
                if (module == library or module.startswith(f"{library}.")) and unit not in doors and name not in doors:
                    found.append(f"{where}: {library} appears in {sorted(doors)} alone")
            if unit == "rewards" and at_the_top and top not in REWARD_LIBRARIES_AT_THE_TOP | sys.stdlib_module_names:
                found.append(f"{where}: a reward imports its library on first use, inside a function")
    for what, graph in (("units", arrows), ("files", inner)):
        try:
            TopologicalSorter(
                {one: {other for other in targets if other not in ("", one)} for one, targets in graph.items()}
            ).prepare()
        except CycleError as error:
            found.append(f"prdp_fast: {what} import each other in a circle: {' > '.join(error.args[1])}")
    modules = {path.stem for path in (root / "prdp_fast").glob("*.py")} - {"__init__"}
    if not modules <= ROOT_MODULES:
        found.append(f"prdp_fast: {sorted(modules - ROOT_MODULES)} lie beside the rooms; put them into one")

    for path, package, _ in files_of(root / "kernels", "prdp_kernels"):
        for module, line, _ in imports_of(path, package, is_module):
            if module.split(".")[0] not in KERNELS_MAY_IMPORT | sys.stdlib_module_names:
                found.append(f"{path.relative_to(root)}:{line}: imports {module}: kernels need torch and triton only")
    if (root / "kernels" / "__init__.py").exists() or (root / "kernels.py").exists():
        found.append("kernels/ must not be a package: that import name belongs to Hugging Face's kernel client")
    return found


def test_imports_go_down_only():
    faults = faults_in(ROOT)
    assert not faults, "\n".join(faults)


def test_the_walk_sees_the_house():
    units = {unit for _, _, unit in files_of(ROOT, "prdp_fast")}
    assert units >= {"core", "sampling", "rewards", "training", "reporting", "cli"}
    assert {unit for units in FLOORS for unit in units} == units - {""}, "a floor names a unit that is not there"
    assert len(list(files_of(ROOT / "kernels", "prdp_kernels"))) > 4


SOUND = {
    "prdp_fast/__init__.py": "",
    "prdp_fast/core/records.py": "import torch",
    "prdp_fast/core/errors.py": "",
    "prdp_fast/training/engine.py": "import deepspeed\nfrom prdp_fast.core.errors import UserError",
    "prdp_fast/training/update.py": "from prdp_fast.training import engine\nfrom prdp_fast.sampling.policy import Policy",
    "prdp_fast/sampling/__init__.py": "",
    "prdp_fast/sampling/policy.py": "import diffusers\nfrom . import table\nfrom ..core.records import Y\nimport prdp_kernels",
    "prdp_fast/sampling/table.py": "",
    "prdp_fast/rewards/__init__.py": "",
    "prdp_fast/rewards/clip.py": "import torch\ndef load():\n    import transformers",
    "prdp_fast/world/make_model.py": "import argparse, diffusers\nfrom prdp_fast.core import errors",
    "prdp_fast/train.py": "import argparse\ndef main():\n    from prdp_fast.training import update",
    "prdp_fast/training/trackers/tensorboard.py": "def f():\n    from torch.utils.tensorboard import SummaryWriter",
    "kernels/prdp_kernels/__init__.py": "import math\nimport torch\nfrom prdp_kernels import op",
    "kernels/prdp_kernels/op.py": "import triton.language",
}


def build(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


def test_a_sound_house_has_no_fault(tmp_path):
    assert faults_in(build(tmp_path, SOUND)) == []


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("prdp_fast/core/records.py", "from prdp_fast.sampling import policy", "the arrow goes up"),
        ("prdp_fast/sampling/table.py", "from prdp_fast.training import update", "the arrow goes up"),
        ("prdp_fast/sampling/table.py", "def f():\n    from .. import training", "the arrow goes up"),
        (
            "prdp_fast/sampling/table.py",
            "from importlib import import_module\nimport_module('prdp_fast.train')",
            "the arrow goes up",
        ),
        (
            "prdp_fast/core/errors.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import prdp_fast.training.update",
            "the arrow goes up",
        ),
        ("prdp_fast/training/update.py", "import prdp_fast.train", "the arrow goes up"),
        ("prdp_fast/sampling/table.py", "import prdp_fast.rewards.clip", "never import each other"),
        ("prdp_fast/rewards/clip.py", "from ..sampling.policy import Policy", "never import each other"),
        ("prdp_fast/training/engine.py", "from prdp_fast.training import update", "in a circle"),
        (
            "prdp_fast/training/update.py",
            "from deepspeed.utils import logger",
            "deepspeed appears in ['training/engine.py'] alone",
        ),
        ("prdp_fast/rewards/clip.py", "def f():\n    import diffusers", "diffusers appears in"),
        ("prdp_fast/rewards/clip.py", "import argparse", "argparse appears in"),
        ("prdp_fast/training/update.py", "from torch.utils import tensorboard", "tensorboard appears in"),
        ("prdp_fast/training/update.py", "from torch.utils.tensorboard import SummaryWriter", "tensorboard appears in"),
        ("prdp_fast/rewards/clip.py", "import transformers", "on first use"),
        ("prdp_fast/world/make_model.py", "from prdp_fast import sampling", "the arrow goes up"),
        ("prdp_fast/__init__.py", "from prdp_fast.training import update", "imports nothing"),
        ("prdp_fast/surprise.py", "", "surprise has no floor yet"),
        ("prdp_fast/surprise.py", "", "lie beside the rooms"),
        ("kernels/prdp_kernels/op.py", "from prdp_fast.core import records", "kernels need torch and triton only"),
        ("kernels/prdp_kernels/op.py", "import numpy", "kernels need torch and triton only"),
        ("kernels/__init__.py", "", "must not be a package"),
    ],
)
def test_a_forbidden_arrow_is_caught(tmp_path, name, text, expected):
    faults = faults_in(build(tmp_path, SOUND | {name: text}))
    assert any(
        expected in fault and (name in fault or "circle" in fault or "must not be" in fault or "beside" in fault)
        for fault in faults
    ), faults


# The import name `kernels`


def test_kernels_is_no_package_here():
    assert (ROOT / "kernels" / "prdp_kernels" / "__init__.py").exists()
    assert not (ROOT / "kernels" / "__init__.py").exists()


def python(code: str, cwd: Path) -> str:
    """What the code prints, run from `cwd`, which comes first on the path, as with `python -m`."""
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, check=True, capture_output=True, text=True).stdout.strip()


def test_from_the_repository_root_kernels_is_the_installed_one(tmp_path):
    """A regular package wins over a folder without `__init__.py`, wherever on the path the two are; here it comes last."""
    installed = tmp_path / "site-packages" / "kernels"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("def get_kernel(name):\n    return name\n")
    code = (
        f"import sys; assert sys.path[0] in ('', {str(ROOT)!r}), sys.path\n"
        f"sys.path.append({str(installed.parent)!r})\n"
        "import kernels, prdp_fast; print(kernels.__file__, kernels.get_kernel('x'))"
    )
    assert python(code, ROOT) == f"{installed / '__init__.py'} x"


def test_a_real_package_of_that_name_here_would_be_caught(tmp_path):
    """The check above has teeth: with an `__init__.py` the folder in the current directory hides the installed package."""
    installed, here = tmp_path / "site-packages" / "kernels", tmp_path / "here" / "kernels"
    for folder in (installed, here):
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text("")
    code = f"import sys; sys.path.append({str(installed.parent)!r}); import kernels; print(kernels.__file__)"
    assert python(code, here.parent) == str(here / "__init__.py")


# The workshop


def requirements() -> dict[str, list[Requirement]]:
    """The lists of setup.py by the name they have there."""
    lists: dict[str, list[Requirement]] = {}
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(node.value, ast.List):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            assert isinstance(target, ast.Name)
            lists[target.id] = [Requirement(text) for text in ast.literal_eval(node.value)]
    return lists


def test_constraints_pin_everything_that_setup_asks_for():
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)  # refuses "-e" lines
            (version,) = pin.specifier
            assert pin.url is None and version.operator == "==" and "+" not in version.version, line
            pins[canonicalize_name(pin.name)] = version.version
    assert (pins["torch"], pins["triton"]) == ("2.13.0", "3.7.1")
    asked = requirements()
    assert {"CORE", "GPU", "DEV"} <= set(asked) and len(asked["CORE"]) > 10
    for requirement in itertools.chain.from_iterable(asked.values()):
        if requirement.marker is None or requirement.marker.evaluate({"python_version": "3.11", "platform_system": "Linux"}):
            assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement
