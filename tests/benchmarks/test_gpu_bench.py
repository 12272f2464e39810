"""The epoch benchmark of a GPU: what it counts, when it stops, and that it reports no speed-up of paths that disagree."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.epoch import gpu_bench
from benchmarks.epoch.gpu_bench import PHASES, results, rounds_in_time, speed_ups, table
from benchmarks.epoch.truth import Agreement
from benchmarks.lib import command

pytestmark = pytest.mark.slow

SMALL = ["--preset", "tiny", "--steps", "2", "--prompts", "1", "--images-per-prompt", "2", "--batch", "2", "--rounds", "2"]


def test_a_path_is_judged_by_its_distance_from_the_truth() -> None:
    sound = Agreement(4, {"rollout": 0.014, "reference": 0.01, "update": 0.01}, 0.14, plain_output=0.01, plain_gradient=0.1)
    assert sound.fault() is None
    assert "output of the rollout is off by 1.60e-02" in str(replace(sound, outputs={"rollout": 0.016}).fault())
    assert "gradient is off by 1.60e-01" in str(replace(sound, gradient=0.16).fault())
    nan = float("nan")
    assert replace(sound, outputs={"reference": nan}).fault() and replace(sound, gradient=nan).fault()


class Clock:
    def __init__(self) -> None:
        self.seconds = 0.0

    def takes(self, seconds: float):
        def call() -> float:
            self.seconds += seconds
            return 1e3 * seconds

        return call


def test_no_round_begins_that_would_not_end_in_time() -> None:
    clock, told = Clock(), []
    contestants = {"eager": dict.fromkeys(PHASES, clock.takes(2.0)), "full": dict.fromkeys(PHASES, clock.takes(1.0))}
    times, finished = rounds_in_time(contestants, 5, lambda: 30.0 - clock.seconds, told.append)
    assert finished == 3 and told == [1, 2, 3]  # of 9 s each: the fourth would end at 36 s
    assert all(len(samples) == 3 for phases in times.values() for samples in phases.values())
    assert rounds_in_time(contestants, 2, lambda: 1e9, told.append)[1] == 2
    assert rounds_in_time(contestants, 2, lambda: -1.0, told.append)[1] == 0


def test_rates_and_ratios() -> None:
    eager = {"rollout": [1000.0, 2000.0, 1000.0], "reference": [1000.0, 2000.0, 1000.0], "update": [2000.0, 4000.0, 2000.0]}
    full = {"rollout": [500.0, 500.0, 500.0], "reference": [500.0, 1000.0, 500.0], "update": [1000.0, 4000.0, 500.0]}
    assert speed_ups({"eager": eager, "full": full}) == {
        "rollout": 2.0, "reference": 2.0, "update": 2.0, "epoch": 2.0,  # 4000/2000, 8000/5500, 4000/1500
    }  # fmt: skip
    found = results(full, {"rollout": 2.0, "reference": 2.0, "update": 6.0}, images=8, peak=20.0)
    assert (found["rollout"].tflop_per_s, found["rollout"].share_of_peak, found["rollout"].images_per_s) == (4.0, 0.2, 16.0)
    assert (found["epoch"].median_ms, found["epoch"].tflop_per_s) == (2000.0, 5.0)
    both = {"eager": results(eager, {"rollout": 2.0, "reference": 2.0, "update": 6.0}, 8, 20.0), "full": found}
    assert "2.00x" in table(both, speed_ups({"eager": eager, "full": full}))


def run(arguments: list[str], prelude: str = "") -> subprocess.CompletedProcess[str]:
    """The script on a CPU. prelude: what is changed in it first."""
    code = f"import sys; from benchmarks.epoch import gpu_bench\n{prelude}\nsys.exit(gpu_bench.main({arguments!r}))"
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=command.environment()
    )  # fmt: skip


@pytest.mark.slow
def test_it_runs_and_its_numbers_fit_together(tmp_path: Path) -> None:
    output = tmp_path / "epoch.json"
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.epoch.gpu_bench", *SMALL, "--output", str(output)],
        capture_output=True, text=True, timeout=300, env=command.environment(),
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    found = json.loads(output.read_text())
    assert (found["status"], found["rounds"], found["images"]) == ("measured", 2, 2)
    assert found["agreement"]["gradient"] <= 1e-4 and found["agreement"]["plain_gradient"] <= 1e-4  # float32
    assert list(found["speed_up"]) == [*PHASES, "epoch"]
    for path in gpu_bench.PATHS:
        assert [len(found["paths"][path]["times"][phase]) for phase in PHASES] == [2, 2, 2]
        assert found["results"][path]["epoch"]["images_per_s"] > 0
    assert found["paths"]["eager"]["choices"]["attention"]["value"] == "sdpa"
    assert found["paths"]["eager"]["choices"]["fused_optimizer"]["value"] == "off"
    # 2 images, 2 steps, both guided; the last of them has no density. A backward is twice a forward.
    tflop = found["tflop"]
    assert (tflop["reference"], tflop["update"]) == pytest.approx((tflop["rollout"] / 2, 1.5 * tflop["rollout"]))
    assert "images/s" in result.stdout


@pytest.mark.slow
def test_paths_that_disagree_have_no_speed_up(tmp_path: Path) -> None:
    """The full path's reference is a little off, as a wrong kernel would make it."""
    output = tmp_path / "epoch.json"
    prelude = (
        "import torch; from benchmarks.epoch import workload\n"
        "build = workload.Workload.build\n"
        "class Off(workload.Workload):\n"
        "    @classmethod\n"
        "    def build(cls, preset, overrides, **options):\n"
        "        built = build(preset, overrides, **options)\n"
        "        with torch.no_grad():\n"
        "            next(built.trainer.reference.parameters()).mul_(1.0 if workload.EAGER in overrides else 1.1)\n"
        "        return built\n"
        "workload.Workload = Off"
    )
    result = run([*SMALL, "--output", str(output)], prelude)
    assert result.returncode == 1, result.stdout[-2000:] + result.stderr[-2000:]
    assert "the output of the reference is off" in result.stderr and "no speed-up is reported" in result.stderr
    found = json.loads(output.read_text())
    assert found["status"] == "disagree" and "speed_up" not in found and "results" not in found


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path: Path) -> None:
    result = run(["--output", str(tmp_path / "epoch.json")])
    assert result.returncode == 1
    assert "no CUDA device" in result.stderr and not list(tmp_path.iterdir())
