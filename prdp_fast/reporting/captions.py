"""Text below pictures: in fonts that have its characters, in lines of a width, of a bounded number.

A caption is a prompt, so it may be any text. What no font at hand can draw is replaced by a mark that says so.
"""

from __future__ import annotations

import re
import subprocess
import unicodedata
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from PIL import ImageFont, features

MOST_LINES = 20  # of a caption
MOST_JOINED = 16  # characters that are kept on one line because they join: a family of emoji has 7
ELLIPSIS = "..."
SEARCHES = 8  # of the system's fonts, in one process
SEARCH_S = 5.0  # of one such search
JOINERS = "\u200c\u200d"  # which shape their neighbours and have no picture of their own
# Where a system without fontconfig keeps fonts of many scripts.
KNOWN = (
    "/System/Library/Fonts/PingFang.ttc", "/System/Library/Fonts/Hiragino Sans GB.ttc",
    "/System/Library/Fonts/Supplemental/Arial Unicode.ttf", "C:/Windows/Fonts/msyh.ttc", "C:/Windows/Fonts/malgun.ttf",
    "C:/Windows/Fonts/arial.ttf", "/usr/share/fonts/opentype/noto/NotoSansCJK-Regular.ttc",
    "/usr/share/fonts/truetype/wqy/wqy-zenhei.ttc", "/usr/share/fonts/truetype/droid/DroidSansFallbackFull.ttf",
)  # fmt: skip


class Face:
    """A font of one size, and what it can draw."""

    def __init__(self, font: Any, has: Callable[[int], bool]) -> None:
        self.font, self._has = font, has

    def has(self, character: str) -> bool:
        return self._has(ord(character))


class Typeface:
    """Faces in the order in which they are asked for a character; more are looked for on the system as characters need them."""

    def __init__(self, size: int, faces: list[Face] | None = None, *, search: bool = True) -> None:
        """Args: faces: None: Pillow's own, then matplotlib's. search: on the system, for what those lack."""
        self.size, self.search = size, search
        self.faces = [] if faces is None else list(faces)
        self._further = builtin_faces(size) if faces is None else iter(())
        if not self.faces:
            self.faces.append(next(self._further))
        self._drawable: dict[str, Face | None] = {}
        self._searches = 0

    def face(self, character: str) -> Face | None:
        """The first that has the character; None if none has."""
        if character not in self._drawable:
            found = next((face for face in self.faces if face.has(character)), None)
            while found is None and (further := next(self._further, None)) is not None:
                self.faces.append(further)
                found = further if further.has(character) else None
            if found is None and self.search and self._searches < SEARCHES:
                self._searches += 1
                found = find_face(self.size, character)
                if found is not None:
                    self.faces.append(found)
            self._drawable[character] = found
        return self._drawable[character]

    def shown(self, text: str) -> str:
        """`text` as it can be drawn: white space and control characters become single spaces, what no face has a mark."""
        words = []
        text = unicodedata.normalize("NFC", text)  # one character in place of a letter and its accent
        for word in "".join(" " if is_blank(character) else character for character in text).split():
            pieces, missing = [], 0
            for character in word:
                if unicodedata.category(character) == "Cf" or "\ufe00" <= character <= "\ufe0f":  # marks of direction, variants
                    if character in JOINERS and features.check("raqm") and not missing:
                        pieces.append(character)
                elif unicodedata.category(character) != "Cs" and self.face(character) is not None:
                    if missing:
                        pieces.append(mark(missing))
                    pieces.append(character)
                    missing = 0
                else:
                    missing += 1
            words.append("".join(pieces) + (mark(missing) if missing else ""))
        return " ".join(filter(None, words))

    def runs(self, text: str) -> Iterator[tuple[str, Face]]:
        """`text`, as `shown` gives it, in pieces of one face: of one for a word, if one has all of it, and for the next words
        too, where they and the spaces between are of it, so that those of a script from right to left are put in its order."""
        run, current = "", self.faces[0]
        for piece in re.findall(r"\s+|\S+", text):
            for part, face in self._faces_of(piece, current):
                if face is not current and run:
                    yield run, current
                    run = ""
                run, current = run + part, face
        if run:
            yield run, current

    def _faces_of(self, word: str, current: Face) -> list[tuple[str, Face]]:
        """A word, in as few faces as can be; `current` is that of the word before."""
        letters = [character for character in word if character not in JOINERS]
        if all(is_neutral(character) and current.has(character) for character in letters):
            return [(word, current)]
        for character in letters:
            self.face(character)  # which may bring a face
        whole = next((face for face in self.faces if all(map(face.has, letters))), None)
        if whole is not None:
            return [(word, whole)]
        faces: list[Face] = []
        for character in word:
            stays = faces and (character in JOINERS or unicodedata.category(character)[0] == "M")
            faces.append(faces[-1] if stays else self.face(character) or self.faces[0])
        return list(zip(word, faces, strict=True))

    def getlength(self, text: str) -> float:
        """Pixels."""
        return sum(face.font.getlength(run) for run, face in self.runs(text))

    def draw(self, canvas: Any, place: tuple[float, float], text: str, colour: tuple[int, int, int]) -> None:
        """On a PIL.ImageDraw, `place` the left end of the base line."""
        x, y = place
        for run, face in self.runs(text):
            canvas.text((x, y), run, font=face.font, fill=colour, anchor="ls")
            x += face.font.getlength(run)


def mark(count: int) -> str:
    """In place of so many characters that no font has."""
    return f"[{count} x no font]"


def is_blank(character: str) -> bool:
    """A space, or a control character: tab, newline, bell, escape."""
    return character.isspace() or unicodedata.category(character) == "Cc"


def is_neutral(character: str) -> bool:
    """Belongs to the script before it: spaces, digits, punctuation, and marks that combine with a letter."""
    return unicodedata.category(character)[0] in "ZNPM"


def wrap(text: str, font: Any, width: float, most: int | None = None) -> list[str]:
    """`text` in lines of at most `width` pixels, broken at spaces, and inside a word that is wider than a line.

    A letter keeps the marks that combine with it, so a line of one letter may be wider.

    Args:
        font: measures with `getlength`.
        most: lines; the last one then ends in an ellipsis. None: as many as it takes.
    """
    lines: list[str] = []
    current = ""
    for word in text.split():
        if most is not None and len(lines) > most:
            break
        joined = f"{current} {word}" if current else word
        if fitting(joined, font, width) == len(joined):
            current = joined
            continue
        if current:
            lines.append(current)
        while (cut := fitting(word, font, width)) < len(word) and (most is None or len(lines) <= most):
            lines.append(word[:cut])
            word = word[cut:]
        current = word
    lines += [current] if current else []
    if most is not None and len(lines) > most:
        last = lines[most - 1]
        while last and font.getlength(last + ELLIPSIS) > width:
            last = last[:-1]
        lines = [*lines[: most - 1], last + ELLIPSIS]
    return lines


def fitting(text: str, font: Any, width: float) -> int:
    """How many characters of `text`, from its start, are at most `width` wide: at least one letter with its marks.

    Widths grow with the text to within kerning, so the end is found by doubling and bisection: no more is measured than a few
    times what fits, however long the text is.
    """
    low, high = 0, 8  # characters that fit, and that may not
    while high < len(text) and font.getlength(text[:high]) <= width:
        low, high = high, 2 * high
    high = min(high, len(text))
    if font.getlength(text[:high]) <= width:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if font.getlength(text[:middle]) <= width else (low, middle)
    if (cut := next((cut for cut in range(low, max(0, low - MOST_JOINED), -1) if not joins(text, cut)), 0)) > 0:
        return cut
    least = max(1, low)
    return next((cut for cut in range(least, min(len(text), least + MOST_JOINED)) if not joins(text, cut)), least)


def joins(text: str, position: int) -> bool:
    """Whether a line must not begin at this position: with a combining mark, or inside a sequence that is joined."""
    return unicodedata.category(text[position])[0] == "M" or text[position] in JOINERS or text[position - 1] == "\u200d"


# Fonts


@cache
def typeface(size: int) -> Typeface:
    return Typeface(size)


def builtin_faces(size: int) -> Iterator[Face]:
    """Pillow's own font, of Latin letters, and the one that matplotlib brings, of many alphabets."""
    default = ImageFont.load_default(size)
    yield Face(default, lambda number: 32 <= number < 127)
    try:
        import matplotlib

        path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    except ImportError:
        return
    if (face := open_face(path, 0, size)) is not None:
        yield face


def open_face(path: Path | str, index: int, size: int) -> Face | None:
    """None for a file that is no font, or one of bitmaps in other sizes, as coloured emoji are."""
    try:
        from matplotlib.ft2font import FT2Font

        font = ImageFont.truetype(str(path), size, index=index)
        # Only newer ones read another than the first font of a collection; those of one family have the same characters.
        glyphs = FT2Font(str(path))
        return Face(font, lambda number: glyphs.get_char_index(number) != 0)
    except (OSError, RuntimeError, ImportError, ValueError):
        return None


def find_face(size: int, character: str) -> Face | None:
    """A font of this system that has the character."""
    places = [*matching_files(character), *((path, 0) for path in KNOWN if Path(path).is_file())]
    for path, index in places:
        face = open_face(path, index, size)
        if face is not None and face.has(character):
            return face
    return None


def matching_files(character: str) -> list[tuple[str, int]]:
    """Files and indices of fonts that fontconfig has for a character; none without fontconfig."""
    command = ["fc-match", "--format=%{file}\t%{index}\n", f":charset={ord(character):x}"]
    try:
        found = subprocess.run(command, capture_output=True, timeout=SEARCH_S, check=True).stdout.decode("utf-8", "replace")
    except (OSError, subprocess.SubprocessError):
        return []
    pairs = [line.split("\t") for line in found.splitlines() if "\t" in line]
    return [(path, int(index) & 0xFFFF if index.isdigit() else 0) for path, index in pairs]  # the high bits are of a variation
