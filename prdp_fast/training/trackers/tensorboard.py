"""TensorBoard: event files in the run directory."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from prdp_fast.core.run_directory import TENSORBOARD
from prdp_fast.training.trackers.base import RunToTrack, TrackerError

_hook_before: Callable[[threading.ExceptHookArgs], object] | None = None


class TensorBoard:
    """It hides its own epochs from the one that comes next, left by an earlier start."""

    name, remembers = "tensorboard", False

    def __init__(self, run: RunToTrack) -> None:
        self.folder, self.first_epoch = run.directory / TENSORBOARD, run.first_epoch
        self.writer: Any = None
        self._again_from: int | None = None  # a step that could not be written: a new file begins there

    def begin(self) -> None:
        pass

    def arrived(self) -> int | None:
        return None

    def scalars(self, step: int, values: Mapping[str, float], *, whole: bool) -> None:
        with self._writing(step) as writer:
            for name, value in values.items():
                writer.add_scalar(name, value, step)

    def image(self, tag: str, path: Path, step: int) -> None:
        import numpy as np
        from PIL import Image

        with Image.open(path) as image, self._writing(step) as writer:
            writer.add_image(tag, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def close(self, finished: bool) -> None:
        writer, self.writer = self.writer, None
        if writer is not None:
            with self._told(None):
                writer.close()

    @contextlib.contextmanager
    def _writing(self, step: int) -> Iterator[Any]:
        with self._told(step):
            if self.writer is None:
                from torch.utils.tensorboard import SummaryWriter  # seconds of import, only where something is written

                quiet_writers()
                continued = self.first_epoch > 0 or self.folder.exists()
                purge = self.first_epoch if continued else None
                purge = purge if self._again_from is None else self._again_from
                self.writer = SummaryWriter(str(self.folder), purge_step=purge, flush_secs=15)
            yield self.writer

    @contextlib.contextmanager
    def _told(self, step: int | None) -> Iterator[None]:
        """It writes in a thread of its own and tells of a full disk later; then it begins a new file."""
        try:
            yield
        except OSError as error:
            self.writer, self._again_from = None, step
            raise TrackerError(f"{self.folder} cannot be written ({error.strerror or error}); make room") from error


def quiet_writers() -> None:
    """Keep from the user the traceback that TensorBoard's thread shows of a full or read-only disk: a warning tells of it."""
    global _hook_before
    if _hook_before is None:
        _hook_before, threading.excepthook = threading.excepthook, _hook


def _hook(args: threading.ExceptHookArgs) -> None:
    is_writer = type(args.thread).__module__.startswith("tensorboard.")
    if not (is_writer and issubclass(args.exc_type, OSError)) and _hook_before is not None:
        _hook_before(args)
