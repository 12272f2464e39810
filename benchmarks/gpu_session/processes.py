"""Tasks of a part as processes: started ahead, let go, watched, and ended with everything that they started.

Nothing here imports torch: the process that watches must outlive whatever a GPU, a driver or a missing package does to a task.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).resolve().parents[2]
MARK = "PRDP_GPU_SESSION_TASK"  # in the environment of a task and of all that it starts
TICK = 0.1  # seconds between two looks at what runs

Row = dict[str, Any]
Told = Callable[["Task", list[Row]], None]


@dataclass(frozen=True)
class Task:
    """One process. It either calls `target` in a worker, or is pytest over `tests`."""

    name: str
    target: str = ""  # "module:function", called with (emit, options)
    options: dict[str, Any] = field(default_factory=dict)
    imports: tuple[str, ...] = ()  # what the worker imports before it is let go
    tests: tuple[str, ...] = ()  # arguments of pytest
    env: dict[str, str] = field(default_factory=dict)
    seconds: float = 600.0  # its limit, from when it is let go


@dataclass(frozen=True)
class Stage:
    """Tasks that run side by side, at most `width` of them."""

    tasks: tuple[Task, ...]
    width: int = 1


def environment(task: Task, mark: str) -> dict[str, str]:
    """The repository's packages first on the path, no network, and never the interpreter that stands in for a GPU."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    own = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", MARK: mark}
    quiet = {
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // 4)), "TRANSFORMERS_VERBOSITY": "error",
        "DIFFUSERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    return quiet | inherited | own | task.env


class Running:
    """A process of a task. A worker waits, its imports done, until `go`."""

    def __init__(self, task: Task, folder: Path) -> None:
        self.task, self.mark = task, f"{os.getpid()}-{uuid.uuid4().hex}"
        folder.mkdir(parents=True, exist_ok=True)
        self.log, self.rows = folder / f"{task.name}.log", folder / f"{task.name}.jsonl"
        for path in (self.log, self.rows):
            path.unlink(missing_ok=True)
        self.went: float | None = None
        self.cut = False
        self._offset = 0
        if task.tests:
            words = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--color=no", *task.tests]
        else:
            words = [sys.executable, "-m", "benchmarks.gpu_session.worker", task.target, str(self.rows)]
            words += [json.dumps(task.options), ",".join(task.imports)]
        with self.log.open("w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                words, cwd=ROOT, env=environment(task, self.mark), stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip

    def go(self) -> None:
        self.went = time.monotonic()
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(b"go\n")
            self.process.stdin.flush()
            self.process.stdin.close()

    def new_rows(self) -> list[Row]:
        """What has been written since the last call. Half a line, of a process that died, is left out."""
        path = self.log if self.task.tests else self.rows
        if not path.exists():
            return []
        with path.open("rb") as file:
            file.seek(self._offset)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._offset += len(whole)
        lines = whole.decode("utf-8", errors="replace").splitlines()
        return list(rows_of_tests(lines)) if self.task.tests else [json.loads(line) for line in lines if line.startswith("{")]

    def end(self) -> None:
        """End the process and all that it started, whatever session they are in."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for _ in range(5):
            left = marked(self.mark)
            if not left:
                return
            for pid in left:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)

    @property
    def overdue(self) -> bool:
        return self.went is not None and time.monotonic() - self.went > self.task.seconds

    def verdict(self) -> Row:
        """The task's own row: how it ended."""
        took = time.monotonic() - self.went if self.went else 0.0
        status, note = self.process.returncode, ""
        if self.cut:
            word, note = "timed out", f"ended after {took:.0f} s; {last_line(self.log)}"
        elif status == 0:
            word = "passed"
        else:
            how = f"signal {-status}" if status < 0 else f"exit status {status}"
            word, note = "failed", f"{how}; {last_line(self.log)}"
        return {"name": "(whole)", "status": word, "note": note, "seconds": round(took, 1)}


def marked(mark: str) -> list[int]:
    """Processes that inherited the mark; none where there is no /proc."""
    found, wanted = [], f"{MARK}={mark}".encode()
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if wanted in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found


def last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()] if log.exists() else []
    return lines[-1][:300] if lines else "it printed nothing"


OUTCOME = re.compile(r"^(tests/\S+?::.+?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b")
FAULT = re.compile(r"^(FAILED|ERROR) (tests/\S+?::.+?) - (.*)$")


def rows_of_tests(lines: list[str]) -> Iterator[Row]:
    """A row for each test as pytest -v tells it, and one with the reason for each that its summary explains."""
    for line in lines:
        if match := OUTCOME.match(line):
            word = match[2].lower()
            yield {"name": match[1], "status": "skipped test" if word in ("skipped", "xfail") else word}
        elif match := FAULT.match(line):
            yield {"name": match[2], "status": match[1].lower(), "note": match[3][:300]}


def run_stage(stage: Stage, folder: Path, deadline: float, tell: Told, ready: dict[str, Running], output: TextIO) -> None:
    """Run the tasks of a stage until all have ended or `deadline` (time.monotonic) has come.

    Args:
        tell: given every task's new rows as they come, the last of which is how it ended.
        ready: processes started ahead, by task name; those of this stage are taken out.
    """
    left, running = list(stage.tasks), []
    try:
        while left or running:
            while left and len(running) < stage.width and time.monotonic() < deadline:
                task = left.pop(0)
                one = ready.pop(task.name, None) or Running(task, folder)
                one.go()
                running.append(one)
                print(f"  {task.name} (at most {min(task.seconds, deadline - time.monotonic()):.0f} s)", file=output, flush=True)
            over = time.monotonic() >= deadline
            for one in list(running):
                ended = one.process.poll() is not None
                one.cut = not ended and (over or one.overdue)
                if ended or one.cut:
                    one.end()
                rows = one.new_rows()
                if ended or one.cut:
                    running.remove(one)
                    rows.append(one.verdict())
                if rows:
                    tell(one.task, rows)
            if over and not running:
                for task in left:
                    tell(task, [{"name": "(whole)", "status": "not reached", "note": "the part's time was over before it began"}])
                return
            time.sleep(TICK)
    finally:
        for one in running:
            one.end()
