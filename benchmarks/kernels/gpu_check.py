"""Is everything right on this GPU: the parts of a session that say so, and what watches the kernels' memory.

    make gpu-check                  make gpu-check ARGS="--output FOLDER"

It is `make gpu-session` with the parts preflight, kernels and engine. The exit status is 1 if a test failed, a result was wrong
or a part did not finish, and without a CUDA device, when nothing is written.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time

from benchmarks.gpu_session import session
from benchmarks.kernels.report import Step
from benchmarks.lib import command
from benchmarks.lib.command import ROOT

PARTS = "preflight,kernels,engine"
SANITIZER = 50.0  # seconds
COMPLAINT = 99  # the exit status that compute-sanitizer is told to give


def environment() -> dict[str, str]:
    """Of every step: the repository's packages, CUDA, no network, and never the interpreter that stands in for a GPU."""
    inherited = {name: value for name, value in command.environment().items() if name != "TRITON_INTERPRET"}
    return inherited | {"PRDP_TEST_DEVICE": "cuda", "HF_HUB_OFFLINE": "1"}


def execute(words: list[str], seconds: float, env: dict[str, str]) -> tuple[int | None, str, float]:
    """(exit status, None if time ran out; what it printed; seconds it took). What it started is ended with it."""
    start = time.monotonic()
    print(f"$ {shlex.join(words)}  (at most {seconds:.0f} s)", flush=True)
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(words, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        status: int | None
        try:
            status = process.wait(timeout=max(1.0, seconds))
        except subprocess.TimeoutExpired:
            status = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # compile workers too
            process.wait()
        log.seek(0)
        return status, log.read(), time.monotonic() - start


def say(name: str, step: Step, output: str, tail: int = 30) -> None:
    if step.status not in ("passed", "clean", "not available"):
        print("\n".join(f"  | {line}" for line in output.splitlines()[-tail:]))
    print(f"{name}: {step.status} in {step.seconds:.0f} s{f' ({step.detail})' if step.detail else ''}", flush=True)


def last_line(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it printed nothing"


def run_sanitizer(tool: str, seconds: float = SANITIZER) -> Step:
    """memcheck or racecheck over `sanitize.py`."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        step = Step("not available", "compute-sanitizer is not on the PATH")
        say(tool, step, "")
        return step
    # PyTorch asks the driver for things that may fail, and handles it: only what kernels do counts. Its allocator is switched off
    # because one block of memory holds many tensors, and a step over the edge of a tensor would stay inside the block.
    options = ["--tool", tool, "--error-exitcode", str(COMPLAINT), "--target-processes", "application-only"]
    options += ["--report-api-errors", "no"] if tool == "memcheck" else []
    env = environment() | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    status, output, took = execute([sanitizer, *options, sys.executable, "-m", "benchmarks.kernels.sanitize"], seconds, env)
    step = judge_sanitizer(status, output, took, seconds)
    say(tool, step, output)
    return step


def judge_sanitizer(status: int | None, output: str, took: float, seconds: float) -> Step:
    """Clean is what ran to its end with no error in its summary; a device that the sanitizer cannot watch is no complaint."""
    if status is None:
        return Step("timed out", f"no end after {seconds:.0f} s", took)
    summaries = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)[^\n]*", output)
    summary = next(iter(re.findall(r"(?:ERROR|RACECHECK) SUMMARY: [^\n]*", output)), "")
    if status == COMPLAINT or any(int(count) for count in summaries):
        return Step("not clean", summary or last_line(output), took)
    if "device not supported" in output.lower():
        return Step("not available", "compute-sanitizer does not support this device", took)
    if status == 0 and summaries:
        return Step("clean", summary, took)
    return Step("failed", last_line(output), took)


def main(arguments: list[str] | None = None) -> int:
    return session.main(["--parts", PARTS, *command.words(arguments)])


if __name__ == "__main__":
    sys.exit(main())
