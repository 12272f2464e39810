"""Hypothesis where it is installed; where it is not, the tests that draw their input are skipped, and only they."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

try:
    from hypothesis import assume, example, given, settings
    from hypothesis import strategies as st
except ImportError:

    class _Absent:
        """Stands for a strategy, and for whatever is made of one."""

        def __getattr__(self, name: str) -> _Absent:
            return self

        def __call__(self, *args: Any, **kwargs: Any) -> _Absent:
            return self

    def _same(*args: Any, **kwargs: Any) -> Callable[[Any], Any]:
        return lambda test: test

    def given(*args: Any, **kwargs: Any) -> Any:  # type: ignore[no-redef]
        return pytest.mark.skip(reason="draws its input with hypothesis, which is not installed")

    example = settings = _same  # type: ignore[assignment]
    assume = st = _Absent()  # type: ignore[assignment]

__all__ = ["assume", "example", "given", "settings", "st"]
