"""Everything that a resumed run needs beside weights and optimizer."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field, fields
from typing import Any

# Fields that checkpoints of earlier versions lack.
ADDED = ("batches", "asked", "skipped_in_row", "nonfinite_in_row", "prompt_rewards", "trackers", "skipped_shards")


@dataclass
class TrainState:
    """Progress of a run. The prompts and the noise of an epoch follow from the seed and the epoch's number alone."""

    epoch: int = 0  # epochs finished, and so the position in the prompt stream
    images: int = 0
    wall_s: float = 0.0  # over all starts of the run, when last saved
    last_drift: float | None = None  # nats, of the last epoch: how far sampler and trainer disagree on a log-prob
    micro_batch: int | None = None  # what it came down to, chosen or halved
    batches: dict[str, int] = field(default_factory=dict)  # what other phases came down to where the memory was too small
    asked: dict[str, Any] = field(default_factory=dict)  # what the recipe asked for when these were found
    skipped_in_row: int = 0  # updates since the last one that was applied
    nonfinite_in_row: int = 0  # epochs with an image that was not finite, since the last one without
    seen_rewards: dict[str, list[float]] = field(default_factory=dict)  # moments of those with a running normalisation
    prompt_rewards: dict[str, list[float]] = field(default_factory=dict)  # the newest of each prompt, for running statistics
    unet_forwards: dict[str, int] = field(default_factory=lambda: {"rollout": 0, "reference": 0, "update": 0})  # rows
    trackers: dict[str, str] = field(default_factory=dict)  # the run's id in each tracker that keeps one
    skipped_shards: list[str] | None = None  # damaged ones of the trained set, by file; None: nobody has looked
    _started: float | None = field(default=None, repr=False)  # a clock that began with the run
    _earlier_s: float = field(default=0.0, repr=False)  # wall_s of the starts before this one

    def state_dict(self) -> dict[str, Any]:
        """JSON."""
        self.wall_s = self.elapsed()
        return {name: value for name, value in asdict(self).items() if not name.startswith("_")}

    @classmethod
    def of(cls, values: dict[str, Any]) -> TrainState:
        """Raises: KeyError, TypeError."""
        state = cls()
        state.load_state_dict(values)
        return state

    def load_state_dict(self, values: dict[str, Any]) -> None:
        """Raises: KeyError if one is missing that every version has, TypeError if the epoch is no number."""
        if type(values["epoch"]) is not int:
            raise TypeError(f"its epoch is {str(values['epoch'])[:40]}, no number")
        for one in fields(self):
            if not one.name.startswith("_") and (one.name in values or one.name not in ADDED):
                setattr(self, one.name, values[one.name])

    def follow(self, asked: dict[str, Any]) -> None:
        """Forget batch sizes that were found for another request: the recipe's new one counts.

        Args: asked: settings by what they are the batch of; "micro_batch" is one. "spread" is what a rank holds of the job: with
            another one it has another memory, and all sizes are found anew.
        """
        changed = {name for name, value in asked.items() if name in self.asked and self.asked[name] != value}
        if "spread" in changed:
            changed |= {"micro_batch", *self.batches}
        if "micro_batch" in changed:
            self.micro_batch = None
        self.batches = {name: size for name, size in self.batches.items() if name not in changed}
        self.asked = asked

    def start_clock(self) -> None:
        self._started, self._earlier_s = time.monotonic() - self.wall_s, self.wall_s

    def elapsed(self) -> float:
        """Seconds of the run, its earlier starts included."""
        return self.wall_s if self._started is None else time.monotonic() - self._started

    def elapsed_here(self) -> float:
        """Seconds of this start."""
        return self.elapsed() - self._earlier_s

    def finish_epoch(self, images: int, **rows: int) -> None:
        """Args: images, rows: of the epoch, over all ranks; rows of the denoiser by phase."""
        self.epoch += 1
        self.images += images
        for phase, count in rows.items():
            self.unet_forwards[phase] += count

    def summary(self) -> dict[str, Any]:
        return {
            "epochs": self.epoch,
            "images": self.images,
            "wall_s": round(self.elapsed(), 3),
            "unet_forwards": self.unet_forwards,
        }
