"""`prdp watch`: looks at a run directory again and again. A terminal is redrawn; a pipe gets a line for every epoch."""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from pathlib import Path

from prdp_fast.core.errors import UserError
from prdp_fast.core.paths import fault, shortened
from prdp_fast.reporting.run_data import check_run, is_run
from prdp_fast.reporting.run_view import ASCII_BLOCKS, BLOCKS, Snapshot, ending, epoch_line, look, view

UNFINISHED = 1  # the exit status
NARROWEST, WIDEST = 40, 120  # columns


def look_once(directory: Path) -> int:
    """Print all there is to see. Returns: the exit status. Raises: UserError if the directory is no run."""
    check_run(directory)
    snapshot = taken(directory)
    print("\n".join(shown(snapshot)))
    return UNFINISHED if snapshot.end and not snapshot.finished else 0


def watch(directory: Path, interval: float) -> int:
    """Follow a run until it ends. Returns: the exit status. Ctrl-C is for the caller, and leaves the last view on the screen."""
    wait_for(directory, interval)
    with contextlib.closing(Screen() if sys.stdout.isatty() else Log()) as follower:
        while True:
            snapshot = taken(directory)
            follower.show(snapshot)
            if snapshot.end is not None:
                return 0 if snapshot.finished else UNFINISHED
            time.sleep(interval)


def wait_for(directory: Path, interval: float) -> None:
    """Until the run has begun."""
    if is_run(directory):
        return
    print(f"waiting for {shortened(directory)}: there is no run yet; Ctrl-C ends this", flush=True)
    while not is_run(directory):
        time.sleep(interval)


def taken(directory: Path) -> Snapshot:
    """Raises: UserError if the run's numbers cannot be read."""
    try:
        return look(directory)
    except OSError as error:
        raise UserError(f"{fault(error)}; mend it, and watch again") from error


def shown(snapshot: Snapshot) -> list[str]:
    return view(snapshot, max(NARROWEST, min(WIDEST, shutil.get_terminal_size().columns)), blocks_of(sys.stdout.encoding))


def blocks_of(encoding: str | None) -> str:
    """The blocks of a sparkline that an output can show."""
    try:
        BLOCKS.encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return ASCII_BLOCKS
    return BLOCKS


class Screen:
    """A view in place of the one before."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live

        self.live = Live(console=Console(file=sys.stdout), auto_refresh=False, transient=False)

    def show(self, snapshot: Snapshot) -> None:
        from rich.text import Text

        if not self.live.is_started:
            self.live.start()
        self.live.update(Text("\n".join(shown(snapshot)), no_wrap=True), refresh=True)

    def close(self) -> None:
        """The last view stays."""
        self.live.stop()


class Log:
    """A line for every epoch, those that are there already first; and a line for every new message, and for the end."""

    def __init__(self) -> None:
        self.epochs = 0
        self.messages: list[str] | None = None

    def show(self, snapshot: Snapshot) -> None:
        if snapshot.epoch < self.epochs:  # resumed from an earlier checkpoint
            self.epochs = snapshot.epoch
        for row in snapshot.rows:
            if row["epoch"] + 1 > self.epochs:
                self.say(epoch_line(row, snapshot))
        self.epochs = snapshot.epoch
        known = snapshot.messages if self.messages is None else self.messages
        for message in snapshot.messages:
            if message not in known:
                self.say(message)
        self.messages = snapshot.messages
        if snapshot.end is not None:
            self.say(ending(snapshot))

    def close(self) -> None:
        pass

    def say(self, line: str) -> None:
        encoding = sys.stdout.encoding or "ascii"
        print(line.encode(encoding, "backslashreplace").decode(encoding), flush=True)
