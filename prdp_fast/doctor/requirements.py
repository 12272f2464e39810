"""What prdp_fast requires. It is written once, in setup.py, and read from there or from the metadata that pip made of it."""

from __future__ import annotations

import ast
import importlib.metadata
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from prdp_fast.core.errors import UserError

if TYPE_CHECKING:
    from packaging.requirements import Requirement

DISTRIBUTION = "prdp-fast"
ROOT = Path(__file__).resolve().parents[2]  # of a clone; an installed package lies in site-packages


def is_clone() -> bool:
    return (ROOT / "setup.py").is_file() and (ROOT / "kernels" / "prdp_kernels").is_dir()


def requires_python() -> str:
    """The range of Python versions, ">=3.10"."""
    if is_clone():
        return read_setup(ROOT / "setup.py").python
    return str(importlib.metadata.metadata(DISTRIBUTION)["Requires-Python"])


def requirements(extra: str = "") -> dict[str, Requirement]:
    """Those of one extra, or without one those of the package itself, by name. Those of other platforms are left out.

    In a clone setup.py is read: the metadata of an editable installation may be older than the code.
    Raises: UserError if `packaging` is not there to judge them.
    """
    try:
        from packaging.requirements import Requirement
    except ImportError:
        raise UserError("packaging is not installed, so no version can be judged; pip install packaging") from None

    def applies(requirement: Requirement, extra: str) -> bool:
        return requirement.marker is None or requirement.marker.evaluate({"extra": extra})

    if is_clone():
        setup = read_setup(ROOT / "setup.py")
        listed = [Requirement(text) for text in (setup.extras[extra] if extra else setup.core)]
        chosen = [requirement for requirement in listed if applies(requirement, extra)]
    else:
        # One list for all: a requirement of an extra carries a marker that is true for this extra alone.
        listed = [Requirement(text) for text in importlib.metadata.requires(DISTRIBUTION) or []]
        chosen = [
            requirement for requirement in listed if applies(requirement, extra) and not (extra and applies(requirement, ""))
        ]
    return {requirement.name: requirement for requirement in chosen}


class Setup(NamedTuple):
    """What a setup.py asks for, as it is written there."""

    python: str
    core: list[str]
    extras: dict[str, list[str]]


def read_setup(path: Path) -> Setup:
    """Reads the file without running it. The lists may be names of lists above, and may contain others by `*NAME`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    named = {
        node.targets[0].id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and isinstance(node.value, ast.List)
    }

    def texts(node: ast.expr) -> list[str]:
        if isinstance(node, ast.Name):
            return texts(named[node.id])
        if isinstance(node, ast.Starred):
            return texts(node.value)
        if isinstance(node, ast.List):
            return [text for item in node.elts for text in texts(item)]
        return [ast.literal_eval(node)]

    call = next(node for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setup")
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    extras = keywords["extras_require"]
    assert isinstance(extras, ast.Dict)
    return Setup(
        python=ast.literal_eval(keywords["python_requires"]),
        core=texts(keywords["install_requires"]),
        extras={ast.literal_eval(key): texts(value) for key, value in zip(extras.keys, extras.values, strict=True) if key},
    )
