"""Show what a run did: its table of rewards before and after, and curves.png from its metrics.

prdp report runs/tiny-seed0-1a2b3c4d
"""

from __future__ import annotations

import argparse
from pathlib import Path

from prdp_fast.core.errors import UserError
from prdp_fast.core.files import read_json
from prdp_fast.core.paths import fault
from prdp_fast.core.run_directory import RUN, SUMMARY
from prdp_fast.reporting.curves import plot_curves
from prdp_fast.reporting.tables import print_summary


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="a run directory, finished or not")


def run(args: argparse.Namespace) -> int:
    """Prints the table of a finished run, draws the curves of any run that has an epoch, and prints the picture's path last.

    Raises: UserError if the directory is no run, or has nothing to show yet.
    """
    directory: Path = args.run
    if not (directory / RUN).is_file():
        raise UserError(f"{directory} is no run directory ({RUN} is missing); give the path that training printed last")
    try:
        summary = read_json(directory / SUMMARY)
    except FileNotFoundError:
        print(f"not finished: no {SUMMARY} yet")
    except (OSError, ValueError) as error:
        raise UserError(f"{directory / SUMMARY} cannot be read ({error}); resume the run to write it again") from error
    else:
        try:
            print_summary(summary)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{directory / SUMMARY} is no summary of a run ({error!r}); resume the run to write it again"
            ) from error
    try:
        print(plot_curves(directory))
    except OSError as error:
        raise UserError(
            f"no curves: {fault(error)}; mend it, or copy the run directory to a place that can be written"
        ) from error
    except ValueError as error:
        raise UserError(f"no curves: {error}; expected a run with at least one finished epoch") from error
    return 0
