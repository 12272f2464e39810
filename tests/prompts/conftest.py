from __future__ import annotations

from pathlib import Path

import pytest

from prdp_fast.core.records import Prompt
from prdp_fast.prompts import build_scene_shards, write_index, write_shards


@pytest.fixture(scope="session")
def scene_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The drawn world, built once."""
    directory = tmp_path_factory.mktemp("scenes")
    build_scene_shards(directory)
    return directory


@pytest.fixture
def small_prompts() -> list[Prompt]:
    return [Prompt(100 + number, f"ein Bär, Nummer {number}", {"style": "anime"}) for number in range(23)]


@pytest.fixture
def small_directory(tmp_path: Path, small_prompts: list[Prompt]) -> Path:
    """Set "train": 23 prompts in shards of 7, 7, 7 and 2; set "nothing": none."""
    directory = tmp_path / "small"
    entry = write_shards(small_prompts, directory, "train", shard_size=7)
    write_index(directory, {"train": entry, "nothing": write_shards([], directory, "nothing")}, "test")
    return directory
