"""Jobs of one or several ranks, as a launcher starts them.

`run` and `start` fork the ranks from a server that has imported torch, diffusers and deepspeed once; a rank then begins in
milliseconds instead of ten seconds. `deepspeed_command` is the true command line, for what is about the launcher itself.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TRAIN = ROOT / "prdp_fast/train.py"


def free_port() -> int:
    """A port that is free now and that no client socket takes before the job listens on it.

    Port 0 would give one of the ephemeral range (32768 and up on Linux), which every outgoing connection draws from.
    """
    while True:
        port = random.randrange(20000, 32000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def deepspeed_command(script: Path, *arguments: str | Path, ranks: int | None = None) -> list[str]:
    """The deepspeed command of this environment, on a port of its own, so that another job on the machine is not in the way."""
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--master_port", str(free_port())]
    return [*launcher, *(["--num_gpus", str(ranks)] if ranks else []), str(script), *map(str, arguments)]


def settings(values: Mapping[str, object]) -> list[str]:
    """--set words."""
    return [word for key, value in values.items() for word in ("--set", f"{key}={value}")]


@dataclass
class Finished:
    returncode: int
    stdout: str
    stderr: str

    @property
    def text(self) -> str:
        """Everything that was printed, errors last."""
        return self.stdout + self.stderr


class Job:
    """A job that runs: a process group, led by its supervisor."""

    def __init__(self, pid: int, folder: Path) -> None:
        self.pid, self.folder = pid, folder

    def poll(self) -> int | None:
        """The exit status, None while it runs; negative if the supervisor was killed."""
        path = self.folder / "status"
        return int(path.read_text()) if path.exists() else None

    def wait(self, timeout: float = 400) -> Finished:
        """Raises: TimeoutError, and the job is killed."""
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(f"no end after {timeout:.0f} s:\n{self.output()[-4000:]}")
            time.sleep(0.02)
        status = self.poll()
        assert status is not None
        return Finished(status, self._read("stdout"), self._read("stderr"))

    def kill(self) -> None:
        """All of it, at once, as a node that goes down."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        while self.poll() is None:
            time.sleep(0.02)

    def output(self) -> str:
        return self._read("stdout") + self._read("stderr")

    def _read(self, name: str) -> str:
        path = self.folder / name
        return path.read_text(errors="replace") if path.exists() else ""


@cache
def _server() -> subprocess.Popen:
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
    }
    environment.pop("TRITON_INTERPRET", None)
    server = subprocess.Popen(
        [sys.executable, str(ROOT / "tests/rank_server.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=environment,
    )  # fmt: skip
    assert server.stdin is not None and server.stdout is not None
    atexit.register(server.stdin.close)
    assert server.stdout.readline() == "ready\n", "the rank server did not start"
    return server


def server_is_gone() -> bool:
    """Whether the server has died, and every job with it. The next start gets another one."""
    if _server().poll() is None:
        return False
    _server.cache_clear()
    return True


def start(
    script: Path, *arguments: str | Path, ranks: int | None = None, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> Job:
    """Start a script on so many ranks.

    Args:
        ranks: as a launcher starts them; None: one process without a launcher.
        env: added to the environment.
    """
    server, folder = _server(), Path(tempfile.mkdtemp(prefix="prdp-job-"))
    assert server.stdin is not None and server.stdout is not None
    job = {
        "script": str(script), "arguments": [str(word) for word in arguments], "ranks": ranks, "port": free_port(),
        "cwd": str(cwd or ROOT), "env": dict(env or {}), "folder": str(folder),
    }  # fmt: skip
    server.stdin.write(json.dumps(job) + "\n")
    server.stdin.flush()
    return Job(int(server.stdout.readline()), folder)


def run(
    script: Path,
    *arguments: str | Path,
    ranks: int | None = None,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = 400,
) -> Finished:
    """Start a script, as `start` does, and wait for its end. Raises: AssertionError with what it said if its status is not 0."""
    finished = start(script, *arguments, ranks=ranks, cwd=cwd, env=env).wait(timeout)
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]
    return finished
