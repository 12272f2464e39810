"""Examine this machine before the first job: versions, GPUs, compiler, kernels, a U-Net step. One line a check.

    prdp doctor
    prdp doctor --json > machine.json
    torchrun --nnodes 2 --nproc-per-node 8 ... -m prdp_fast.cli doctor --ranks     # the network between them

Exit status 1 if there is a fault, which a job would meet too. A note is worth knowing and stops nobody.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from prdp_fast import doctor


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    parser.add_argument(
        "--ranks", action="store_true",
        help="this process is one rank of a job: do the ranks meet, add up rightly, and how fast; instead of the other checks",
    )  # fmt: skip
    parser.add_argument("--runs", type=Path, default=Path("runs"), metavar="DIR", help="of runs to come (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Returns: 1 if there is a fault, else 0."""
    start = time.perf_counter()
    width = max(len(check.name) for check in doctor.CHECKS)
    findings, speaks = [], True
    if args.ranks:
        from prdp_fast.core import distributed
        from prdp_fast.doctor.network import examine_ranks

        checks, speaks = examine_ranks(args.runs), distributed.is_main()
    else:
        checks = doctor.examine(args.runs, doctor.CHECKS)
    for finding in checks:
        findings.append(finding)
        if not args.json and speaks:
            print(f"{finding.status:5}  {finding.check:{width}}  {finding}", flush=True)
    faults = [finding.check for finding in findings if finding.status == "fault"]
    notes = [finding.check for finding in findings if finding.status == "note"]
    seconds = time.perf_counter() - start
    if not speaks:
        return 1 if faults else 0
    if args.json:
        listed = [finding._asdict() for finding in findings]
        print(json.dumps({"checks": listed, "faults": faults, "notes": notes, "seconds": round(seconds, 1)}, indent=2))
    else:
        print(summary(len(findings), faults, notes, seconds))
    return 1 if faults else 0


def summary(checks: int, faults: list[str], notes: list[str], seconds: float) -> str:
    def counted(names: list[str], word: str) -> str:
        many = f"{len(names)} {word}{'s' if len(names) > 1 else ''}" if names else f"no {word}"
        return f"{many} ({', '.join(names)})" if names else many

    verdict = "mend these first" if faults else "ready for a job"
    return f"{checks} checks in {seconds:.0f} s: {counted(faults, 'fault')}, {counted(notes, 'note')}; {verdict}"
