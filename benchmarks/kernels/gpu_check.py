"""The kernels on a real GPU, in one command of less than eight minutes: tests, benchmark, sanitizer, results file, verdict.

    make gpu-check                  make gpu-check ARGS="--quick"                  make gpu-check ARGS="--output FILE"

Needs torch, triton, numpy, pytest and a CUDA device; no network. Each step is a process with a time budget of its own, so one
that fails, hangs or loses the device leaves the results of the others. The exit status is 1 if a test failed, a result was wrong,
a step did not finish or the sanitizer complained, and without a CUDA device, when nothing is written. A missed goal is reported,
and is no failure.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels import report
from benchmarks.kernels.cases import gpu_cases
from benchmarks.kernels.report import Machine, Report, Row, Step
from benchmarks.lib import command
from benchmarks.lib.command import ROOT
from benchmarks.lib.provenance import commit, driver_version, now
from prdp_fast.core.files import write_json

# Seconds. The benchmark takes what the tests left of the whole, less what the sanitizer may need.
WHOLE, TESTS, SANITIZER = 465.0, 180.0, 50.0
# Most of the tests' time is the compiler's, some 700 variants of the kernels: shares of them run side by side.
SHARES = max(1, min(8, (os.cpu_count() or 2) // 2))
GRACE = 15.0  # after its budget the benchmark still finishes the case it is at
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


def run_tests(seconds: float = TESTS) -> Step:
    """All kernel tests: side by side what is mostly compiled, then, with the device's memory to itself, what fills it."""
    alone = "tests/kernels/test_triton_gpu.py"
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    start = time.monotonic()

    def share(number: int) -> tuple[int | None, str, float]:
        env = environment() | {"PRDP_TEST_SHARE": f"{number}/{SHARES}"}
        return execute([*pytest, "tests/kernels", f"--ignore={alone}"], 0.7 * seconds, env)

    with ThreadPoolExecutor(SHARES) as pool:
        parts = list(pool.map(share, range(SHARES)))
    parts.append(execute([*pytest, alone], seconds - (time.monotonic() - start), environment()))
    step = judge_tests([(status, output) for status, output, _ in parts], time.monotonic() - start)
    failed = [output for status, output, _ in parts if status != 0]
    say("kernel tests", step, "\n".join(failed))
    return step


def judge_tests(parts: list[tuple[int | None, str]], took: float) -> Step:
    """One outcome of several runs of pytest: passed if every one ran to its end with no failure and some test."""
    counts: dict[str, int] = {}
    for _, output in parts:
        for count, what in re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", last_line(output)):
            counts[what.rstrip("s")] = counts.get(what.rstrip("s"), 0) + int(count)
    detail = ", ".join(f"{count} {what}" for what, count in counts.items())
    if any(status not in (0, None) for status, _ in parts):
        return Step("failed", detail or last_line(parts[0][1]), took)
    unfinished = sum(status is None for status, _ in parts)
    if unfinished:
        return Step("timed out", f"{unfinished} of {len(parts)} runs did not end; the others: {detail or 'none'}", took)
    return Step("passed" if counts.get("passed") else "failed", detail or "no test ran", took)


def run_benchmark(seconds: float, quick: bool) -> tuple[Step, dict[str, Any], list[Row]]:
    """(outcome, the device's bandwidth and launch floor, a row for every case, which says so if it was not reached)."""
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder) / "rows.jsonl"
        own = ["--lines", str(lines), "--budget", str(seconds - GRACE)] + ["--quick"] * quick
        status, output, took = execute([sys.executable, "-m", "benchmarks.kernels.measure", *own], seconds, environment())
        roofs, rows = read_lines(lines)
    measured = sum(row.status == "measured" for row in rows)
    step = Step({0: "passed", None: "timed out"}.get(status, "failed"), f"{measured} of {len(rows)} cases measured", took)
    say("benchmark", step, output)
    return step, roofs, rows


def read_lines(lines: Path) -> tuple[dict[str, Any], list[Row]]:
    whole = lines.read_text().split("\n")[:-1] if lines.exists() else []  # a process that dies may leave half a line
    found = [json.loads(line) for line in whole]
    roofs = found[0] if found else {}
    rows = {row.key: row for row in map(report.row_from_json, found[1:])}
    lost = "the benchmark ended before this case"
    return roofs, [rows.get(case.key) or Row.of(case, "skipped", lost) for case in gpu_cases()]


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


def describe_machine() -> Machine:
    properties = torch.cuda.get_device_properties(0)
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "missing"
    return Machine(
        device=properties.name,
        sm_count=properties.multi_processor_count,
        driver=driver_version() or "unknown",
        cuda=torch.version.cuda or "none",
        torch=torch.__version__,
        triton=triton_version,
        python=platform.python_version(),
    )


def default_output(machine: Machine, date: str) -> Path:
    slug = re.sub(r"[^a-z0-9]+", "-", machine.device.lower()).strip("-")
    return ROOT / "benchmarks" / "results" / f"kernels-{slug}-{date[:10]}.json"


def main(arguments: list[str] | None = None) -> int:
    parser = command.parser_of(__doc__)
    parser.add_argument("--output", type=Path, help="results file; default: benchmarks/results/kernels-DEVICE-DATE.json")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        built_for = torch.version.cuda or "no CUDA"
        message = f"gpu-check: no CUDA device (torch {torch.__version__}, built for {built_for}); nothing was measured or written"
        print(f"{message}; run it on a machine with an NVIDIA GPU", file=sys.stderr)
        return 1

    start = time.monotonic()
    date, machine, (head, dirty) = now(), describe_machine(), commit()
    output = (args.output or default_output(machine, date)).absolute()
    output.parent.mkdir(parents=True, exist_ok=True)  # what cannot be written should fail now
    for name, value in vars(machine).items():
        print(f"{name:<9} {value}")
    print(f"{'commit':<9} {head}{' + uncommitted changes' if dirty else ''}", flush=True)

    tests = run_tests()
    left = WHOLE - (time.monotonic() - start) - 2 * SANITIZER
    benchmark, roofs, rows = run_benchmark(left, args.quick)
    memcheck, racecheck = run_sanitizer("memcheck"), run_sanitizer("racecheck")

    result = Report(
        date=date,
        commit=head,
        dirty=dirty,
        quick=args.quick,
        machine=machine,
        tests=tests,
        benchmark=benchmark,
        memcheck=memcheck,
        racecheck=racecheck,
        copy_gb_per_s=roofs.get("copy_gb_per_s"),
        launch_floor_ms=roofs.get("launch_floor_ms"),
        rows=rows,
        goals=report.goals(rows),
    )
    write_json(output, result.as_json())
    print(f"\n{report.table(rows, result.copy_gb_per_s)}\n{output}\n{report.verdict(result)}")
    return 0 if result.sound() else 1


if __name__ == "__main__":
    sys.exit(main())
