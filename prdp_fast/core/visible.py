"""Text of files that others may have written, as it can be shown: nothing in it commands a terminal or turns the line around."""

from __future__ import annotations

import unicodedata

# They shape their neighbours in Persian, Hindi and families of emoji, and have no effect beyond them.
JOINERS = "\u200c\u200d"
# Control characters, marks of direction and other invisible ones, halves of surrogate pairs, separators of lines and paragraphs.
HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")


def visible(text: object, *, lines: bool = False, most: int | None = None) -> str:
    """`text` with every character that is not seen written as its escape, as `\\x1b` and `\\u202e`.

    Args:
        lines: newlines stay; otherwise the result is one line.
        most: characters; what is longer ends in "...".
    """
    given = str(text)
    shown = "".join(escape(one) if is_hidden(one) and not (lines and one == "\n") else one for one in given[:most])
    return shown if most is None or len(given) <= most else f"{shown}..."


def is_hidden(character: str) -> bool:
    return unicodedata.category(character) in HIDDEN and character not in JOINERS


def escape(character: str) -> str:
    return character.encode("unicode_escape").decode()
