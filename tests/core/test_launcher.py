"""A launcher as a child: signals go to the ranks below it, and the exit status is theirs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RANK = """
import os, signal, sys, time
signal.signal(getattr(signal, sys.argv[1]), lambda *_: sys.exit(int(sys.argv[2])))
open(f"ready-{os.getpid()}", "w").close()
time.sleep(60)
"""
# It dies of what reaches it, as DeepSpeed's does, and ends with its ranks.
LAUNCHER = """
import os, subprocess, sys
ranks = [subprocess.Popen([sys.executable, "rank.py", *sys.argv[1:]], env=os.environ | {"RANK": str(n)}) for n in range(2)]
sys.exit(max(rank.wait() for rank in ranks))
"""
PARENT = (
    "import os, sys; from prdp_fast.core import launcher; sys.exit(launcher.run([sys.executable, *sys.argv[1:]], os.environ))"
)


def start(folder: Path, name: str, status: int) -> tuple[subprocess.Popen, list[int]]:
    """The process, and its ranks' numbers."""
    (folder / "rank.py").write_text(RANK)
    (folder / "launcher.py").write_text(LAUNCHER)
    environment = {key: value for key, value in os.environ.items() if key != "RANK"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PARENT, "launcher.py", name, str(status)]
    process = subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True)
    deadline = time.monotonic() + 60
    while len(ready := list(folder.glob("ready-*"))) < 2:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    return process, [int(path.name.partition("-")[2]) for path in ready]


@pytest.mark.parametrize(
    ("name", "of_rank", "status"),
    [("SIGTERM", 0, 0), ("SIGUSR1", 0, 0), ("SIGINT", 130, 130), ("SIGTERM", 2, 2)],
    ids=["SIGTERM", "SIGUSR1", "SIGINT", "a rank that fails"],
)
def test_the_status_is_that_of_the_stop(tmp_path, name, of_rank, status):
    process, _ = start(tmp_path, name, of_rank)
    os.killpg(process.pid, signal.Signals[name])  # as a terminal or a queue does: to the whole group
    assert process.wait(30) == status


def test_a_launcher_ends_with_its_parent(tmp_path):
    process, ranks = start(tmp_path, "SIGUSR1", 0)
    parent = int(Path(f"/proc/{ranks[0]}/stat").read_text().rpartition(")")[2].split()[1])
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    try:
        while Path(f"/proc/{parent}").exists() and "Z" not in Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2][:3]:
            assert time.monotonic() < deadline, "the launcher lives on"
            time.sleep(0.05)
    finally:
        for pid in ranks:
            os.kill(pid, signal.SIGKILL)
