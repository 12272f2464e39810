"""Weights & Biases."""

from __future__ import annotations

import os
from collections.abc import Mapping
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

    def begin(self) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # nothing goes anywhere that nobody asked for
        import wandb

        settings = self.settings
        # Without a question: nobody may be there to answer it.
        if settings.mode == "online" and not wandb.login(prompt=False):
            raise TrackerError("no API key; set WANDB_API_KEY, run 'wandb login', or set tracking.wandb.mode offline")
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

    def scalars(self, step: int, values: Mapping[str, float], *, whole: bool) -> None:
        self.run.log(dict(values), step=step)

    def image(self, tag: str, path: Path, step: int) -> None:
        import wandb

        self.run.log({tag: wandb.Image(str(path))}, step=step)

    def close(self, finished: bool) -> None:
        self.run.finish(exit_code=0 if finished else 1)
