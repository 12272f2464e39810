"""Errors that a user can mend."""

from __future__ import annotations

import re

from prdp_fast.core.visible import visible

ENDLESS = re.compile(r"\S{400,}")  # longer than any path or address that one reads: a file's word that would fill the screen


def brief(error: Exception) -> str:
    """An error of a library in a few words, on one line."""
    return (" ".join(str(error).split()) or type(error).__name__)[:160]


class UserError(ValueError):
    """A mistake in what the user asked for or supplied, as one line: what, got, expected, next move.

    The entry points print it without a traceback and exit with status 2. What it repeats of files and servers of others commands
    no terminal.
    """

    def __init__(self, message: str) -> None:
        line = visible(" ".join(line.strip() for line in message.splitlines()))
        super().__init__(ENDLESS.sub(lambda word: f"{word[0][:200]}...{word[0][-40:]}", line))


class RewardError(UserError):
    """A reward got what it cannot score, or gave back what is no score."""


class NotFiniteError(UserError):
    """What a model computes is NaN or infinite, in so many images that going on would be for nothing."""


class OneRankError(UserError):
    """Found by one rank alone, while the others may be waiting for it in a collective: it speaks for itself and leaves."""


class AgreedError(UserError):
    """Found by one rank or several, and raised by all at one point, where the weights are those of the last finished epoch."""
