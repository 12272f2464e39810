"""`prdp compile`: what a job would compile, compiled before it."""

from __future__ import annotations

from pathlib import Path

import pytest
from launching import ROOT, run, start

pytestmark = pytest.mark.slow
DRIVE = ROOT / "tests/drive_compile.py"


def test_the_cache_is_filled_and_named_last(tmp_path: Path) -> None:
    words = ["--recipe", "smoke", "--set", "performance.compile=full", "--set", f"performance.compile_cache={tmp_path}/cache"]
    done = run(DRIVE, *words, cwd=tmp_path)
    lines = done.stdout.splitlines()
    assert lines[-1] == f"{tmp_path}/cache" and Path(lines[-1]).is_dir()
    assert "of compiled code" in lines[-2]
    for role in ("trained", "rollout", "reference"):
        assert any(line.startswith(f"compile {role} ") and " full " in line for line in lines), done.stdout
    assert not (tmp_path / "runs").exists()


def test_where_nothing_is_compiled_it_says_why(tmp_path: Path) -> None:
    done = start(DRIVE, "--recipe", "smoke", cwd=tmp_path).wait()
    assert done.returncode == 2
    assert done.stderr.strip().startswith("error: nothing is compiled: auto on a CPU: compiling takes minutes")
    assert "set performance.compile to blocks or full to insist" in done.stderr and done.stderr.count("\n") == 1
