"""The epoch's profile: its arithmetic, its presets, and that it runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_model import small_embeddings, small_policy, small_unet

from benchmarks.phases import Phase, Profile, table
from benchmarks.plain_ddpo import PlainDdpo, log_prob_of
from benchmarks.timing import Timing
from benchmarks.workload import PARAMETERS, UNETS, random_unet
from prdp_fast.records import Prompt, Scores

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("preset", UNETS)
def test_presets_are_the_published_models(preset: str) -> None:
    """The number of weights is that of the published checkpoint, and one row goes through."""
    with torch.device("meta"):
        unet = random_unet(preset)
    config = unet.config
    assert sum(parameter.numel() for parameter in unet.parameters()) == PARAMETERS[preset]
    latents = torch.empty(1, 4, config.sample_size, config.sample_size, device="meta")
    embeds = torch.empty(1, 77, config.cross_attention_dim, device="meta")
    timestep = torch.empty(1, dtype=torch.long, device="meta")
    assert unet(latents, timestep, encoder_hidden_states=embeds, return_dict=False)[0].shape == latents.shape


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
    phases = {phase["name"]: phase for phase in profile["phases"]}
    assert list(phases) == ["rollout", "reference", "update", "text", "decode", "reward"]
    assert phases["rollout"]["unet_rows"] == 4 * 5 * 2 and phases["update"]["unet_rows"] == 4 * 4 * 2
    # A backward is twice its forward.
    assert phases["update"]["tflop"] == pytest.approx(3 * phases["reference"]["tflop"])
    for phase in profile["phases"]:
        assert phase["timing"]["median_ms"] > 0
        assert phase["share_of_peak"] < 1.2  # more would mean a wrong count of either
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

    unet, policy = small_unet(0), small_policy(steps=3)
    before = [parameter.clone() for parameter in unet.parameters()]
    widths: list[int] = []
    unet.register_forward_pre_hook(lambda module, args: widths.append(len(args[0])))
    trainer = PlainDdpo(unet, Pipeline(), policy.transitions, Rewards(), guidance_scale=3.0, batch=4)  # type: ignore[arg-type]
    embeddings = small_embeddings(2)
    prompts = [Prompt(i, f"prompt {i}", {}) for i in range(2)]
    images = trainer.epoch(prompts, 3, embeddings.prompt_embeds, embeddings.negative_prompt_embeds)
    assert len(images) == 6
    assert sum(widths) == 6 * (policy.evaluations(torch.arange(3)) + policy.evaluations(policy.transitions.stochastic))
    assert any(not torch.equal(a, b) for a, b in zip(before, unet.parameters(), strict=True))
