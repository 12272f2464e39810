"""A quarter of an hour on a GPU, in one command: is everything right, and how fast is it. The most valuable part comes first.

    make gpu-session        make gpu-session ARGS="--parts kernels,engine"        python -m benchmarks.gpu_session --rehearse

Every part is made of processes with time limits of their own: one that hangs, fails or loses the device costs its limit, and the
rest go on. What is found is written as it comes, to one JSON that is whole after every row and to a Markdown page that is drawn
anew after every part. The exit status is 1 if anything was wrong, failed, was cut off or was not reached.

The python is the machine's own, with the CUDA build of torch that fits its driver. Nothing is downloaded. --rehearse runs every
part on the CPU with the embedded model in place of SD's, to find what is missing or misspelt before a GPU is there.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shlex
import shutil
import signal
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks.gpu_session import plan as plans
from benchmarks.gpu_session.plan import Part
from benchmarks.gpu_session.processes import ROOT, Row, Running, Stage, Task, run_stage
from benchmarks.gpu_session.record import SOUND, Record

MINUTES = 13.0
SHORTEST = 5.0  # seconds; a part that would have less is not begun


def limits(parts: list[Part], number: int, left: float) -> float:
    """Seconds that part `number` may take of those that are left."""
    kept = sum(part.least for part in parts[number + 1 :])
    return min(parts[number].most, max(left - kept, min(left, parts[number].least)))


class Session:
    def __init__(self, parts: list[Part], record: Record, seconds: float, cores: int) -> None:
        self.parts, self.record, self.cores = parts, record, cores
        self.deadline = time.monotonic() + seconds
        self.ready: dict[str, Running] = {}
        self.stages = [(part, stage) for part in parts for stage in part.stages]

    def run(self) -> bool:
        """Returns: whether every part was sound."""
        try:
            for number, part in enumerate(self.parts):
                left = self.deadline - time.monotonic()
                limit = limits(self.parts, number, left)
                self.record.begin(part.name, max(0.0, limit))
                if limit < SHORTEST:
                    self.record.add(
                        part.name, "(part)", [{"name": "(whole)", "status": "not reached", "note": "the time was over"}]
                    )
                    self.record.finish(part.name, 0.0)
                    continue
                self.run_part(part, limit)
                if part.name == "preflight" and self.lacks_gpu():
                    break
        finally:
            for one in self.ready.values():
                one.end()
        return self.record.close()

    def run_part(self, part: Part, limit: float) -> None:
        print(f"{part.name}: {part.title} (at most {limit:.0f} s)", flush=True)
        start = time.monotonic()

        def tell(task: Task, rows: list[Row]) -> None:
            self.record.add(part.name, task.name, rows)
            for row in rows:
                if row["status"] not in SOUND:
                    print(f"  {row['status'].upper()} {task.name}: {row['name']} {row.get('note', '')}".rstrip(), flush=True)

        for stage in part.stages:
            at = next(number for number, (_, one) in enumerate(self.stages) if one is stage)
            self.start_ahead(at)
            folder = self.record.folder / "logs" / part.name
            waiting = {
                name.removeprefix(f"{part.name}/"): one for name, one in self.ready.items() if name.startswith(f"{part.name}/")
            }
            mine = {task.name: waiting[task.name] for task in stage.tasks if task.name in waiting}
            for name in mine:
                del self.ready[f"{part.name}/{name}"]
            try:
                run_stage(stage, folder, start + limit, tell, mine, sys.stdout)
            finally:
                for one in mine.values():
                    one.end()
            self.record.draw()
        status = self.record.finish(part.name, time.monotonic() - start)
        print(f"{part.name}: {status} in {time.monotonic() - start:.0f} s", flush=True)

    def start_ahead(self, at: int) -> None:
        """Start the first tasks of the next stage: they import, and wait. A worker alone; pytest would begin at once."""
        if at + 1 >= len(self.stages) or self.cores < 2:
            return
        part, stage = self.stages[at + 1]
        for task in stage.tasks[: min(stage.width, max(1, self.cores // 4))]:
            if not task.tests:
                self.ready[f"{part.name}/{task.name}"] = Running(task, self.record.folder / "logs" / part.name)

    def lacks_gpu(self) -> bool:
        machine = self.record.value.get("machine") or {}
        if self.record.value["rehearsal"] or "gpu" in machine:
            return False
        print("gpu-session: torch finds no CUDA device; see the preflight above, and its log", file=sys.stderr)
        return True


def has_gpu() -> bool:
    """As far as can be told without torch: what it finds, the preflight says."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    return shutil.which("nvidia-smi") is not None or Path("/dev/nvidia0").exists() or Path("/proc/driver/nvidia").exists()


def chosen_parts(wanted: str | None, every: list[Part]) -> list[Part]:
    """In the order of the plan, the preflight always. Raises: SystemExit about a name that is none."""
    if wanted is None:
        return every
    names = [name.strip() for name in wanted.split(",") if name.strip()]
    known = [part.name for part in every]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise SystemExit(f"gpu-session: --parts got {wanted!r}, expected some of {','.join(known)}; leave it out for all")
    return [part for part in every if part.name in names or part.name == "preflight"]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"of the whole (default {MINUTES:g})")
    parser.add_argument("--parts", help=f"some of {','.join(plans.PARTS)}; the preflight always runs")
    parser.add_argument("--output", type=Path, help="a folder; default: runs/gpu-session-DATE-TIME")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with the embedded model: no number is a result")
    parser.add_argument("--plan", default="benchmarks.gpu_session.plan:plan", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if not args.rehearse and not has_gpu():
        print(
            "gpu-session: no CUDA device here, nothing was run or written; add --rehearse to try it on the CPU", file=sys.stderr
        )
        return 1
    now = datetime.now(timezone.utc)
    folder = (args.output or ROOT / "runs" / f"gpu-session-{now:%Y-%m-%d-%H%M%S}").absolute()
    if (folder / "gpu-session.json").exists():
        print(f"gpu-session: {folder} holds a session already; give --output another folder", file=sys.stderr)
        return 1
    module, function = args.plan.split(":")
    at = plans.situation(folder, args.rehearse)
    parts = chosen_parts(args.parts, getattr(importlib.import_module(module), function)(at))
    words = sys.argv[1:] if arguments is None else arguments
    head: dict[str, Any] = {
        "date": now.isoformat(timespec="seconds"), "command": shlex.join(["python", "-m", "benchmarks.gpu_session", *words]),
        "minutes": args.minutes, "rehearsal": args.rehearse, "machine": None,
    }  # fmt: skip
    record = Record(folder, head)
    (folder / "work").mkdir(exist_ok=True)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))  # so that what runs is ended
    sound = Session(parts, record, 60 * args.minutes, at.cores).run()
    shutil.rmtree(folder / "work", ignore_errors=True)  # weights and compiled code
    print(f"{'SOUND' if sound else 'NOT SOUND'}\n{record.page}\n{record.path}", flush=True)
    return 0 if sound else 1


__all__ = ["Session", "Stage", "limits", "main"]
