"""Nearly right input of every kind ends well or in one line: no traceback, no half-written file.

`make fuzz` reads 100,000 of them; here it is some dozens of each kind. A failure prints the input, as small as
hypothesis can make it.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from fuzz.targets import TOLD, Target, targets
from hypothesis import HealthCheck, given, seed, settings

NAMES = [
    "recipe", "recipe, bytes", "--set", "DeepSpeed JSON", "DeepSpeed JSON, bytes", "study", "shard index", "shard",
    "shard, unpacked", "text file of prompts", "run.json", "metrics.jsonl", "manifest", "manifest, forged", "reward request",
    "reward request, bytes", "image of a request", "reward answer", "reward answer, bytes",
]  # fmt: skip
INPUTS = int(os.environ.get("PRDP_FUZZ_INPUTS", "60"))  # of each kind
SEED = int(os.environ.get("PRDP_FUZZ_SEED", "0"))


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Target]:
    return {target.name: target for target in targets(tmp_path_factory.mktemp("fuzz"))}


def test_every_target_is_tried(known: dict[str, Target]) -> None:
    assert list(known) == NAMES


@pytest.mark.timeout(3600)
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", NAMES)
def test_it_is_read_or_refused_in_one_line(known: dict[str, Target], name: str, tmp_path: Path) -> None:
    target = known[name]

    @seed(SEED)
    @settings(max_examples=INPUTS, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(target.inputs)
    def attempt(value: Any) -> None:
        directory = tmp_path / "one"
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        told = "fine"
        try:
            target.read(value, directory)
        except TOLD as error:
            told = str(error)
        assert told.strip() and len(told.splitlines()) == 1 and len(told) < 4000, told
        left = [path.name for path in directory.rglob("*") if path.name.endswith((".partial", ".part", ".tmp"))]
        assert left == [], "half-written files"

    attempt()
