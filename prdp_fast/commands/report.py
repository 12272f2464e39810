"""Show what runs did: the table of rewards before and after, curves.png from the metrics, and report.html, a page of all of it.

prdp report runs/tiny-seed0-1a2b3c4d
prdp report runs/tiny-seed0-1a2b3c4d --watch 30       the page follows the run until it ends
prdp report runs/tiny-seed*                           several runs in one page, those of one recipe as a curve with a band
prdp report runs                                      every run in a directory

The page is one file: it needs no network, and no other file of the run.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from prdp_fast.reporting.bands import BANDS

LEAST_WATCH_S = 2.0  # between two pages


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="a run directory, finished or not; several; or a directory of runs"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="of the page; default: report.html in RUN, or in the directory of the runs"
    )
    parser.add_argument(
        "--bands", choices=BANDS, default=BANDS[0],
        help="around the mean of runs that differ in their seed: lowest and highest, or standard error (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--watch", type=seconds, metavar="SECONDS",
        help="write the page again so often until the runs end; a browser that shows it follows",
    )  # fmt: skip


def seconds(text: str) -> float:
    value = float(text)
    if not LEAST_WATCH_S <= value < 1e6:
        raise argparse.ArgumentTypeError(f"{text} seconds; expected at least {LEAST_WATCH_S:g}")
    return value


def run(args: argparse.Namespace) -> int:
    """Prints the table of a finished run, then the page's path; the path of one run's curves comes last.

    Raises: UserError if a directory is no run, or has nothing to show yet.
    """
    from prdp_fast.evaluation.statistics import compare
    from prdp_fast.reporting.report import Report, find_runs

    runs = find_runs(args.runs)
    report = Report(runs, args.runs, args.output, compare, args.bands)
    if args.watch is not None:
        report.follow(args.watch)
    report.print()
    return 0
