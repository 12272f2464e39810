"""Faults put into running jobs on CPU ranks: a table of what became of them.

    make fault-campaign
    make fault-campaign ARGS="--only 'SIGKILL' --seed 7"
    make fault-campaign ARGS=--short

The exit status is 1 if a checkpoint was lost, something was corrupted silently, a job hung, a traceback was shown for what a user
can mend, a resumed run differs, or a status is not the documented one.
"""

from __future__ import annotations

import argparse
import os
import random
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from launching import ROOT

from benchmarks.lib.provenance import now
from campaign.cases import every
from campaign.cases.directories import NotHere
from campaign.judge import judge
from campaign.scene import Case, Kit, Scene, ServerDied
from campaign.table import Row, Table, row_of, verdict

RESULTS = ROOT / "benchmarks/results"


def play(case: Case, kit: Kit, seed: int) -> tuple[Row, Scene]:
    """One case in a directory of its own, which is removed if all was sound."""
    folder = Path(tempfile.mkdtemp(prefix="case-", dir=kit.folder))
    scene, skipped = Scene(case, folder, random.Random(f"{seed} {case.name}"), kit), None
    try:
        kit.reference(case.setting)
        case.play(scene)
    except NotHere as reason:
        skipped = str(reason)
    except ServerDied:
        print(f"the server of ranks was ended from outside: {case.name} begins anew", file=sys.stderr, flush=True)
        return play(case, kit, seed)
    except Exception as error:  # of this package: the other cases go on, and this one is no good
        scene.unexpected.append(f"the case itself failed: {type(error).__name__}: {error}")
        traceback.print_exc()
    verdicts = judge(case, scene) if skipped is None else {}
    row = row_of(case, scene, verdicts, skipped)
    if row.is_sound:
        shutil.rmtree(folder, ignore_errors=True)
    return row, scene


def usual_signals() -> None:
    """As a shell in the foreground has them. One in the background has Ctrl-C ignored, in all that it starts."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def chosen(only: list[str], short: bool) -> list[Case]:
    """Args: only: words of which one has to be in a case's name or setting."""
    found = [case for case in every() if case.short or not short]
    return [case for case in found if not only or any(word in f"{case.name} | {case.setting}" for word in only)]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="make fault-campaign", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--only", action="append", default=[], metavar="WORDS", help="cases with these words in name or setting")
    made.add_argument("--seed", type=int, default=1, help="draws moments, bits and files")
    made.add_argument("--jobs", type=int, default=1, help="cases at a time")
    made.add_argument("--short", action="store_true", help="the cases that the test suite has")
    made.add_argument("--list", action="store_true", help="print the cases, and do nothing")
    made.add_argument("--output", type=Path, help="of the table, without suffix; a whole campaign's is in benchmarks/results/")
    return made


def report(row: Row, scene: Scene, elapsed: float) -> None:
    """A line of a case; what its job has said if it is not sound."""
    print(f"[{elapsed:5.0f} s] {row.fault} | {row.setting} | {row.statuses} {row.seconds} | {verdict(row)}", flush=True)
    if not row.is_sound:
        said = "\n".join(f"--- start {n}\n{start.text[-8000:]}" for n, start in enumerate(scene.starts, 1))
        print(f"    when: {row.when}\n{said}", file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    cases = chosen(args.only, args.short)
    if args.list:
        print(*[f"{case.name} | {case.setting}" for case in cases], sep="\n")
        return 0
    if not cases:
        print(f"error: no case has {' or '.join(args.only)} in its name; see --list", file=sys.stderr)
        return 2
    usual_signals()
    torch.set_num_threads(1)
    output = args.output
    if output is None and not args.only and not args.short:
        output = RESULTS / f"faults-cpu-{now()[:10]}"
    given = shlex.join(sys.argv[1:] if arguments is None else arguments)
    table = Table(output, f"make fault-campaign{f' ARGS={shlex.quote(given)}' if given else ''}", args.seed)
    print(f"{len(cases)} faults, seed {args.seed}, {args.jobs} at a time", flush=True)
    with tempfile.TemporaryDirectory(prefix="prdp-campaign-", ignore_cleanup_errors=True) as place:
        kit, began = Kit(Path(place)), time.monotonic()

        def one(case: Case) -> Row:
            row, scene = play(case, kit, args.seed)
            report(row, scene, time.monotonic() - began)
            return row

        with ThreadPoolExecutor(args.jobs) as pool:
            for row in pool.map(one, cases):
                table.add(row)
    table.finish()
    print(*[f"{name:32} {number}" for name, number in table.totals().items()], sep="\n", flush=True)
    if output is not None:
        print(os.path.relpath(output.with_suffix(".md")))
    return int(any(not row.is_sound for row in table.rows))
