"""What a run says while it runs: seconds per phase, metrics.jsonl, trackers, the progress bar."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from io import RawIOBase
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from prdp_fast.config.tracking import TrackingSettings
from prdp_fast.core import ranks
from prdp_fast.core.files import write_text
from prdp_fast.core.metric_names import SCHEMA
from prdp_fast.core.run_directory import MESSAGES, METRICS
from prdp_fast.training.trackers.base import RunToTrack
from prdp_fast.training.trackers.build import Trackers

PLAIN_INTERVAL = 10.0  # seconds between progress lines where there is no terminal to draw a bar on


class Telemetry:
    """The voice of one run. A context manager; `close` may be called twice.

    Args:
        directory: the run directory; None (ranks other than 0) says and writes nothing; phases are timed anyway.
        total_epochs: of the whole run, those before a resume included.
        first_epoch: the epoch that comes next. Rows of metrics.jsonl from this epoch on, left by an earlier start, are dropped,
            so that a resumed run has every epoch once.
        clock: seconds, monotonic.
        tracking: of the recipe; trackers get what metrics.jsonl gets.
        recipe: JSON, what trackers are told of the job.
        run_ids: ids of trackers that an earlier start had.

    `phase_seconds` holds wall seconds per phase name, over this start of the run. `run_ids` are what the next start is given.
    """

    def __init__(
        self,
        directory: Path | None,
        *,
        total_epochs: int,
        first_epoch: int = 0,
        clock: Callable[[], float] = time.monotonic,
        tracking: TrackingSettings | None = None,
        recipe: Mapping[str, Any] | None = None,
        run_ids: Mapping[str, str] | None = None,
    ) -> None:
        self.directory = None if directory is None else Path(directory)
        self.total_epochs, self.first_epoch, self._clock = total_epochs, first_epoch, clock
        self.phase_seconds: dict[str, float] = {}
        self._epoch_seconds: dict[str, float] = {}
        self._phase: str | None = None
        self._epoch_start: float | None = None  # the first phase of the epoch that is running
        self._outside = 0.0  # seconds of this epoch that throughput does not answer for
        self._trained = 0.0  # seconds in finished epochs, for the ETA
        self._metrics_file: RawIOBase | None = None
        self._waiting = b""  # rows that metrics.jsonl does not have yet
        self._trackers: Trackers | None = None
        self._finished = True  # without an error
        self._display: _Bar | _Lines | None = None
        if self.directory is not None:
            self.directory.mkdir(parents=True, exist_ok=True)
            kept = keep_epochs_before(self.directory / METRICS, first_epoch)
            self._metrics_file = (self.directory / METRICS).open("ab", buffering=0)
            self._display = choose_display(total_epochs, first_epoch, clock)
            if lost := sorted(set(range(first_epoch)) - {row["epoch"] for row in kept}):
                self.message(
                    f"WARNING: {self.directory / METRICS} was damaged: the row(s) of {len(lost)} of {first_epoch} finished "
                    f"epochs are lost, the first of epoch {lost[0]}; weights and what is learnt further are as they were"
                )
            run = RunToTrack(self.directory, first_epoch, recipe or {})
            self._trackers = Trackers(tracking or TrackingSettings(), run, self.message, run_ids)
            self._trackers.catch_up(kept)
        self.run_ids = {} if self._trackers is None else self._trackers.run_ids

    @contextlib.contextmanager
    def phase(self, name: str, *, throughput: bool = True) -> Iterator[None]:
        """Count the seconds inside as those of phase `name`. Phases do not nest.

        throughput: False for work between epochs (an evaluation): its seconds are recorded but do not lower images_per_s.
        """
        if self._phase is not None:
            raise RuntimeError(f"phase {name!r} was opened inside phase {self._phase!r}; phases do not nest")
        start = self._clock()
        if self._epoch_start is None and throughput:
            self._epoch_start = start
        self._phase = name
        ranks.enter(name)
        if self._display:
            self._display.phase(name)
        try:
            yield
        finally:
            self._phase = None
            seconds = self._clock() - start
            for table in (self._epoch_seconds, self.phase_seconds):
                table[name] = table.get(name, 0.0) + seconds
            if not throughput and self._epoch_start is not None:
                self._outside += seconds

    def log_epoch(self, epoch: int, metrics: Mapping[str, float], images: int) -> None:
        """One row: `metrics` with `schema`, `epoch`, `seconds/<phase>` and `images_per_s` added; and one step of the bar.

        Args:
            metrics: floats; "reward" is the one that the bar shows. NaN and infinities become null in metrics.jsonl.
            images: over all ranks. images_per_s counts from the epoch's first phase to this call, gaps included.
        """
        now = self._clock()
        wall = 0.0 if self._epoch_start is None else now - self._epoch_start - self._outside
        row = {name: plain_number(value) for name, value in metrics.items() if name not in ("schema", "epoch")}
        row |= {f"seconds/{name}": round(seconds, 6) for name, seconds in self._epoch_seconds.items()}
        row["images_per_s"] = images / wall if wall > 0 else math.nan
        if self._epoch_start is not None:
            self._trained += now - self._epoch_start
        self._epoch_seconds, self._epoch_start, self._outside = {}, None, 0.0
        ranks.enter("log", epoch + 1)
        if self._metrics_file is None:
            return
        numbers = {name: strict(value) for name, value in row.items()}
        self._append(json.dumps({"schema": SCHEMA, "epoch": epoch} | numbers) + "\n")
        if self._trackers is not None:
            self._trackers.epoch(epoch, row)
        if self._display:
            done = epoch + 1 - self.first_epoch
            eta = self._trained / max(done, 1) * (self.total_epochs - epoch - 1)
            self._display.epoch(epoch, row.get("reward", math.nan), row["images_per_s"], eta)

    def _append(self, row: str) -> None:
        """To metrics.jsonl. Where the disk has no room for it, the row waits for the next one: no epoch is lost for it."""
        assert self.directory is not None and self._metrics_file is not None
        self._waiting += row.encode()
        try:
            while self._waiting:
                self._waiting = self._waiting[self._metrics_file.write(self._waiting) :]
        except OSError as error:
            rows = self._waiting.count(b"\n")
            self.message(
                f"WARNING: {self.directory / METRICS} cannot be written ({error.strerror}); make room: training goes on, and "
                f"{rows} row(s) are written as soon as there is"
            )

    def log_scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Scalars for trackers alone."""
        if self._trackers is not None:
            self._trackers.scalars(step, {name: plain_number(value) for name, value in values.items()})

    def log_image(self, tag: str, path_to_png: Path, step: int) -> None:
        """For trackers alone. They read the file later."""
        if self._trackers is not None:
            self._trackers.image(tag, path_to_png, step)

    def message(self, text: str) -> None:
        """A line for the user, above the bar; and in messages.txt, for `prdp watch`."""
        if self.directory is not None:
            with contextlib.suppress(OSError):  # it is a copy: a full disk is told of where it matters
                with (self.directory / MESSAGES).open("a", encoding="utf-8", errors="backslashreplace") as file:
                    file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
        if self._display:
            self._display.message(text)
        elif self.directory is not None:
            print(text, flush=True)

    def close(self) -> None:
        trackers, self._trackers = self._trackers, None
        if trackers is not None:
            trackers.close(self._finished)
        display, self._display = self._display, None
        if display:
            display.close()
        if self._metrics_file is not None and not self._metrics_file.closed:
            if self._waiting:
                self._append("")
            self._metrics_file.close()

    def __enter__(self) -> Telemetry:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._finished = error is None
        self.close()


def keep_epochs_before(path: Path, first_epoch: int) -> list[dict[str, Any]]:
    """Drop the rows of metrics.jsonl from `first_epoch` on, and a last line that a crash left torn. Whole or not at all.

    Returns: the rows that stay.
    """
    if not path.exists():
        return []
    kept, rows = [], []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and isinstance(row.get("epoch"), int) and row["epoch"] < first_epoch:
            kept.append(line + "\n")
            rows.append(row)
    write_text(path, "".join(kept))
    return rows


def plain_number(value: Any) -> float:
    """int stays int; tensors, numpy numbers and the rest become float."""
    return value if type(value) in (int, float) else float(value)


def strict(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None


def clock_time(seconds: float) -> str:
    minutes, seconds = divmod(max(round(seconds), 0), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


def choose_display(total_epochs: int, first_epoch: int, clock: Callable[[], float]) -> _Bar | _Lines:
    """A bar where a terminal can draw one (stderr before stdout, which may be piped), lines otherwise."""
    if os.environ.get("TERM") not in ("dumb", "unknown"):
        for stream in (sys.stderr, sys.stdout):
            if stream.isatty():
                return _Bar(stream, total_epochs, first_epoch)
    return _Lines(sys.stdout, total_epochs, first_epoch, clock)


class _Lines:
    """Progress for a log file: the first epoch, the last, and one line every PLAIN_INTERVAL seconds between."""

    def __init__(self, stream: TextIO, total_epochs: int, first_epoch: int, clock: Callable[[], float]) -> None:
        self.stream, self.total, self.first, self.clock = stream, total_epochs, first_epoch, clock
        self.last = -math.inf
        self.names: list[str] = []  # phases of the epoch, in the order they came

    def phase(self, name: str) -> None:
        if name not in self.names:
            self.names.append(name)

    def epoch(self, epoch: int, reward: float, images_per_s: float, eta: float) -> None:
        phases, self.names = " > ".join(self.names), []
        now = self.clock()
        if now - self.last < PLAIN_INTERVAL and epoch not in (self.first, self.total - 1):
            return
        self.last = now
        figures = f"reward {reward:.4f}  {images_per_s:.1f} images/s  ETA {clock_time(eta)}"
        self.message(f"epoch {epoch + 1}/{self.total}  {figures}" + (f"  ({phases})" if epoch == self.first and phases else ""))

    def message(self, text: str) -> None:
        print(text, file=self.stream, flush=True)

    def close(self) -> None:
        pass


class _Bar:
    """A rich progress bar, drawn from the first phase or epoch on."""

    def __init__(self, stream: TextIO, total_epochs: int, first_epoch: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        # A piped stdout keeps its lines: only what would tear the bar is drawn above it.
        self.progress = Progress(
            TextColumn("epoch"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[phase]:<10.10}"),
            TextColumn("reward {task.fields[reward]}"),
            TextColumn("{task.fields[rate]} images/s"),
            TextColumn("ETA {task.fields[eta]}"),
            console=Console(file=stream),
            refresh_per_second=4,
            redirect_stdout=sys.stdout.isatty(),
            redirect_stderr=sys.stderr.isatty(),
            expand=True,
        )
        self.task = self.progress.add_task(
            "epoch", total=total_epochs, completed=first_epoch, phase="", reward="-", rate="-", eta="-:--:--"
        )
        self.started = False

    def start(self) -> None:
        if not self.started:
            self.progress.start()
            self.started = True

    def phase(self, name: str) -> None:
        self.start()
        self.progress.update(self.task, phase=name)

    def epoch(self, epoch: int, reward: float, images_per_s: float, eta: float) -> None:
        self.start()
        self.progress.update(
            self.task, completed=epoch + 1, reward=f"{reward:.4f}", rate=f"{images_per_s:.1f}", eta=clock_time(eta)
        )

    def message(self, text: str) -> None:
        self.progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        if self.started:
            self.progress.stop()
