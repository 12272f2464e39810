"""Whether something can be written where a user wants it, found before the work, and said in one line."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from prdp_fast.core.errors import UserError
from prdp_fast.core.visible import visible

REASONS = {
    errno.EEXIST: "something that is no directory is there already",
    errno.ENOTDIR: "a part of the path is no directory",
    errno.EISDIR: "it is a directory",
    errno.ENAMETOOLONG: "the name is too long",
    errno.ELOOP: "a symbolic link leads back to itself",
}


def fault(error: OSError) -> str:
    """'PATH: reason' of an error about a file, as a person would say it."""
    reason = REASONS.get(error.errno or 0) or error.strerror or str(error)
    return reason if error.filename is None else f"{shortened(os.fspath(error.filename))}: {reason}"


def shortened(path: str | bytes | os.PathLike[str], most: int = 200) -> str:
    """A path that can be printed on a line: of one that is too long the two ends."""
    text = visible(os.fsdecode(path).encode("utf-8", "backslashreplace").decode())
    return text if len(text) <= most else f"{text[: most // 2]}...{text[-most // 4 :]}"


def why_no_directory(path: Path) -> str | None:
    """Why `path` is not, or cannot become, a directory that files can be written into; None if it seems it can.

    Nothing is made. Some file systems refuse only when it is tried, so writing can still fail.
    """
    if "\0" in str(path):
        return f"{str(path)!r} is no path"
    try:
        for place in (path, *path.absolute().parents):
            if os.path.lexists(place):
                if not place.exists():
                    return f"{shortened(place)} is a symbolic link to nothing"
                if not place.is_dir():
                    return f"{shortened(place)} is no directory"
                return None if os.access(place, os.W_OK | os.X_OK) else f"{shortened(place)} cannot be written"
            if len(os.fsencode(place.name)) > 255:
                return f"{shortened(place)}: {REASONS[errno.ENAMETOOLONG]}"
    except OSError as error:
        return fault(error)
    return None


def check_output(what: str, path: Path, advice: str = "name a directory that can be written") -> None:
    """Args: what: the option that names it, e.g. "--output". Raises: UserError if `path` cannot be a directory to write into."""
    reason = why_no_directory(path)
    if reason is not None:
        raise UserError(f"{what} {shortened(path)} cannot be used: {reason}; {advice}")


@contextlib.contextmanager
def told(what: str, advice: str) -> Iterator[None]:
    """An OSError of the block as a UserError: what, where and why, and what to do."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{what}: {fault(error)}; {advice}") from None
