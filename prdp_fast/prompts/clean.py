"""What makes a text a prompt: one spelling to compare by, and reasons to leave a text out.

The rules know no language. They count letters, marks and digits by Unicode's categories, so that Hindi vowel signs and Chinese
sentences without a space are as good as English; what they look for is damage and noise, not style.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from itertools import pairwise
from typing import NamedTuple

MAX_CHARS = 1000  # CLIP reads about 350 characters; far beyond that a text is rarely a prompt
MOST_SYMBOLS = 0.5  # of the characters that are no spaces; weights like "((hat:1.2))" stay below
MOST_URL = 0.5  # of all characters
LONGEST_RUN = 12  # the same letter or digit in a row
MOST_IN_A_ROW = 6  # the same word
FEWEST_DIFFERENT = 0.25  # of the words, in a text of WORDS_FOR_SHARE and more
WORDS_FOR_SHARE = 20

# Left from binary data or a wrong encoding: control characters that are no white space, halves of surrogate pairs, the
# replacement character, noncharacters.
_CONTROL = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffd-\uffff]")
_URL = re.compile(r"(?:https?://|www\.)\S+", re.IGNORECASE)
_RUN = re.compile(rf"([^\W_])\1{{{LONGEST_RUN - 1}}}")

REASONS = {
    "unreadable": "no text where one was expected",
    "empty": "nothing but white space",
    "control": "control or replacement characters",
    "too short": "fewer characters than asked for",
    "too long": "more characters or tokens than asked for",
    "no letters": "not one letter of any script",
    "symbols": "mostly symbols",
    "url": "mostly a web address",
    "repetition": "a letter or a word over and over",
    "duplicate": "equal to an earlier one but for case and white space",
    "held out": "equal to a prompt of the unseen set",
}


class Limits(NamedTuple):
    """Lengths in characters of the tidied text, both ends included."""

    min_chars: int = 1
    max_chars: int = MAX_CHARS


def tidy(text: str) -> str:
    """The text as it is stored: NFC, white space of any kind collapsed to single spaces."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def comparable(tidied: str) -> str:
    """What two spellings of one prompt share: the tidied text without case."""
    return unicodedata.normalize("NFC", tidied.casefold())


def _symbols(text: str) -> int:
    """Characters that are neither spaces nor letters, marks or digits."""
    if text.isascii():
        return sum(not character.isalnum() and character != " " for character in text)
    return sum(unicodedata.category(character)[0] not in "LMN" and character != " " for character in text)


def _repeats(text: str) -> bool:
    if _RUN.search(text):
        return True
    words = text.casefold().split()
    if len(words) < MOST_IN_A_ROW:
        return False
    if len(words) >= WORDS_FOR_SHARE and len(Counter(words)) < FEWEST_DIFFERENT * len(words):
        return True
    row = 1
    for before, word in pairwise(words):
        row = row + 1 if word == before else 1
        if row == MOST_IN_A_ROW:
            return True
    return False


def check(text: str, limits: Limits) -> tuple[str, str | None]:
    """Tidy a text and look for a reason to leave it out.

    Returns: the tidied text, and a key of REASONS; None for a text that is all right.
    """
    if _CONTROL.search(text):
        return text, "control"
    tidied = tidy(text)
    if not tidied:
        return tidied, "empty"
    if len(tidied) < limits.min_chars:
        return tidied, "too short"
    if len(tidied) > limits.max_chars:
        return tidied, "too long"
    if not any(map(str.isalpha, tidied)):
        return tidied, "no letters"
    if "://" in tidied or "www." in tidied.lower():
        if sum(len(found) for found in _URL.findall(tidied)) > MOST_URL * len(tidied):
            return tidied, "url"
    if _symbols(tidied) > MOST_SYMBOLS * (len(tidied) - tidied.count(" ")):
        return tidied, "symbols"
    if _repeats(tidied):
        return tidied, "repetition"
    return tidied, None
