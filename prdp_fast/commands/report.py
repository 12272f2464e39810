"""Show what a run did: its table of rewards before and after, and curves.png from its metrics.

prdp report runs/tiny-seed0-1a2b3c4d
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from prdp_fast.core.errors import UserError
from prdp_fast.reporting.curves import plot_curves
from prdp_fast.reporting.tables import final_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="a run directory, finished or not")


def run(args: argparse.Namespace) -> int:
    """Prints the table of a finished run, draws the curves of any run that has an epoch, and prints the picture's path last.

    Raises: UserError if the directory is no run, or has nothing to show yet.
    """
    directory: Path = args.run
    if not (directory / "run.json").is_file():
        raise UserError(f"{directory} is no run directory (run.json is missing); give the path that training printed last")
    try:
        summary = json.loads((directory / "summary.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        print("not finished: no summary.json yet")
    except (OSError, ValueError) as error:
        raise UserError(f"{directory / 'summary.json'} cannot be read ({error}); resume the run to write it again") from error
    else:
        if summary.get("evaluation"):
            final_table(summary)
    try:
        print(plot_curves(directory))
    except (OSError, ValueError) as error:
        raise UserError(f"no curves: {error}; expected a run with at least one finished epoch") from error
    return 0
