"""What `prdp report` does with one run or several: finds them, prints, and writes the page once or again and again."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from prdp_fast.core.errors import UserError
from prdp_fast.core.files import read_json, write_text
from prdp_fast.core.paths import fault, shortened
from prdp_fast.core.run_directory import SUMMARY
from prdp_fast.reporting.bands import BANDS
from prdp_fast.reporting.curves import plot_curves
from prdp_fast.reporting.html import REPORT, Compare, report_page
from prdp_fast.reporting.liveness import has_ended
from prdp_fast.reporting.run_data import check_run, is_run, read_run
from prdp_fast.reporting.tables import print_summary

MOST_RUNS = 100  # in one page


def find_runs(given: Sequence[Path]) -> list[Path]:
    """Run directories, as given or below a directory that is none itself; each once. Raises: UserError."""
    found: dict[Path, Path] = {}
    for path in given:
        inside = [path] if is_run(path) else sorted(part for part in path.glob("*") if is_run(part)) if path.is_dir() else []
        if not inside:
            check_run(path)
        found |= {part.resolve(): part for part in inside}
    if len(found) > MOST_RUNS:
        raise UserError(f"{len(found)} runs; a page holds at most {MOST_RUNS}: name those that belong together")
    return list(found.values())


class Report:
    """Of runs that have been found already."""

    def __init__(
        self, runs: Sequence[Path], given: Sequence[Path], output: Path | None, compare: Compare, bands: str = BANDS[0]
    ) -> None:
        """Args: given: the paths as the user named them. compare: of evaluation/statistics.py."""
        self.runs, self.compare, self.bands = runs, compare, bands
        self.page = output or self.place(given)

    def place(self, given: Sequence[Path]) -> Path:
        """Beside what is shown. Raises: UserError if that is in several places."""
        if len(given) == 1:
            return given[0] / REPORT
        parents = {path.resolve().parent for path in self.runs}
        if len(parents) > 1:
            raise UserError(f"the runs are in {len(parents)} directories; say with --output FILE where the page is to be written")
        return self.runs[0].parent / REPORT

    def write(self, refresh: float | None = None) -> None:
        """Raises: UserError if the page cannot be written."""
        text = report_page([read_run(path) for path in self.runs], self.compare, bands=self.bands, refresh=refresh)
        try:
            write_text(self.page, text)
        except OSError as error:
            raise UserError(f"no page: {fault(error)}; mend it, or say with --output FILE where it can be written") from error

    def follow(self, interval: float) -> None:
        """Write the page every `interval` seconds until no run goes on any more. What is left does not refresh itself."""
        try:
            self.write(interval)
            print(f"{shortened(self.page)} is written every {interval:g} s until the run ends; Ctrl-C ends it", flush=True)
            while not all(map(has_ended, self.runs)):
                time.sleep(interval)
                self.write(interval)
        finally:
            self.write()

    def print(self) -> None:
        """The page, and of one run its table and curves. Raises: UserError if one of them cannot be had."""
        if len(self.runs) > 1:
            self.write()
            print(self.page)
            return
        (directory,) = self.runs
        print_table(directory)
        self.write()
        print(self.page)
        try:
            print(plot_curves(directory))
        except OSError as error:
            raise UserError(
                f"no curves: {fault(error)}; mend it, or copy the run directory to a place that can be written"
            ) from error
        except ValueError as error:
            raise UserError(f"no curves: {error}; expected a run with at least one finished epoch") from error


def print_table(directory: Path) -> None:
    """Of a finished run. Raises: UserError if its summary cannot be read, or is none."""
    try:
        summary = read_json(directory / SUMMARY)
    except FileNotFoundError:
        print(f"not finished: no {SUMMARY} yet")
        return
    except (OSError, ValueError) as error:
        raise UserError(f"{directory / SUMMARY} cannot be read ({error}); resume the run to write it again") from error
    try:
        print_summary(summary)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{directory / SUMMARY} is no summary of a run ({error!r}); resume the run to write it again") from error
