"""Follow a run in the terminal: where it is, how long it still takes, and the numbers to look at.

prdp watch runs/tiny-seed0-1a2b3c4d
prdp watch RUN | tee watch.log       in a pipe: a line for every epoch
prdp watch RUN --once                what there is to see now

It reads the run directory only, so it may run on any machine that sees it. It waits for a run that has not begun, and ends with
the run: with status 0 if that has finished, and 1 if not.
"""

from __future__ import annotations

import argparse
from pathlib import Path

LEAST_INTERVAL_S = 0.1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="a run directory; it need not be there yet")
    parser.add_argument("--interval", type=seconds, default=2.0, metavar="SECONDS", help="between two looks (default: 2)")
    parser.add_argument("--once", action="store_true", help="look once, and end")


def seconds(text: str) -> float:
    value = float(text)
    if not LEAST_INTERVAL_S <= value < 1e6:
        raise argparse.ArgumentTypeError(f"{text} seconds; expected at least {LEAST_INTERVAL_S:g}")
    return value


def run(args: argparse.Namespace) -> int:
    """Raises: UserError with --once, if the directory is no run."""
    from prdp_fast.reporting.watch import look_once, watch

    return look_once(args.run) if args.once else watch(args.run, args.interval)
