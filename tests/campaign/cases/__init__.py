"""Every case of the campaign, by what is done: a list a file."""

from __future__ import annotations

from campaign.cases import directories, elastic, files, launchers, rewards, signals
from campaign.scene import Case


def every() -> list[Case]:
    found = [
        *signals.CASES, *files.CASES, *directories.CASES, *rewards.CASES, *elastic.CASES, *launchers.CASES,
    ]  # fmt: skip
    names = [case.name for case in found]
    assert len(set(names)) == len(names), "two cases have one name"
    return found
