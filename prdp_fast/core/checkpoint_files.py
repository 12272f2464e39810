"""The files of checkpoints, and what proves that one is whole: a manifest with size and hash of every file, written last.

A manifest finds what a disk, a copy or a full file system did to a checkpoint. It is no signature: who can write the files can
write the manifest too.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from prdp_fast.core.digest import content_sha256
from prdp_fast.core.errors import brief
from prdp_fast.core.files import read_json, sync_directory, write_json

STATE = "state.json"  # progress of the run
MANIFEST = "manifest.json"
SIZES = "files"  # in STATE of earlier versions, which wrote no manifest: bytes of the other files by name
PROVEN = "manifest"  # in STATE: true if a manifest belongs to the checkpoint
DAMAGED = "damaged-"  # before the name of one that is set aside
VERSION, HASH = 1, "sha256"

_NAME = re.compile(r"epoch-(\d{6,})")


@dataclass(frozen=True)
class Written:
    """A file as it was written."""

    size: int
    sha256: str | None  # None in checkpoints of earlier versions


@dataclass(frozen=True)
class Best:
    """The best evaluation of a run so far. A checkpoint was saved for it at once, or as soon as one could be."""

    metric: str  # "evaluation/unseen"
    value: float


Files = dict[str, Written]  # by path in the checkpoint


def name_of(epoch: int) -> str:
    return f"epoch-{epoch:06d}"


def epoch_of(checkpoint: Path) -> int:
    """By its directory's name."""
    found = _NAME.fullmatch(checkpoint.name.removeprefix(DAMAGED))
    assert found is not None, checkpoint
    return int(found[1])


def find(directory: Path) -> list[Path]:
    """Checkpoints in a run's directory of checkpoints, whole or not, oldest first; none that was set aside."""
    found = [path for path in directory.glob("epoch-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=epoch_of)


def find_damaged(directory: Path) -> list[Path]:
    """Checkpoints that were set aside, oldest first."""
    found = [path for path in directory.glob(f"{DAMAGED}epoch-*") if _NAME.fullmatch(path.name.removeprefix(DAMAGED))]
    return sorted(found, key=epoch_of)


# Written.


def finish_file(path: Path) -> Written:
    """Bring a file that was just written to the disk, and measure it. Raises: OSError."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return measure(path)


def measure(path: Path) -> Written:
    """Raises: OSError."""
    size, sha256 = content_sha256(path)
    return Written(size, sha256)


def write_manifest(checkpoint: Path, files: Files, *, kept: bool, best: Best | None = None) -> None:
    """The last file of a checkpoint; the others are on the disk already. Raises: OSError.

    Args:
        kept: it outlives newer ones.
        best: it outlives them until another one has a better evaluation.
    """
    for folder in {checkpoint / parent for name in files for parent in PurePosixPath(name).parents}:
        sync_directory(folder)
    entries = {name: {"bytes": file.size, HASH: file.sha256} for name, file in sorted(files.items())}
    content: dict[str, Any] = {"version": VERSION, "kept": kept, "files": entries}
    if best is not None:
        content["best"] = asdict(best)
    write_json(checkpoint / MANIFEST, content | {HASH: _digest(content)})


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


# Read.


def read_manifest(checkpoint: Path) -> tuple[Files, bool]:
    """Its files, and whether it outlives newer ones. Raises: OSError, ValueError if it is damaged."""
    content = _content(checkpoint)
    files: Files = {}
    try:
        for name, entry in content["files"].items():
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or not path.parts or not isinstance(entry["bytes"], int):
                raise ValueError(f"{name[:60]!r} is no file of a checkpoint")
            files[name] = Written(entry["bytes"], str(entry[HASH]))
        return files, content["kept"] is True
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"it is incomplete ({error!r})") from None


def _content(checkpoint: Path) -> dict[str, Any]:
    """Of a manifest, whose own hash is right. Raises: OSError, ValueError."""
    found = read_json(checkpoint / MANIFEST)
    if not isinstance(found, dict):
        raise ValueError("it is no JSON object")
    if found.get("version") != VERSION:
        raise ValueError(f"its version is {str(found.get('version'))[:20]}, expected {VERSION}")
    content = {name: value for name, value in found.items() if name != HASH}
    if found.get(HASH) != _digest(content):
        raise ValueError(f"its own {HASH} is not that of its content")
    return content


def outlives(checkpoint: Path) -> bool:
    """Whether a checkpoint is kept beside the newest ones."""
    try:
        return read_manifest(checkpoint)[1]
    except (OSError, ValueError):
        return False


def best_of(checkpoint: Path) -> Best | None:
    """What a checkpoint was the best by when it was saved; None if it was not."""
    try:
        found = _content(checkpoint)["best"]
        return Best(str(found["metric"]), float(found["value"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def find_best(directory: Path, metric: str | None = None) -> Path | None:
    """The checkpoint with the best evaluation of a run, whole or not.

    Args: metric: None: the one that the newest checkpoint with a best evaluation has.
    """
    found = [(path, best) for path in find(directory) if (best := best_of(path)) is not None]
    if metric is None and found:
        metric = found[-1][1].metric
    return max((one for one in found if one[1].metric == metric), key=lambda one: one[1].value, default=(None, None))[0]


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Raises: OSError, ValueError if it is damaged."""
    found = read_json(checkpoint / STATE)
    if not isinstance(found, dict):
        raise ValueError("it is no JSON object")
    return found


def look(checkpoint: Path) -> tuple[Files, str | None]:
    """What a checkpoint consists of, and what is wrong with it as far as names and sizes tell; None if nothing is."""
    if not (checkpoint / STATE).is_file():
        return {}, f"{STATE} is missing"
    proven = (checkpoint / MANIFEST).exists()
    if proven and not (checkpoint / MANIFEST).is_file():  # reading a pipe would wait for ever
        return {}, f"{MANIFEST} is no file"
    try:
        files = read_manifest(checkpoint)[0] if proven else {}
    except (OSError, ValueError) as error:
        return {}, f"{MANIFEST} cannot be read ({_why(checkpoint / MANIFEST, error)})"
    if proven:
        fault = next(filter(None, (size_fault(checkpoint, name, file) for name, file in sorted(files.items()))), None)
        return files, fault or _unlisted(checkpoint, files)
    try:
        state = read_state(checkpoint)
        files = {name: Written(int(size), None) for name, size in state.get(SIZES, {}).items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return {}, f"{STATE} cannot be read ({_why(checkpoint / STATE, error)})"
    if state.get(PROVEN):
        return {}, f"{MANIFEST} is missing"
    return files, next(filter(None, (size_fault(checkpoint, name, file) for name, file in sorted(files.items()))), None)


def size_fault(checkpoint: Path, name: str, expected: Written) -> str | None:
    """What is wrong with one file as far as its size tells; None if nothing is."""
    path = checkpoint / name
    try:
        found = path.stat().st_size if path.is_file() else None
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    if found is None:
        return f"{name} is missing"
    return None if found == expected.size else f"{name} has {found:,} bytes, expected {expected.size:,}"


def content_fault(checkpoint: Path, files: Iterable[tuple[str, Written]]) -> str | None:
    """The first file that does not hold what was written, read to its end; None if all do."""
    for name, expected in files:
        if fault := size_fault(checkpoint, name, expected):
            return fault
        if expected.sha256 is None:
            continue
        try:
            found = measure(checkpoint / name).sha256
        except OSError as error:  # of a disk that cannot read it
            return f"{name} cannot be read ({error.strerror or error})"
        if found != expected.sha256:
            return f"{name} has SHA-256 {str(found)[:16]}..., expected {expected.sha256[:16]}..."
    return None


def share(files: Files, number: int, of: int) -> list[tuple[str, Written]]:
    """What reader `number` of so many reads: about as many bytes as each other one."""
    loads = [0] * of
    shares: list[list[tuple[str, Written]]] = [[] for _ in range(of)]
    for name, file in sorted(files.items(), key=lambda item: (-item[1].size, item[0])):
        least = loads.index(min(loads))
        loads[least] += file.size
        shares[least].append((name, file))
    return shares[number]


def _unlisted(checkpoint: Path, files: Files) -> str | None:
    """A file that was not written with the others. What is hidden, no reader of checkpoints looks at."""
    for path in sorted(checkpoint.rglob("*")):
        name = path.relative_to(checkpoint)
        if (
            not path.is_dir()
            and name.as_posix() not in {*files, MANIFEST}
            and not any(part.startswith(".") for part in name.parts)
        ):
            return f"{name.as_posix()} is a file that {MANIFEST} does not have"
    return None


def _why(path: Path, error: Exception) -> str:
    """In a few words."""
    if path.is_file() and not path.stat().st_size:
        return "it is empty"
    return brief(error)
