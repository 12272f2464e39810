"""Prompt sets of any size, for measuring what reads them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from prdp_fast.core.records import Prompt
from prdp_fast.prompts import write_index, write_shards


def made_up_prompts(count: int) -> Iterator[Prompt]:
    """Different texts of the length that people write, generated one by one."""
    for number in range(count):
        text = f"a photograph of object {number} beside object {number * 7919 % count}, soft light, detailed, 35 mm film"
        yield Prompt(number, text, {"set": "made up"})


def build_prompts(directory: Path, count: int) -> int:
    """Write a prompt set of `count` prompts. Returns: its bytes on disk."""
    entry = write_shards(made_up_prompts(count), directory, "train")
    write_index(directory, {"train": entry}, f"made-up-{count}")
    return sum(shard.bytes for shard in entry.shards)
