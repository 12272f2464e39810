"""The benchmarks of an epoch: what is built, counted and timed, and that every script runs."""

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

from benchmarks.epoch import linearity, memory_flatness
from benchmarks.epoch.linearity import Line
from benchmarks.epoch.phases import phase_calls
from benchmarks.epoch.plain_ddpo import PlainDdpo, log_prob_of
from benchmarks.epoch.profile import Phase, Profile, table
from benchmarks.epoch.random_model import RandomPipeline
from benchmarks.epoch.workload import EAGER, Workload
from benchmarks.lib import command
from benchmarks.lib.made_up_prompts import build_prompts
from benchmarks.lib.published import PARAMETERS, PRESETS, UNETS, write_configurations
from benchmarks.lib.resident import can_measure, peak_over_baseline
from benchmarks.lib.timing import Timing
from prdp_fast.core import distributed
from prdp_fast.core.records import Prompt, Scores
from prdp_fast.models.families import read_family
from prdp_fast.models.text import TextEncoder
from prdp_fast.sampling.transitions import Transitions

pytestmark = pytest.mark.slow

SMALL = ["schedule.prompts_per_epoch=3", "schedule.images_per_prompt=2"]


@pytest.fixture(scope="module")
def in_this_process() -> Iterator[None]:
    """Workloads are built in the test's own process, one rank; afterwards it is as it was."""
    before, threads = dict(os.environ), torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    distributed.shutdown()
    torch.set_num_threads(threads)
    os.environ.clear()  # a job of one rank is written into it, which launched tests would inherit
    os.environ.update(before)


@pytest.fixture(scope="module")
def workload(in_this_process: None) -> Workload:
    """The embedded model, 3 prompts of 2 images."""
    return Workload.build("tiny", SMALL)


# What is built


@pytest.mark.parametrize("preset", UNETS)
def test_presets_are_the_published_models(preset: str, tmp_path: Path) -> None:
    """The number of weights is that of the published checkpoint, and one guided row goes through."""
    family, meta = read_family(str(write_configurations(preset, tmp_path))), torch.device("meta")
    pipeline = RandomPipeline.load(family, meta, torch.float32)
    assert sum(parameter.numel() for parameter in pipeline.denoiser.parameters()) == PARAMETERS[preset]
    embeddings = TextEncoder(pipeline, torch.float32).encode([Prompt(0, "a cat", {})])
    latents, timestep = torch.empty(1, *family.latent_shape, device=meta), torch.empty(1, dtype=torch.long, device=meta)
    output = family.predict(pipeline.denoiser, latents, timestep, embeddings, guided=True)
    assert output.shape == (2, *family.latent_shape)


def rows_at_the_door(module: torch.nn.Module) -> list[int]:
    """Rows of every call of a module, and of copies that are made of it from now on."""
    widths: list[int] = []
    module.register_forward_pre_hook(lambda module, args: widths.append(len(args[0])))
    return widths


def check_calls(workload: Workload) -> None:
    """A phase and its bare calls call the denoiser equally often and with as many rows, and these rows are what is counted."""
    module = workload.trainer.engine.engine.module
    own, bare = rows_at_the_door(module), rows_at_the_door(workload.bare_denoiser)
    for name, phase in phase_calls(workload).items():
        own.clear()
        bare.clear()
        phase.run()
        seen = sorted(own + bare)  # the reference pass of a job without an adapter runs where the bare calls do
        if phase.bare is None:
            assert not seen and not phase.denoiser_rows
            continue
        own.clear()
        bare.clear()
        phase.bare()
        assert sorted(bare) == seen and not own, name
        assert 0 <= sum(seen) - phase.denoiser_rows < 2 * max(seen), name  # the last call of a pass repeats rows to fill up


def test_what_is_set_is_what_is_timed(in_this_process: None) -> None:
    """Adapter, moving average, activation checkpointing, K = 2, eta and guidance interval: all reach the parts that run."""
    guidance = "guidance_scale: 3.0, guidance_interval: [300, 700]"
    sampler = f"sampler={{num_inference_steps: 5, {guidance}, scheduler: DDIMScheduler, eta: 0.5}}"
    workload = Workload.build(
        "tiny",
        [
            *SMALL, EAGER, sampler, "model.lora={rank: 4}", "model.ema_decay=0.9", "performance.activation_checkpointing=true",
            "schedule.updates_per_epoch=2",
        ],
    )  # fmt: skip
    trainer = workload.trainer
    module = trainer.engine.engine.module
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert trained and all("lora" in name for name in trained)
    assert sum(p.numel() for p in trainer.engine.trained) == trainer.job.family.trained_parameters < PARAMETERS["tiny"] / 10
    assert trainer.reference is None and trainer.engine.average is not None and module.is_gradient_checkpointing
    full_noise = Transitions.from_scheduler(trainer.pipeline.scheduler, 5, 1.0)
    torch.testing.assert_close(workload.policy.transitions.std, 0.5 * full_noise.std)

    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    workload.epoch()
    changed = {name for name, parameter in module.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed and changed <= trained
    assert trainer.engine.updates == 2
    check_calls(workload)
    # Rows of the reference pass: one forward each. The update has three forwards of them, one for the log-probs of the second
    # gradient step; and for each step a recomputed forward and a backward, which without weight gradients is about a forward.
    phases = phase_calls(workload)
    assert phases["update"].tflop / phases["reference"].tflop == pytest.approx(3 + 2 * (1 + 1), rel=0.1)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["sampler.guidance_scale=3", "sampler.guidance_interval=[300,700]", "schedule.micro_batch=5"],
        ["schedule.update_timesteps=2", "schedule.reference_timesteps=2", "schedule.micro_batch=4"],
        ["objective={name: ddpo}"],
    ],
    ids=["tiny", "interval", "subsets", "ddpo"],
)
def test_bare_calls_have_the_rows_of_their_phase(overrides: list[str], in_this_process: None) -> None:
    workload = Workload.build("tiny", ["schedule.prompts_per_epoch=2", "schedule.images_per_prompt=2", EAGER, *overrides])
    check_calls(workload)
    assert ("reference" in phase_calls(workload)) == workload.needs_reference == ("ddpo" not in str(overrides))


def test_a_preset_comes_through_the_same_door(in_this_process: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """SDXL in all but its widths: random weights, random text, no pictures."""
    small = {
        "sample_size": 8, "block_out_channels": [32, 32, 32], "attention_head_dim": [1, 2, 4], "layers_per_block": 1,
        "transformer_layers_per_block": [1, 1, 2], "norm_num_groups": 8,
    }  # fmt: skip
    monkeypatch.setitem(PRESETS, "sdxl", PRESETS["sdxl"] | {"unet/config.json": UNETS["sdxl"] | small})
    sizes = ["schedule.prompts_per_epoch=2", "schedule.images_per_prompt=2", "sampler.num_inference_steps=3"]
    workload = Workload.build("sdxl", [*sizes, "sampler.guidance_scale=5", EAGER])
    embeddings = workload.embeddings
    assert embeddings.prompt_embeds.shape == (2, 77, 2048) and embeddings.pooled_prompt_embeds.shape == (2, 1280)
    assert embeddings.time_ids.tolist() == [[64, 64, 0, 0, 64, 64]]
    assert not torch.equal(embeddings.prompt_embeds[:1], embeddings.negative_prompt_embeds)
    torch.testing.assert_close(workload.encode(), embeddings, rtol=0, atol=0)
    assert list(phase_calls(workload)) == ["rollout", "reference", "update"] and not workload.has_pictures
    workload.epoch()
    assert workload.trainer.engine.updates > 0
    check_calls(workload)


# What is told


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


def run(module: str, *arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)], capture_output=True, text=True, cwd=cwd, timeout=300,
        env=command.environment(),
    )  # fmt: skip


def test_checkpoint_runs_and_counts_every_byte(tmp_path: Path) -> None:
    output = tmp_path / "checkpoint.json"
    result = run(
        "benchmarks.epoch.checkpoint", "--directory", tmp_path / "disk", "--parameters", "30000", "--shards", "3",
        "--output", output, cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    found = json.loads(output.read_text())
    assert 30000 * 14 < found["bytes"] < 30000 * 14 + 4 * 4000, (
        "16-bit weights, float32 weights, two moments, four files' headers"
    )
    assert set(found["parts"]) == {"write", "sync", "hash", "verify, 1 at once", "verify, 2 at once"}
    assert list((tmp_path / "disk").iterdir()) == [], "nothing is left"


def test_async_save_runs_and_counts_every_byte(tmp_path: Path) -> None:
    output = tmp_path / "async.json"
    result = run(
        "benchmarks.epoch.async_save",
        "--directory",
        tmp_path / "disk",
        "--parameters",
        "100000",
        "--output",
        output,
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    found = json.loads(output.read_text())
    assert 100_000 * 12 < found["bytes"] < 100_000 * 12 + 686 * 3000, "float32 weights, two moments, headers of 686 tensors"
    parts = {name: part["seconds"] for name, part in found["parts"].items()}
    for which in ("the first time", "from then on"):
        assert 0 < parts[f"copied, {which}: training stands still"] <= parts[f"copied, {which}: until the checkpoint is there"]
    assert all(parts[name] >= 0 for name in ("written at once: training stands still", "verify", "load"))
    assert list((tmp_path / "disk").iterdir()) == [], "nothing is left"


def test_profile_runs_and_its_numbers_fit_together(tmp_path: Path) -> None:
    output, picture = tmp_path / "profile.json", tmp_path / "profile.png"
    result = run(
        "benchmarks.epoch.profile", "--rounds", "1", "--output", output, "--chart", picture,
        "--set", "schedule.prompts_per_epoch=2", "--set", "schedule.images_per_prompt=2", "--set", "sampler.guidance_scale=3",
        cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    profile = json.loads(output.read_text())
    assert profile["machine"]["torch"] and {"date", "commit", "dirty"} <= profile.keys()
    assert profile["command"].startswith("python -m benchmarks.epoch.profile --rounds 1 ")
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
    assert phases["rollout"]["collective_bytes"] < 100  # whether a rank was asked to stop
    assert profile["epoch_overhead"] > 0.7  # one round of a few rows, on a busy machine: roughly 1.2
    assert picture.stat().st_size > 5000
    assert "images/s" in result.stdout


def test_an_unknown_setting_is_one_line(tmp_path: Path) -> None:
    result = run("benchmarks.epoch.profile", "--set", "schedule.epoch=3", cwd=tmp_path)
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


def test_the_plain_trainer_calls_the_denoiser_as_often_as_the_engine() -> None:
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
    """Counted at the denoiser's door: 2 prompts x 3 images x 7 steps are rolled out, and all that have a density are trained."""
    small = workload.resized(prompts=2, images_per_prompt=3, steps=7)
    widths = rows_at_the_door(workload.trainer.engine.engine.module)
    trajectories = small.rollout()
    assert sum(widths) == 2 * 3 * 7
    small.update(trajectories, small.made_up_scores(torch.arange(6.0)), small.reference(trajectories))
    assert sum(widths) == 2 * 3 * (7 + len(small.policy.transitions.stochastic))
    assert [prompt.index for prompt in small.prompts] == [prompt.index for prompt in workload.prompts[:2]]
    assert workload.images == 6 and len(workload.policy.transitions) == 5  # the original is as it was
    with pytest.raises(ValueError, match="at most 3"):
        workload.resized(prompts=4)


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
        on_disk = build_prompts(tmp_path / str(count), count)
        rows.append(memory_flatness.in_own_process(["--stream-of", str(tmp_path / str(count))]) | {"on_disk": on_disk})
    assert [row["prompts"] for row in rows] == [25_000, 100_000]
    assert all(row["drawn"] == memory_flatness.EPOCHS * memory_flatness.PROMPTS_PER_EPOCH for row in rows)
    assert memory_flatness.growth([row["peak"] for row in rows]) < 0.5  # all of it in memory would be four times as much
    assert "4 times the prompts" in memory_flatness.table([], rows)
