"""What files hold, in a few characters, so that a run can tell whether something was exchanged under its path."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from prdp_fast.core.files import read_json, write_json

DIGITS = 16  # hexadecimal, of SHA-256
READ_ONCE = 2**23  # bytes: the digest of a file from this size on is kept, for as long as the file is the same
MOST_KEPT = 10_000
CHUNK = 1 << 22


def file_digest(path: Path) -> str:
    """Of a file's bytes. A large one that has not been touched since is not read again. Raises: OSError."""
    status = path.stat()
    key = str(path.resolve())
    # The time of change moves with every exchange, also with those that set the time of modification back.
    stamp = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
    if status.st_size < READ_ONCE:
        return _read(path)
    kept = _kept()
    entry = kept.get(key)
    if isinstance(entry, list) and len(entry) == 2 and entry[0] == stamp and isinstance(entry[1], str):
        return entry[1]
    found = _read(path)
    with contextlib.suppress(OSError, RuntimeError):  # where it cannot be kept it is computed again
        place = _place()
        place.parent.mkdir(parents=True, exist_ok=True)
        write_json(place, dict(list((_kept() | {key: [stamp, found]}).items())[-MOST_KEPT:]))
    return found


def files_digest(files: Iterable[tuple[str, Path]]) -> str:
    """Of several files and the names they go by. Raises: OSError."""
    content = "".join(f"{name}\0{file_digest(path)}\n" for name, path in sorted(files))
    return text_digest(content)


def text_digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:DIGITS]


def tensors_digest(value: Any) -> str:
    """SHA-256 of what nested dicts and lists of tensors, numbers and texts hold, whatever file or device they are in."""
    total = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, dict):
            total.update(f"dict {len(value)}\0".encode())
            for name in sorted(value):
                add(name)
                add(value[name])
        elif isinstance(value, (list, tuple)):
            total.update(f"list {len(value)}\0".encode())
            for item in value:
                add(item)
        elif hasattr(value, "numpy"):
            array = value.detach().cpu().contiguous().numpy()
            total.update(f"tensor {array.dtype} {array.shape}\0".encode() + array.tobytes())
        else:
            total.update(f"{value!r}\0".encode("utf-8", "surrogatepass"))

    add(value)
    return total.hexdigest()


def content_sha256(path: Path) -> tuple[int, str]:
    """Bytes of a file, and their SHA-256: the fastest of the standard library's where the processor has instructions for it.

    Raises: OSError.
    """
    total, size, buffer = hashlib.sha256(), 0, memoryview(bytearray(CHUNK))
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            total.update(buffer[:count])
            size += count
    return size, total.hexdigest()


def _read(path: Path) -> str:
    return content_sha256(path)[1][:DIGITS]


def _place() -> Path:
    """Raises: RuntimeError without a home directory."""
    return Path(os.environ.get("PRDP_CACHE") or Path.home() / ".cache" / "prdp_fast") / "digests.json"


def _kept() -> dict[str, object]:
    try:
        kept = read_json(_place())
    except (OSError, ValueError, RuntimeError):
        return {}
    return kept if isinstance(kept, dict) else {}
