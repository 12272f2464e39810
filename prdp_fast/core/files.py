"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A hidden path to write to in place of `path`, which takes its name when the block ends without an error.

    The bytes are on the disk before the name is, so that a crash leaves the old file or the new one; then the name is too.
    """
    path = Path(path)
    partial = partial_path(path)
    try:
        with naming(path):
            yield partial
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(partial, path)
            sync_directory(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def partial_path(path: Path) -> Path:
    """Where a file is written before it takes its name; what lies there is of a process that was killed."""
    return path.with_name(f".{path.name}.partial")


def sync_directory(path: Path) -> None:
    """Bring the names in a directory to the disk: without, a crash may take back a file's new name. Raises: OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # of file systems that sync no directories
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError of the block has `path` for its file if it has none: once a file is open, a full disk is without a name."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = os.fspath(path)
        raise


def write_text(path: Path, text: str) -> None:
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any, *, indent: int | None = 2) -> None:
    """Strict JSON (NaN and infinities become null), written whole or not at all. indent None: all in one line."""
    write_text(path, json.dumps(_strict(value), indent=indent, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Raises: OSError, ValueError."""
    text = Path(path).read_text(encoding="utf-8")
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def write_tensors(path: Path, value: Any) -> None:
    """torch.save of plain containers of tensors, numbers and texts: what `torch.load(weights_only=True)` reads.

    Raises: OSError.
    """
    import torch

    with whole(path) as partial:
        try:
            torch.save(value, partial)
        except RuntimeError as error:  # what torch makes of a full disk
            raise OSError(errno.EIO, f"torch could not write it ({' '.join(str(error).split())[:100]})") from error


def _strict(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # tensors and numpy alike
        return _strict(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value
