"""The session on a GPU, rehearsed on a CPU: every part, and parts that fail, hang, die and lack a package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu_session import plan as plans
from benchmarks.gpu_session.plan import Part, Situation
from benchmarks.gpu_session.processes import rows_of_tests
from benchmarks.gpu_session.record import SOUND, Record
from benchmarks.gpu_session.session import limits
from benchmarks.lib import command, truth

HERE = Path(__file__).resolve().parent


def session(folder: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any], str]:
    """Returns: (the finished process, the JSON, the page)."""
    env = command.environment() | {"OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join([env["PYTHONPATH"], str(HERE)])
    words = [sys.executable, "-m", "benchmarks.gpu_session", "--rehearse", "--output", str(folder), *arguments]
    done = subprocess.run(words, cwd=command.ROOT, env=env, capture_output=True, text=True, timeout=580)
    return done, json.loads((folder / "gpu-session.json").read_text()), (folder / "gpu-session.md").read_text()


def row(found: dict[str, Any], part: str, task: str, name: str) -> dict[str, Any]:
    rows = [one for one in found["parts"][part]["rows"] if (one["task"], one["name"]) == (task, name)]
    assert len(rows) == 1, (part, task, name, found["parts"][part]["rows"])
    return rows[0]


def test_what_fails_costs_itself_and_nothing_else(tmp_path: Path) -> None:
    start = time.monotonic()
    done, found, page = session(tmp_path / "out", "--plan", "odd_plan:plan")
    assert done.returncode == 1 and found["status"] == "finished", done.stdout + done.stderr
    assert row(found, "raising", "raises", "before it")["value"] == 1.0
    assert row(found, "raising", "raises", "(task)") | {} and "ValueError: no such thing" in page
    assert row(found, "hanging", "hangs", "before it")["value"] == 2.0
    assert row(found, "hanging", "hangs", "(whole)")["status"] == "timed out" and time.monotonic() - start < 100
    assert "package_that_nobody_has" in row(found, "lacking", "lacks", "(import)")["note"]
    assert row(found, "lacking", "lacks-ahead", "(import)")["status"] == "missing"
    assert row(found, "dying", "dies", "before it")["value"] is None  # NaN is no JSON
    assert "signal 9" in row(found, "dying", "dies", "(whole)")["note"]
    assert row(found, "dying", "sound", "a number") | {} and "| sound: a number | measured | 7 |" in page
    for words in ("| raising |", "| hanging |", "timed out", "missing", "NOT SOUND"):
        assert words in page + done.stdout
    child = Path(f"/proc/{(tmp_path / 'out' / 'child').read_text()}/stat")
    assert not child.exists() or child.read_text().split()[2] == "Z"  # in a session of its own, and ended all the same


def test_when_time_is_over_parts_are_not_reached_and_told(tmp_path: Path) -> None:
    done, found, page = session(tmp_path / "out", "--plan", "odd_plan:plan", "--minutes", "0.01")
    assert done.returncode == 1 and {part["status"] for part in found["parts"].values()} == {"1 fault(s)"}
    assert page.count("not reached") >= 4


# Jobs, compilers and the interpreter: minutes a part, for those who change it (make gpu-rehearsal).
LONG = ("kernels", "engine", "unet", "epoch", "sdxl", "compiled", "start")


@pytest.mark.slow
@pytest.mark.parametrize("part", [*(pytest.param(part, marks=pytest.mark.rehearsal) for part in LONG), "table", "sanitizer"])
def test_every_part_runs_on_a_cpu(part: str, tmp_path: Path) -> None:
    done, found, page = session(tmp_path / "out", "--parts", part)
    assert list(found["parts"]) == ["preflight", part] and found["rehearsal"] and "no number here is a result" in page
    entry = found["parts"][part]
    assert entry["status"] == "sound", done.stdout + page
    assert done.returncode == (0 if found["parts"]["preflight"]["status"] == "sound" else 1)
    assert len(entry["rows"]) > len({one["task"] for one in entry["rows"]})  # more than how each task ended
    assert found["machine"]["torch"] == torch.__version__ and found["machine"]["commit"]
    assert not (tmp_path / "out" / "work").exists()


# The plan


def on_an_h200() -> list[Part]:
    return plans.plan(Situation(Path("/nowhere"), False, 16, 140.0))


def test_every_task_of_the_plan_names_what_is_there() -> None:
    import importlib

    for part in on_an_h200():
        names = [task.name for stage in part.stages for task in stage.tasks]
        assert len(set(names)) == len(names), part.name
        for stage in part.stages:
            for task in stage.tasks:
                json.dumps(task.options)
                assert all(isinstance(value, str) for value in task.env.values()), task
                assert bool(task.tests) != bool(task.target), task
                if task.target:
                    module, function = task.target.split(":")
                    assert callable(getattr(importlib.import_module(module), function))


def test_least_times_fit_into_the_whole_and_later_parts_keep_theirs() -> None:
    parts = on_an_h200()
    assert sum(part.least for part in parts) < 60 * 13
    left = 780.0
    for number, part in enumerate(parts):  # each takes all that it may
        limit = limits(parts, number, left)
        assert part.least <= limit <= part.most
        left -= limit
    assert left >= 0
    assert limits(parts, 2, 30.0) == 30.0  # too late for all: the first takes what there is


def test_tests_are_told_by_name_and_with_their_fault() -> None:
    lines = [
        "tests/kernels/test_a.py::test_b[1 x 2] PASSED       [ 50%]", "tests/kernels/test_a.py::test_c FAILED [100%]",
        "FAILED tests/kernels/test_a.py::test_c - AssertionError: sign", "tests/kernels/test_a.py::test_d SKIPPED (no) [ 1%]",
        "anything else",
    ]  # fmt: skip
    assert list(rows_of_tests(lines)) == [
        {"name": "tests/kernels/test_a.py::test_b[1 x 2]", "status": "passed"},
        {"name": "tests/kernels/test_a.py::test_c", "status": "failed"},
        {"name": "tests/kernels/test_a.py::test_c", "status": "failed", "note": "AssertionError: sign"},
        {"name": "tests/kernels/test_a.py::test_d", "status": "skipped test"},
    ]


def test_the_json_is_whole_after_every_row(tmp_path: Path) -> None:
    record = Record(tmp_path, {"rehearsal": True})
    record.begin("part", 10)
    for number in range(3):
        record.add("part", "task", [{"name": f"row {number}", "status": "measured", "value": number}])
        rows = json.loads(record.path.read_text())["parts"]["part"]["rows"]
        assert [one["value"] for one in rows] == list(range(number + 1))
    name = "tests/kernels/test_a.py::test_c"
    record.add("part", "tests", [{"name": name, "status": "failed"}])
    record.add("part", "tests", [{"name": name, "status": "failed", "note": "sign"}])
    rows = [one for one in json.loads(record.path.read_text())["parts"]["part"]["rows"] if one["name"] == name]
    assert rows == [{"task": "tests", "name": name, "status": "failed", "note": "sign"}]
    record.finish("part", 1.0)
    assert not record.close() and "sign" in record.page.read_text() and "failed" not in SOUND


def test_a_part_of_no_plan_and_a_folder_that_is_taken(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "benchmarks.gpu_session", "--rehearse", "--output", str(tmp_path), "--parts", "kernel"]
    done = subprocess.run(words, cwd=command.ROOT, env=command.environment(), capture_output=True, text=True)
    assert done.returncode == 1 and "--parts got 'kernel', expected some of preflight,kernels" in done.stderr
    (tmp_path / "gpu-session.json").write_text("{}")
    done = subprocess.run(words[:-2], cwd=command.ROOT, env=command.environment(), capture_output=True, text=True)
    assert done.returncode == 1 and "holds a session already" in done.stderr


# The truth


def test_a_path_may_be_half_as_far_off_again_as_plain_code() -> None:
    assert truth.fault("x", 0.149, 0.1) is None
    assert "more than 1.50e-01" in str(truth.fault("x", 0.151, 0.1))
    assert truth.fault("x", 0.9e-4, 0.0) is None and truth.fault("x", 1.1e-4, 0.0)  # in float32 plain code is the truth
    assert truth.fault("x", float("nan"), 0.1) and truth.fault("x", 0.1, float("nan"))


def test_relative_distance() -> None:
    one, other = [torch.tensor([3.0]), torch.tensor([4.5])], [torch.tensor([3.0]), torch.tensor([4.0])]
    assert truth.relative_distance(one, other) == 0.1
    assert truth.relative_distance([None, torch.ones(1)], [None, torch.ones(1)]) == 0.0
    assert truth.relative_distance([None, torch.ones(1)], [torch.ones(1), torch.ones(1)]) == pytest.approx(0.5**0.5)
    nan = truth.relative_distance([torch.zeros(2)], [torch.zeros(2)])
    assert nan != nan  # no gradient at all is no agreement
