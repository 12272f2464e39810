"""Weights & Biases."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from prdp_fast.config.tracking import WandbSettings
from prdp_fast.training.trackers.base import RunToTrack, TrackerError

PATIENCE_S = 60.0  # for the server, at the start


class Wandb:
    """One run under one id, over all starts. Epochs are its steps."""

    name, remembers = "wandb", True

    def __init__(self, settings: WandbSettings, run: RunToTrack, run_id: str) -> None:
        self.settings, self.run_to_track, self.run_id = settings, run, run_id
        self.run: Any = None
        self._arrived = -1

    def begin(self) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # nothing goes anywhere that nobody asked for
        import wandb

        settings = self.settings
        # Without a question: nobody may be there to answer it.
        if settings.mode == "online" and not wandb.login(prompt=False):
            raise TrackerError("no API key; set WANDB_API_KEY, run 'wandb login', or set tracking.wandb.mode offline")
        if settings.mode == "offline":
            folders = f"wandb/offline-run-*-{self.run_id}"
            files = self.run_to_track.directory.glob(f"{folders}/run-{self.run_id}.wandb")
            self._arrived = max((last_step(path) for path in files), default=-1)
        self.run = wandb.init(
            project=settings.project, entity=settings.entity, group=settings.group, tags=settings.tags or None,
            name=settings.name or self.run_to_track.name, id=self.run_id, resume="allow", mode=settings.mode,
            dir=str(self.run_to_track.directory), config={"recipe": dict(self.run_to_track.recipe)},
            # No terminal output (the progress bar's is none of its business), no code, no command line and no environment, which
            # may hold what a user would not send.
            settings=wandb.Settings(
                console="off", disable_code=True, disable_git=True, save_code=False, x_disable_meta=True, x_disable_stats=True,
                init_timeout=PATIENCE_S,
            ),
        )  # fmt: skip
        if settings.mode == "online":
            self._arrived = int(self.run.step) - 1  # the server knows

    def arrived(self) -> int | None:
        """It keeps what it is given in memory for a while, which a killed process loses."""
        return self._arrived

    def scalars(self, step: int, values: Mapping[str, float], *, whole: bool) -> None:
        self.run.log(dict(values), step=step)

    def image(self, tag: str, path: Path, step: int) -> None:
        import wandb

        self.run.log({tag: wandb.Image(str(path))}, step=step)

    def close(self, finished: bool) -> None:
        self.run.finish(exit_code=0 if finished else 1)


HEADER, BLOCK = 7, 32768  # bytes: of the file and of each record; of LevelDB's log format, which a .wandb file has
FULL, LAST = 1, 4  # kinds of a record: all of it, or the last of its parts


def last_step(path: Path) -> int:
    """The last step in a file of offline mode, -1 if there is none. What a kill has left of the last record does not count."""
    from wandb.proto import wandb_internal_pb2

    found = -1
    for data in records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        try:
            record.ParseFromString(data)
        except Exception:  # of protobuf, whose kinds of error differ by version
            break
        if record.WhichOneof("record_type") == "history":
            found = max(found, record.history.step.num)
    return found


def records(data: bytes) -> Iterator[bytes]:
    """Of a .wandb file, those that are whole. A record's header has its checksum, length and kind."""
    position, whole = HEADER, b""
    while position + HEADER <= len(data):
        if (left := BLOCK - position % BLOCK) < HEADER:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + HEADER])
        part = data[position + HEADER : position + HEADER + length]
        if len(part) < length:
            return
        whole, position = whole + part, position + HEADER + length
        if kind in (FULL, LAST):
            yield whole
            whole = b""
