"""A plan whose parts fail in every way there is, for test_gpu_session.py."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu_session.plan import Part, Situation, alone
from benchmarks.gpu_session.processes import Stage, Task


def sound(emit: Any, options: dict[str, Any]) -> None:
    emit("a number", value=float(options["value"]))


def raises(emit: Any, options: dict[str, Any]) -> None:
    emit("before it", value=1.0)
    raise ValueError("no such\nthing")


def lacks(emit: Any, options: dict[str, Any]) -> None:
    import package_that_nobody_has  # type: ignore[import-not-found]  # noqa: F401


def hangs(emit: Any, options: dict[str, Any]) -> None:
    """With a child in a session of its own, as compilers start theirs."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    Path(options["folder"]).parent.joinpath("child").write_text(str(child.pid))
    emit("before it", value=2.0)
    time.sleep(600)


def dies(emit: Any, options: dict[str, Any]) -> None:
    emit("before it", value=float("nan"))
    os.kill(os.getpid(), 9)


def plan(at: Situation) -> list[Part]:
    def task(name: str, seconds: float = 60.0, **more: Any) -> Task:
        return Task(name, f"odd_plan:{name}", at.options(value=7, **more), seconds=seconds)

    def part(name: str, *stages: Stage) -> Part:
        return Part(name, name, 1, 120, stages)

    missing = Task("lacks-ahead", "odd_plan:sound", at.options(value=1), ("package_that_nobody_has",))
    return [
        part("raising", *alone(task("raises"))),
        part("hanging", *alone(task("hangs", seconds=2.0))),
        part("lacking", Stage((task("lacks"), missing), 2)),
        part("dying", *alone(task("dies"), task("sound"))),
    ]
