"""Files of text as they come: what is none is refused, and any encoding with a mark and any system's line ends are read."""

from __future__ import annotations

import codecs
import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from prdp_fast.core.errors import UserError

PIECE = 1 << 18  # bytes
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip


def refuse_other(path: str | Path, head: bytes) -> None:
    """Raises: UserError if a file that begins so stands for one that was never fetched, or is no data at all."""
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        raise UserError(f"{path} is a pointer of git-lfs and not the file itself; run 'git lfs pull' where it comes from")
    if head.startswith(b"\x00\x05\x16\x07"):
        raise UserError(f"{path} holds what macOS keeps beside a file; give the file of that name without '._'")
    if head.lstrip(b"\xef\xbb\xbf \t\r\n")[:14].lower().startswith((b"<!doctype html", b"<html")):
        raise UserError(f"{path} is a web page, perhaps of an error; fetch the file again")


def encoding_of(path: Path) -> str:
    """By its mark: utf-16, utf-32, or utf-8-sig. Raises: UserError as `refuse_other`; OSError."""
    with path.open("rb") as file:
        head = file.read(1024)
    refuse_other(path, head)
    if path.suffix == ".gz":
        try:
            with gzip.open(path, "rb") as packed:
                head = packed.read(1024)
        except (OSError, EOFError, zlib.error):
            return "utf-8-sig"  # whoever reads it says what is wrong
        refuse_other(path, head)
    return encoding_of_bytes(head)


def encoding_of_bytes(head: bytes) -> str:
    return next((name for mark, name in _MARKS if head.startswith(mark)), "utf-8-sig")


def split_lines(file: IO[bytes], longest: int) -> Iterator[bytes | None]:
    """Lines without their ends: LF, CR LF, or CR. None stands for one of more than `longest` bytes, its end counted."""
    rest, is_long = b"", False
    while piece := file.read(min(PIECE, longest)):
        if piece.endswith(b"\r"):
            piece += file.read(1)  # an LF that belongs to it
        lines = (rest + piece).splitlines(keepends=True)
        rest = b"" if lines[-1].endswith((b"\n", b"\r")) else lines.pop()
        for line in lines:
            yield None if is_long or len(line) > longest else line.rstrip(b"\r\n")
            is_long = False
        if len(rest) >= longest:
            rest, is_long = b"", True
    if rest or is_long:
        yield None if is_long else rest
