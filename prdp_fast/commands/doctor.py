"""Examine this machine before the first job: versions, GPUs, compiler, kernels, a U-Net step. One line a check.

    prdp doctor
    prdp doctor --json > machine.json

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
    parser.add_argument("--runs", type=Path, default=Path("runs"), metavar="DIR", help="of runs to come (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Returns: 1 if there is a fault, else 0."""
    start = time.perf_counter()
    width = max(len(check.name) for check in doctor.CHECKS)
    findings = []
    for finding in doctor.examine(args.runs, doctor.CHECKS):
        findings.append(finding)
        if not args.json:
            print(f"{finding.status:5}  {finding.check:{width}}  {finding}", flush=True)
    faults = [finding.check for finding in findings if finding.status == "fault"]
    notes = [finding.check for finding in findings if finding.status == "note"]
    seconds = time.perf_counter() - start
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
