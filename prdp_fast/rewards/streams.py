"""sys.stdout, sys.stderr and the descriptors below them, as they were before somebody else's code ran."""

from __future__ import annotations

import io
import os
import sys
from typing import Any, NamedTuple


class Stream(NamedTuple):
    """sys.stdout or sys.stderr as it was found."""

    stream: Any
    number: int | None  # the descriptor that it writes to
    closed: bool
    form: tuple[Any, ...]  # encoding, errors, line_buffering, write_through

    @classmethod
    def of(cls, name: str) -> Stream | None:
        stream = getattr(sys, name, None)
        if stream is None:
            return None
        closed = _is_closed(stream)
        if closed:
            return cls(stream, None, closed, ())
        try:
            number = stream.fileno()
        except (AttributeError, OSError, ValueError):  # of a notebook, or a buffer in memory
            number = None
        names = ("encoding", "errors", "line_buffering", "write_through")
        return cls(stream, number, closed, tuple(getattr(stream, attribute, None) for attribute in names))

    def put(self, name: str) -> None:
        """The same object again, which logging handlers and progress bars hold. Raises: OSError, ValueError."""
        # Another wrapper around the same buffer closes that buffer when it goes, which is here.
        setattr(sys, name, self.stream)
        if self.closed or not isinstance(self.stream, io.TextIOWrapper):
            return
        encoding, errors, line_buffering, write_through = self.form
        if not _is_closed(self.stream):
            self.stream.reconfigure(encoding=encoding, errors=errors, line_buffering=line_buffering, write_through=write_through)
            return
        if self.number is None:
            raise ValueError("it is closed, and was no file that can be opened again")
        # Python's own standard streams leave their descriptor open when they are closed.
        buffer = open(self.number, "wb", buffering=0 if write_through else -1, closefd=False)  # noqa: SIM115
        io.TextIOWrapper.__init__(
            self.stream, buffer, encoding=encoding, errors=errors, line_buffering=line_buffering, write_through=write_through
        )


class Descriptor:
    """A descriptor's file, held open by a copy. Two are equal if they lead to the same file."""

    def __init__(self, number: int) -> None:
        """Raises: OSError if it is not open."""
        self.number, self.copy = number, -1
        self.copy = os.dup(number)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Descriptor) and os.path.sameopenfile(self.copy, other.copy)

    __hash__ = None  # type: ignore[assignment]

    def __del__(self) -> None:
        if self.copy >= 0:
            os.close(self.copy)

    def put(self) -> None:
        os.dup2(self.copy, self.number)


def _is_closed(stream: Any) -> bool:
    try:
        return bool(getattr(stream, "closed", False))
    except ValueError:  # its buffer has been taken away
        return True
