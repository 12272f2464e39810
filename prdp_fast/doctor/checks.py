"""What a check is, and how checks are run.

Only the standard library is imported before a check runs, so that a broken installation can be examined too.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

from prdp_fast.core.errors import UserError

Status = Literal["ok", "note", "fault"]


class Outcome(NamedTuple):
    status: Status
    found: str
    advice: str = ""  # the next move, where there is one


class Finding(NamedTuple):
    """One line of the report."""

    check: str
    status: Status
    found: str
    advice: str

    def __str__(self) -> str:
        return f"{self.found}; {self.advice}" if self.advice else self.found


class Check(NamedTuple):
    name: str
    run: Callable[[Path], Outcome]  # gets the directory that runs go to
    advice: str  # the next move if the check itself raises
    aside: bool = False  # works in a process of its own, beside the other checks


ok = partial(Outcome, "ok")
note = partial(Outcome, "note")
fault = partial(Outcome, "fault")


def examine(runs: Path, checks: Iterable[Check]) -> Iterator[Finding]:
    """Every check's finding, in order, as soon as it is there. No check raises: what fails is its finding.

    Args: runs: the directory that runs will go to.
    """
    checks = tuple(checks)
    with ThreadPoolExecutor(1) as pool:
        aside: dict[str, Future[Outcome]] = {check.name: pool.submit(attempt, check, runs) for check in checks if check.aside}
        for check in checks:
            if check.aside:
                outcome = aside[check.name].result()
            else:
                with silence():
                    outcome = attempt(check, runs)
            yield Finding(check.name, *outcome)


def attempt(check: Check, runs: Path) -> Outcome:
    try:
        return check.run(runs)
    except KeyboardInterrupt:
        raise
    except UserError as error:  # its message has its own advice
        return fault(str(error))
    except BaseException as error:  # a library may raise anything, SystemExit included
        return fault(one_line(error), check.advice)


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Keeps what libraries print, warn and log out of the report."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
