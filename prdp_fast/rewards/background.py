"""Scoring beside the denoiser: one worker thread, one call at a time."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from prdp_fast.core.records import Scores


class BackgroundScores:
    """Runs a scoring call while its caller goes on, or right away where there is nothing to gain."""

    def __init__(self, in_background: bool) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="rewards") if in_background else None

    def start(self, score: Callable[[], Scores]) -> Callable[[], Scores]:
        """Returns: a function that waits for the scores; what `score` raised is raised there."""
        if self._executor is None:
            return score
        future: Future[Scores] = self._executor.submit(score)
        return future.result

    def close(self) -> None:
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)
