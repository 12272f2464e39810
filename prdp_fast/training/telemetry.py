"""What a run says while it runs: seconds per phase, metrics.jsonl, TensorBoard, the progress bar. Trackers live here only."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from io import RawIOBase
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from prdp_fast.core import ranks
from prdp_fast.core.files import write_text
from prdp_fast.core.run_directory import METRICS, TENSORBOARD

PLAIN_INTERVAL = 10.0  # seconds between progress lines where there is no terminal to draw a bar on


class Telemetry:
    """The voice of one run. A context manager; `close` may be called twice.

    Args:
        directory: the run directory; None (ranks other than 0) says and writes nothing; phases are timed anyway.
        total_epochs: of the whole run, those before a resume included.
        first_epoch: the epoch that comes next. Rows of metrics.jsonl from this epoch on, left by an earlier start, are dropped,
            so that a resumed run has every epoch once; TensorBoard hides its own from there on.
        clock: seconds, monotonic.

    `phase_seconds` holds wall seconds per phase name, over this start of the run.
    """

    def __init__(
        self,
        directory: Path | None,
        *,
        total_epochs: int,
        first_epoch: int = 0,
        clock: Callable[[], float] = time.monotonic,
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
        self._writer: Any = None
        self._begun_again = False  # in a new file of TensorBoard, after one that could not be written
        self._display: _Bar | _Lines | None = None
        if self.directory is not None:
            self.directory.mkdir(parents=True, exist_ok=True)
            kept = keep_epochs_before(self.directory / METRICS, first_epoch)
            self._metrics_file = (self.directory / METRICS).open("ab", buffering=0)
            self._display = choose_display(total_epochs, first_epoch, clock)
            if lost := sorted(set(range(first_epoch)) - kept):
                self.message(
                    f"WARNING: {self.directory / METRICS} was damaged: the row(s) of {len(lost)} of {first_epoch} finished "
                    f"epochs are lost, the first of epoch {lost[0]}; weights and what is learnt further are as they were"
                )

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
        """One row: `metrics` with `epoch`, `seconds/<phase>` and `images_per_s` added; and one step of the bar.

        Args:
            metrics: floats; "reward" is the one that the bar shows. NaN and infinities become null in metrics.jsonl.
            images: over all ranks. images_per_s counts from the epoch's first phase to this call, gaps included.
        """
        now = self._clock()
        wall = 0.0 if self._epoch_start is None else now - self._epoch_start - self._outside
        row = {name: plain_number(value) for name, value in metrics.items()}
        row |= {f"seconds/{name}": round(seconds, 6) for name, seconds in self._epoch_seconds.items()}
        row["images_per_s"] = images / wall if wall > 0 else math.nan
        if self._epoch_start is not None:
            self._trained += now - self._epoch_start
        self._epoch_seconds, self._epoch_start, self._outside = {}, None, 0.0
        ranks.enter("log", epoch + 1)
        if self._metrics_file is None:
            return
        assert self.directory is not None
        self._append(json.dumps({"epoch": epoch} | {k: strict(v) for k, v in row.items() if k != "epoch"}) + "\n")
        self.log_scalars(epoch, row)
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

    @contextlib.contextmanager
    def _optional(self) -> Iterator[None]:
        """Around TensorBoard. It writes in a thread of its own and tells of a full disk later; then it begins a new file."""
        assert self.directory is not None
        try:
            yield
        except OSError as error:
            self._writer, self._begun_again = None, True
            self.message(
                f"WARNING: {self.directory / TENSORBOARD} cannot be written ({error.strerror or error}); make room: training "
                f"goes on, and {METRICS} has the same numbers"
            )

    def log_scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Scalars for TensorBoard alone."""
        if self.directory is not None:
            with self._optional():
                for name, value in values.items():
                    self._tensorboard().add_scalar(name, plain_number(value), step)

    def log_image(self, tag: str, path_to_png: Path, step: int) -> None:
        if self.directory is not None:
            import numpy as np
            from PIL import Image

            with Image.open(path_to_png) as image, self._optional():
                self._tensorboard().add_image(tag, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def message(self, text: str) -> None:
        """A line for the user, above the bar."""
        if self._display:
            self._display.message(text)
        elif self.directory is not None:
            print(text, flush=True)

    def close(self) -> None:
        display, self._display = self._display, None
        if display:
            display.close()
        writer, self._writer = self._writer, None
        if writer is not None:
            with self._optional():
                writer.close()
        if self._metrics_file is not None and not self._metrics_file.closed:
            if self._waiting:
                self._append("")
            self._metrics_file.close()

    def __enter__(self) -> Telemetry:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _tensorboard(self) -> Any:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter  # seconds of import, only where something is written

            assert self.directory is not None
            quiet_writers()
            folder = self.directory / TENSORBOARD
            continued = (self.first_epoch > 0 or folder.exists()) and not self._begun_again
            self._writer = SummaryWriter(str(folder), purge_step=self.first_epoch if continued else None, flush_secs=15)
        return self._writer


def quiet_writers() -> None:
    """Keep from the user the traceback that TensorBoard's thread shows of a full or read-only disk: `_optional` tells of it."""
    global _hook_before
    if _hook_before is None:
        _hook_before, threading.excepthook = threading.excepthook, _hook


_hook_before: Callable[[threading.ExceptHookArgs], object] | None = None


def _hook(args: threading.ExceptHookArgs) -> None:
    is_writer = type(args.thread).__module__.startswith("tensorboard.")
    if not (is_writer and issubclass(args.exc_type, OSError)) and _hook_before is not None:
        _hook_before(args)


def keep_epochs_before(path: Path, first_epoch: int) -> set[int]:
    """Drop the rows of metrics.jsonl from `first_epoch` on, and a last line that a crash left torn. Whole or not at all.

    Returns: the epochs that are there.
    """
    if not path.exists():
        return set()
    kept, epochs = [], set()
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and isinstance(row.get("epoch"), int) and row["epoch"] < first_epoch:
            kept.append(line + "\n")
            epochs.add(row["epoch"])
    write_text(path, "".join(kept))
    return epochs


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
