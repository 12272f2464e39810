"""Check every case, then time it.

    python -m benchmarks.kernels.measure --lines FILE [--budget SECONDS] [--quick]

Writes one JSON object a line: first the device's bandwidth and launch floor, then each row as soon as it is there, so that a run
that is cut short keeps what it has. A wrong result is not timed. A session on a GPU (`benchmarks/gpu_session/`) measures the
same rows. The exit status is
1 if a row failed.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.kernels import checking
from benchmarks.kernels.cases import Built, Case, Ops, build, gpu_cases, operators
from benchmarks.kernels.report import OPERATOR, Result, Row
from benchmarks.lib import command, timing

ROUNDS, QUICK_ROUNDS = 40, 10


def check(built: Built) -> dict[str, Result]:
    """Every contestant run once and compared. Those without a fault have status "measured" and no time yet."""
    results = {}
    answer = built.answer()
    for contestant in built.contestants:
        expected = {name: answer[name] for name in contestant.expected}
        try:
            got = contestant.checked()
            fault = checking.first_fault(got, expected, built.dtypes, slack=1.0 if contestant.name == OPERATOR else 10.0)
        except Exception as error:  # whatever an implementation raises is its row's result, not the end of the run
            results[contestant.name] = Result(contestant.name, "error", one_line(error))
            continue
        results[contestant.name] = Result(contestant.name, "wrong" if fault else "measured", str(fault or ""))
    return results


def measure(
    case: Case, stopwatch: timing.Stopwatch, ops: Ops, *, rounds: int, copy_gb_per_s: float, compiled: bool = False
) -> Row:
    """The row of a case: refused as WRONG, with tensor, index and error, or timed. Contestants that are wrong get no time."""
    if compiled:
        torch.compiler.reset()  # a case must not inherit the guards, nor the recompile count, of the one before
    built = build(case, stopwatch.device, ops, name=OPERATOR, compiled=compiled)
    results = check(built)
    own = results[OPERATOR]
    row = Row.of(case, own.status, own.note)
    row.results = list(results.values())
    if own.status != "measured":
        for result in row.results:
            result.status = "skipped" if result.status == "measured" else result.status
        return row

    launches, replays = {}, {}
    for contestant in built.contestants:
        result = results[contestant.name]
        if result.status != "measured":
            continue
        launches[contestant.name] = lambda run=contestant.run: stopwatch.launch(run)
        try:
            replay = stopwatch.capture(contestant.run) if contestant.graph else None
        except Exception as error:
            stopwatch.synchronize()
            result.note, replay = f"no graph: {one_line(error)}", None
        if replay:
            replays[contestant.name] = replay
    for name, measured in timing.interleave(launches, rounds=rounds).items():
        results[name].launch = measured
    for name, measured in timing.interleave(replays, rounds=rounds).items():
        results[name].graph = measured
    row.conclude(copy_gb_per_s)
    return row


def one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:400]


def run(
    cases: list[Case], stopwatch: timing.Stopwatch, ops: Ops, lines: Path, *, budget: float, rounds: int, compiled: bool
) -> bool:
    """Measure `cases` until `budget` seconds are over, each row appended to `lines`. Whether every row is right."""
    deadline = time.monotonic() + budget
    right = True
    with lines.open("w", encoding="utf-8") as file:

        def write(value: object) -> None:
            file.write(json.dumps(value) + "\n")
            file.flush()

        copy = timing.copy_bandwidth(stopwatch)
        write({"copy_gb_per_s": copy, "launch_floor_ms": timing.launch_floor(stopwatch)})
        for case in cases:
            if time.monotonic() > deadline:
                write(asdict(Row.of(case, "skipped", f"the time budget of {budget:.0f} s was over")))
                continue
            try:
                row = measure(case, stopwatch, ops, rounds=rounds, copy_gb_per_s=copy, compiled=compiled)
            except Exception as error:
                row = Row.of(case, "error", one_line(error))
            right &= row.status == "measured" and all(r.status != "wrong" for r in row.results)
            write(asdict(row))
            print(f"{row.status:<9} {row.key} {row.note}".rstrip(), flush=True)
            try:
                stopwatch.synchronize()
            except Exception as error:  # an illegal access: this process can do nothing more on the device
                print(f"stopped after {row.key}, the device is lost: {one_line(error)}", file=sys.stderr)
                return False
    return right


def main(arguments: list[str] | None = None) -> int:
    parser = command.parser_of(__doc__)
    parser.add_argument("--lines", type=Path, required=True, help="where the rows go, one JSON object a line")
    parser.add_argument("--budget", type=float, default=600, help="seconds after which no case is begun")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("kernels.measure: no CUDA device, nothing measured; run it on a machine with one", file=sys.stderr)
        return 1
    right = run(
        gpu_cases(),
        timing.stopwatch_for("cuda"),
        operators("triton"),
        args.lines,
        budget=args.budget,
        rounds=QUICK_ROUNDS if args.quick else ROUNDS,
        compiled=True,
    )
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
