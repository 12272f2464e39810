"""What disks, copies and people do to a checkpoint's files."""

from __future__ import annotations

from pathlib import Path

KINDS = ("bit", "cut", "missing", "empty", "extra")


def damage(checkpoint: Path, name: str, kind: str) -> None:
    """Args: name: of a file in it."""
    path = checkpoint / name
    if kind == "missing":
        path.unlink()
    elif kind == "extra":
        path.with_name(f"more-{path.name}").write_bytes(path.read_bytes())
    else:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 16
        path.write_bytes({"bit": data, "cut": data[: len(data) // 2], "empty": b""}[kind])


def told(name: str, kind: str) -> str:
    """What is to be said about it."""
    return {
        "bit": f"{name} has SHA-256 ",
        "cut": f"{name} has ",
        "missing": f"{name} is missing",
        "empty": f"{name} has 0 bytes, expected ",
        "extra": f"more-{Path(name).name} is a file that manifest.json does not have",
    }[kind]
