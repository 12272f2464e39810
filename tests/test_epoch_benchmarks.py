"""The epoch's profile: its arithmetic, its presets, and that it runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from small_model import small_embeddings, small_policy, small_unet

from benchmarks import linearity, memory_flatness
from benchmarks.linearity import Line
from benchmarks.phases import Phase, Profile, table
from benchmarks.plain_ddpo import PlainDdpo, log_prob_of
from benchmarks.resident import can_measure, peak_over_baseline
from benchmarks.sizes import resized
from benchmarks.timing import Timing
from benchmarks.workload import PARAMETERS, UNETS, Workload, random_denoiser, random_embeddings
from prdp_fast.core import distributed
from prdp_fast.core.records import Prompt, Scores
from prdp_fast.models.families import StableDiffusion
from prdp_fast.sampling.policy import conditioning

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def workload() -> Iterator[Workload]:
    """The embedded model, 3 prompts of 2 images, in this process."""
    before, threads = dict(os.environ), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield Workload.build("tiny", ["schedule.prompts_per_epoch=3", "schedule.images_per_prompt=2"])
    finally:
        distributed.shutdown()
        torch.set_num_threads(threads)
        os.environ.clear()  # a job of one rank is written into it, which launched tests would inherit
        os.environ.update(before)


@pytest.mark.parametrize("preset", UNETS)
def test_presets_are_the_published_models(preset: str) -> None:
    """The number of weights is that of the published checkpoint, and one row goes through."""
    with torch.device("meta"):
        denoiser = random_denoiser(preset)
    config = denoiser.config
    assert sum(parameter.numel() for parameter in denoiser.parameters()) == PARAMETERS[preset]
    latents = torch.empty(2, 4, config.sample_size, config.sample_size, device="meta")
    timestep = torch.empty(2, dtype=torch.long, device="meta")
    embeddings = random_embeddings(StableDiffusion(dict(config), 77), 1, torch.device("meta"), torch.float32)
    assert denoiser(latents, timestep, **conditioning(embeddings, guided=True), return_dict=False)[0].shape == latents.shape


def timing(median: float) -> Timing:
    return Timing(median, median, median, 5)


def test_epoch_overhead_counts_everything_over_the_bare_calls() -> None:
    phases = [
        Phase("rollout", timing(110.0), timing(100.0), overhead=1.1, overhead_spread=0.0),
        Phase("update", timing(330.0), timing(300.0), overhead=1.05, overhead_spread=0.0),
        Phase("decode", timing(20.0)),
    ]
    profile = Profile("tiny", "CPU", "float32", images=46, steps=5, peak_tflop_per_s=0.1, phases=phases)
    assert profile.epoch_overhead == pytest.approx((1.1 * 100 + 1.05 * 300 + 20) / 400)
    assert profile.images_per_s == pytest.approx(46 / 0.46)
    assert "1.11" in table(profile)


def test_profile_step_runs_and_its_numbers_fit_together(tmp_path: Path) -> None:
    output, picture = tmp_path / "profile.json", tmp_path / "profile.png"
    command = [
        sys.executable, str(ROOT / "benchmarks/profile_step.py"), "--rounds", "1", "--output", str(output),
        "--chart", str(picture),
        "--set", "schedule.prompts_per_epoch=2", "--set", "schedule.images_per_prompt=2", "--set", "sampler.guidance_scale=3",
    ]  # fmt: skip
    result = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    profile = json.loads(output.read_text())
    assert profile["machine"]["torch"] and "--rounds 1" in profile["command"] and {"date", "commit", "dirty"} <= profile.keys()
    phases = {phase["name"]: phase for phase in profile["phases"]}
    assert list(phases) == ["rollout", "reference", "update", "text", "decode", "reward"]
    assert phases["rollout"]["denoiser_rows"] == 4 * 5 * 2 and phases["update"]["denoiser_rows"] == 4 * 4 * 2
    # A backward is twice its forward.
    assert phases["update"]["tflop"] == pytest.approx(3 * phases["reference"]["tflop"])
    for phase in profile["phases"]:
        assert phase["timing"]["median_ms"] > 0
        assert phase["share_of_peak"] < 1.5  # more would mean a wrong count of either; a busy machine slows one, not both
        assert 100 < phase["peak_memory_mib"] < 10_000  # of a process that has loaded torch and a small model
        assert phase["sent_bytes"] == 0  # there is one rank
    # DeepSpeed reduces over a single rank as well: float32 gradients of 2.4 million parameters.
    assert 4 * PARAMETERS["tiny"] <= phases["update"]["collective_bytes"] < 4 * PARAMETERS["tiny"] + 1000
    assert phases["rollout"]["collective_bytes"] == 0
    assert profile["epoch_overhead"] > 0.7  # one round of a few rows, on a busy machine: roughly 1.2
    assert picture.stat().st_size > 5000
    assert "images/s" in result.stdout


def test_an_unknown_setting_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks/profile_step.py"), "--set", "schedule.epoch=3"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert result.returncode == 2
    assert "error: recipe tiny.yaml: unknown key 'epoch' under 'schedule'" in result.stderr and "Traceback" not in result.stderr


# The opponent does the same work


def test_the_plain_trainer_has_the_same_log_probs() -> None:
    from prdp_kernels import gaussian_log_prob

    g = torch.Generator().manual_seed(0)
    m, x, previous = (torch.randn(3, 4, 4, 4, generator=g) for _ in range(3))
    one = torch.ones(3)
    expected = gaussian_log_prob(m, x, previous, 0.9 * one, -0.3 * one, 0.4 * one)
    torch.testing.assert_close(log_prob_of(previous, 0.9 * x - 0.3 * m, torch.tensor(0.4)), expected)


def test_the_plain_trainer_calls_the_unet_as_often_as_the_engine() -> None:
    class Pipeline:
        latent_shape = (4, 4, 4)

        def decode(self, latents: torch.Tensor) -> torch.Tensor:
            return torch.zeros(len(latents), 3, 8, 8, dtype=torch.uint8)

    class Rewards:
        def score(self, images: torch.Tensor, *_: object) -> Scores:
            return Scores(torch.arange(len(images), dtype=torch.float32), {}, {})

    denoiser, policy = small_unet(0), small_policy(steps=3)
    before = [parameter.clone() for parameter in denoiser.parameters()]
    widths: list[int] = []
    denoiser.register_forward_pre_hook(lambda module, args: widths.append(len(args[0])))
    trainer = PlainDdpo(denoiser, Pipeline(), policy.transitions, Rewards(), guidance_scale=3.0, batch=4)  # type: ignore[arg-type]
    embeddings = small_embeddings(2)
    prompts = [Prompt(i, f"prompt {i}", {}) for i in range(2)]
    images = trainer.epoch(prompts, 3, embeddings.prompt_embeds, embeddings.negative_prompt_embeds)
    assert len(images) == 6
    assert sum(widths) == 6 * (policy.evaluations(torch.arange(3)) + policy.evaluations(policy.transitions.stochastic))
    assert any(not torch.equal(a, b) for a, b in zip(before, denoiser.parameters(), strict=True))


# Cost against sizes


def test_a_line_through_known_points() -> None:
    exact = Line.through([1.0, 2.0, 4.0], [5.0, 7.0, 11.0])
    assert (exact.intercept, exact.slope, exact.r_squared) == pytest.approx((3.0, 2.0, 1.0))
    assert exact.worst_residual == pytest.approx(0.0, abs=1e-12)
    x, y = [1.0, 2.0, 3.0, 5.0], [1.0, 2.5, 2.0, 6.0]
    line = Line.through(x, y)
    slope, intercept = np.polyfit(x, y, 1)
    assert (line.intercept, line.slope) == pytest.approx((intercept, slope))
    assert line.r_squared == pytest.approx(np.corrcoef(x, y)[0, 1] ** 2)
    assert line.worst_residual == pytest.approx(max(abs(intercept + slope * np.array(x) - y) / y))
    with pytest.raises(ValueError, match="at least 3"):
        Line.through([1.0, 2.0, 2.0], [1.0, 2.0, 2.0])


def test_a_resized_job_makes_the_rows_it_should(workload: Workload) -> None:
    """Counted at the U-Net's door: 2 prompts x 3 images x 7 steps are rolled out, and all that have a density are trained."""
    small = resized(workload, prompts=2, images_per_prompt=3, steps=7)
    widths: list[int] = []
    handle = workload.engine.engine.module.register_forward_pre_hook(lambda module, args: widths.append(len(args[0])))
    try:
        trajectories = small.rollout()
        assert sum(widths) == 2 * 3 * 7
        small.update(trajectories, torch.arange(6.0), small.reference(trajectories))
        assert sum(widths) == 2 * 3 * (7 + len(small.policy.transitions.stochastic))
    finally:
        handle.remove()
    assert [prompt.index for prompt in small.prompts] == [prompt.index for prompt in workload.prompts[:2]]
    assert workload.images == 6 and len(workload.policy.transitions) == 5  # the original is as it was
    with pytest.raises(ValueError, match="at most 3"):
        resized(workload, prompts=4)


def test_the_cost_of_an_epoch_is_measured_at_every_size(workload: Workload) -> None:
    base = {"prompts": 1, "images_per_prompt": 2, "steps": 2}
    values = {"prompts": [1, 2, 3], "steps": [2, 6, 12]}
    series = linearity.measure(workload, values, base, rounds=1)
    assert [one.varied for one in series] == ["prompts", "steps"]
    assert series[1].fixed == {"prompts": 1, "images_per_prompt": 2}
    assert all(timing.median_ms > 0 for one in series for timing in one.timings)
    assert series[1].line.slope > 0  # six times the steps take longer, however busy the machine
    assert "R^2" in linearity.table(series)


# Memory


def test_the_peak_over_a_baseline_is_what_a_call_held() -> None:
    device, size = torch.device("cpu"), 64 * 2**20
    assert can_measure(device)
    held = torch.ones(size // 4)  # there before: not the call's
    for count in (1, 3):  # the kernel's account lags by some pages a thread
        held_at_once = peak_over_baseline(lambda count=count: [torch.ones(size // 4) for _ in range(count)], device)
        assert 0.95 * count * size < held_at_once < (count + 0.2) * size
    assert peak_over_baseline(lambda: held.sum(), device) < 0.2 * size


@pytest.mark.slow
def test_memory_of_an_update_is_flat_in_the_number_of_steps() -> None:
    """Each in a process of its own. Were the steps of a trajectory in one graph, four times as many would take four times the
    memory of one micro-batch."""
    rows = [memory_flatness.in_own_process(["--update-at", str(steps)]) for steps in (3, 11)]
    assert rows[1]["trajectories"] == rows[0]["trajectories"] * 3  # T + 1 latents
    assert memory_flatness.growth([row["tensors"] for row in rows]) < 0.02
    assert memory_flatness.growth([row["peak"] for row in rows]) < 0.5
    assert rows[0]["tensors"] > 10 * rows[1]["trajectories"]  # it is activations that were measured
    assert "3.67 times the steps" in memory_flatness.table(rows, [])


def test_memory_of_the_prompt_stream_is_flat_in_the_number_of_prompts(tmp_path: Path) -> None:
    rows = []
    for count in (25_000, 100_000):
        on_disk = memory_flatness.build_prompts(tmp_path / str(count), count)
        rows.append(memory_flatness.in_own_process(["--stream-of", str(tmp_path / str(count))]) | {"on_disk": on_disk})
    assert [row["prompts"] for row in rows] == [25_000, 100_000]
    assert all(row["drawn"] == memory_flatness.EPOCHS * memory_flatness.PROMPTS_PER_EPOCH for row in rows)
    assert memory_flatness.growth([row["peak"] for row in rows]) < 0.5  # all of it in memory would be four times as much
    assert "4 times the prompts" in memory_flatness.table([], rows)
