"""What a tracker is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol


class TrackerError(Exception):
    """What is the matter with a tracker and what a user can do, in words of our own. Its cause is the library's error."""


@dataclass(frozen=True)
class RunToTrack:
    """What trackers are told of a run."""

    directory: Path
    first_epoch: int = 0  # the epoch that comes next
    recipe: Mapping[str, Any] = field(default_factory=dict)  # JSON, without what is not for others

    @property
    def name(self) -> str:
        return self.directory.resolve().name


class Tracker(Protocol):
    """One place that numbers go to. All methods run in one thread, which is not the training's; any of them may raise anything.

    After an error the same call comes again later, once, twice; then it is left out.
    """

    name: str
    # Whether it keeps what earlier starts of the run sent under an id, so that a resumed run has to go on there, and may not send
    # an epoch twice.
    remembers: bool

    def begin(self) -> None:
        """Open it. Called before anything else, and again after it has failed."""
        ...

    def arrived(self) -> int | None:
        """After `begin`, of one that remembers: the last step that earlier starts have surely brought there, -1 for none.

        None: every call that came back without an error has arrived.
        """
        ...

    def scalars(self, step: int, values: Mapping[str, float], *, whole: bool) -> None:
        """Args: step: an epoch. whole: the values are all that the epoch has; names that only earlier ones had are gone."""
        ...

    def image(self, tag: str, path: Path, step: int) -> None:
        """Args: path: of a PNG."""
        ...

    def close(self, finished: bool) -> None:
        """Args: finished: False for a run that is to go on later, or that an error has ended."""
        ...
