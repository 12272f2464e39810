"""What ranks send each other, counted and predicted; the time of an epoch on more ranks, predicted and measured."""

from __future__ import annotations

import json
import subprocess

import pytest
from drive_traffic import BACKWARDS, CASES, LAYERS, WIDTH
from launching import ROOT, deepspeed_command

from prdp_fast.cost import predict_epoch

RANKS, FLOAT32 = 2, 4


@pytest.fixture(scope="module")
def counted(tmp_path_factory) -> dict[str, dict]:
    path = tmp_path_factory.mktemp("traffic") / "results.json"
    command = deepspeed_command(ROOT / "tests/drive_traffic.py", path, ranks=RANKS)
    result = subprocess.run(command, capture_output=True, text=True, cwd=path.parent, timeout=300)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return json.loads(path.read_text())


@pytest.mark.distributed
def test_collectives_of_known_size(counted: dict[str, dict]) -> None:
    """1000 float32 numbers between two ranks: half of them for every collective but the all-reduce, which is two in one."""
    for name in ("broadcast", "reduce", "all_gather", "reduce_scatter"):
        assert (counted[name]["sent"], counted[name]["whole"]) == (2000, 4000), name
        assert sum(counted[name]["calls"].values()) == 1
    assert (counted["all_reduce"]["sent"], counted["all_reduce"]["whole"]) == (4000, 4000)
    assert counted["barrier"] == {"sent": 0, "whole": 0, "calls": {}}
    assert (counted["alone"]["sent"], counted["alone"]["whole"]) == (0, 4000)


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES)
def test_what_an_update_sends_is_what_is_predicted(counted: dict[str, dict], case: str) -> None:
    parameters, stage = LAYERS * WIDTH**2, int(case[len("zero")])
    predicted = predict_epoch(
        {}, RANKS, stage, parameters, FLOAT32, 1.0, micro_batches=RANKS * BACKWARDS, coalesced=case == "zero2",
        max_live=0 if "released" in case else 10**9,
    ).communication  # fmt: skip
    if stage == 3:
        predicted -= parameters * FLOAT32 / 2  # gathered for the rollout, of which there is none here
    # Norms and flags for overflow cross too: a few bytes, where a whole copy of the gradients is 55 KB.
    assert counted[case]["sent"] == pytest.approx(predicted, abs=64)
