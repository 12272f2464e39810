"""The trackers of a run, as its recipe names them."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from prdp_fast.config.tracking import TrackingSettings
from prdp_fast.core.run_directory import TRACKERS
from prdp_fast.training.trackers.base import RunToTrack, Tracker
from prdp_fast.training.trackers.feed import Feed, Sent
from prdp_fast.training.trackers.mlflow import Mlflow
from prdp_fast.training.trackers.prometheus import Prometheus
from prdp_fast.training.trackers.tensorboard import TensorBoard
from prdp_fast.training.trackers.wandb import Wandb

CLOSING_S = 20.0  # that trackers may take together at the end of a run


ROW_ITSELF = ("schema", "epoch")  # names in a row that are no numbers of the epoch


def send_row(step: int, row: Mapping[str, float], tracker: Tracker) -> None:
    tracker.scalars(step, row, whole=True)


class Trackers:
    """All of them, on rank 0. Nothing here waits or raises, but `close`, which waits for CLOSING_S at most.

    `run_ids` has the ids of trackers that remember: a run that goes on with them goes on in the same tracker's run.
    """

    def __init__(
        self, settings: TrackingSettings, run: RunToTrack, say: Callable[[str], None], run_ids: Mapping[str, str] | None = None
    ) -> None:
        """Args: run_ids: as the checkpoint has them."""
        self.run_ids: dict[str, str] = {}
        self.feeds: list[Feed] = []

        def add(name: str, make: Callable[[str], Tracker]) -> None:
            sent = Sent.read(run.directory / TRACKERS / f"{name}.json", (run_ids or {}).get(name), partial(secrets.token_hex, 6))
            self.run_ids[name] = sent.run_id
            self.feeds.append(Feed(make(sent.run_id), say, sent))

        if settings.tensorboard:
            self.feeds.append(Feed(TensorBoard(run), say))
        if settings.wandb is not None:
            add("wandb", partial(Wandb, settings.wandb, run))
        if settings.mlflow is not None:
            add("mlflow", partial(Mlflow, settings.mlflow, run))
        if settings.prometheus is not None:
            self.feeds.append(Feed(Prometheus(settings.prometheus, run), say))

    def epoch(self, step: int, row: Mapping[str, float]) -> None:
        for feed in self.feeds:
            feed.put("epochs", step, partial(send_row, step, row))

    def catch_up(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Epochs of earlier starts, for those that remember: what has not come there is sent now.

        Args: rows: of metrics.jsonl, whose null is a NaN.
        """
        for feed in self.feeds:
            for row in rows if feed.sent is not None else ():
                values = {name: math.nan if value is None else value for name, value in row.items() if name not in ROW_ITSELF}
                feed.put("epochs", row["epoch"], partial(send_row, row["epoch"], values))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for feed in self.feeds:
            feed.put("scalars", step, lambda tracker: tracker.scalars(step, values, whole=False))

    def image(self, tag: str, path: Path, step: int) -> None:
        for feed in self.feeds:
            feed.put("images", step, lambda tracker: tracker.image(tag, path, step))

    def close(self, finished: bool) -> None:
        end = time.monotonic() + CLOSING_S
        for feed in self.feeds:
            feed.finish(finished)
        for feed in self.feeds:
            feed.join(max(end - time.monotonic(), 0.1))
        self.feeds = []
