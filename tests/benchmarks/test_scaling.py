"""What ranks send each other, counted and predicted; the time of an epoch on more ranks, predicted and measured."""

from __future__ import annotations

import json
import subprocess
import sys

import launching
import pytest
from drive_traffic import BACKWARDS, CASES, LAYERS, WIDTH

from benchmarks.epoch.scaling import Launch, conclude, describe
from benchmarks.lib import command
from benchmarks.lib.command import ROOT
from prdp_fast.planning.cost import predict_epoch

pytestmark = pytest.mark.slow

RANKS, FLOAT32 = 2, 4


@pytest.fixture(scope="module")
def counted(tmp_path_factory) -> dict[str, dict]:
    path = tmp_path_factory.mktemp("traffic") / "results.json"
    launching.run(ROOT / "tests/benchmarks/drive_traffic.py", path, ranks=RANKS, cwd=path.parent)
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


def job(ranks: int, epochs: list[float], rollout: list[float], update: list[float], reduction: float, sent: float) -> Launch:
    """Of a million parameters at stage 2, eight micro-batches on one rank."""
    phases = {"rollout": rollout, "update": update}
    return Launch(ranks, epochs, phases, [1.0] * len(epochs), 1_000_000, 2, True, 8 // ranks, reduction, sent)


def test_the_verdict_on_numbers_made_up() -> None:
    """4 MB all-reduced between two ranks in 0.1 s is 40 MB/s a link. One epoch of 4 + 6 s is 5 s on each of two, and an update
    sends the gradients twice over half a ring and the weights once: 6 MB, 0.15 s."""
    single = [job(1, [10.0, 10.2], [4.0, 4.2], [6.0, 6.0], 0.0, 0.0), job(1, [10.0, 11.0], [3.9, 4.0], [6.0, 6.1], 0.0, 0.0)]
    several = [job(2, [5.0, 5.2, 5.1], [2.0] * 3, [3.0] * 3, reduction, 6e6) for reduction in (0.09, 0.11)]
    verdict = conclude(single, several)
    assert verdict.bandwidth == pytest.approx(40e6)
    assert verdict.predicted_communication == pytest.approx(0.15)
    assert verdict.predicted == pytest.approx(5.15)
    assert (verdict.one_rank, verdict.measured) == (pytest.approx(10.1), 5.1)
    assert verdict.error == pytest.approx(5.15 / 5.1 - 1)
    assert verdict.speed_up == pytest.approx(10.1 / 5.1)
    assert verdict.predicted_bytes == pytest.approx(6e6) == verdict.counted_bytes
    assert "prediction error: +1.0%, over 4 epochs of 1 rank and 6 of 2" in describe(verdict, 2)
    assert not verdict.disturbed


def test_epochs_that_another_process_disturbed_do_not_count() -> None:
    single, several = job(1, [10.0, 17.0], [4.0, 9.0], [6.0, 8.0], 0.0, 0.0), job(2, [5.0, 9.0], [2.0, 4.0], [3.0, 5.0], 0.1, 6e6)
    single.processor_share, several.processor_share = [0.99, 0.7], [0.97, 0.6]
    verdict = conclude([single], [several])
    assert (verdict.one_rank, verdict.measured, verdict.disturbed) == (10.0, 5.0, False)
    assert verdict.predicted == pytest.approx(5.15)
    several.processor_share = [0.8, 0.6]  # none is left: all count, and it is said
    verdict = conclude([single], [several])
    assert (verdict.one_rank, verdict.measured, verdict.disturbed) == (10.0, 7.0, True)
    assert "the machine was busy" in describe(verdict, 2)


@pytest.mark.slow
@pytest.mark.distributed
def test_an_epoch_on_two_ranks_is_predicted_and_measured(tmp_path) -> None:
    output = tmp_path / "scaling.json"
    words = [
        sys.executable, "-m", "benchmarks.epoch.scaling", "--launches", "1", "--rounds", "1", "--output", str(output),
        "--set", "schedule.prompts_per_epoch=2", "--set", "schedule.images_per_prompt=2",
        "--set", "performance.fuse_qkv=on",  # joined weights are no further ones
    ]  # fmt: skip
    result = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, timeout=400, env=command.environment())
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    found = json.loads(output.read_text())
    verdict = found["verdict"]
    assert [found[name][0]["ranks"] for name in ("one_rank", "several_ranks")] == [1, 2]
    assert verdict["counted_bytes"] == pytest.approx(verdict["predicted_bytes"], rel=1e-4)
    assert verdict["measured"] > 0 and 0 < verdict["predicted_communication"] < verdict["predicted"]
    assert found["machine"]["deepspeed"] and "--launches 1" in found["command"]
    assert "prediction error" in result.stdout
