"""The embedded world's learnt reward: the weights that ship, and the command that trains them."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPModel, CLIPTokenizer

from prdp_fast.rewards.clip_score import ClipScore
from prdp_fast.world import TINY, TINY_SCORER, make_scorer, scenes
from prdp_fast.world.reader import read_images


def test_it_tells_colours_of_drawn_scenes_and_hardly_their_places() -> None:
    model = CLIPModel.from_pretrained(TINY_SCORER).eval()
    found = make_scorer.right_captions(model, CLIPTokenizer.from_pretrained(TINY_SCORER), count=256)
    assert set(found) == set(scenes.ATTRIBUTES)
    assert min(found[name] for name in ("fill", "outline", "background", "size")) > 0.96, found
    assert found["shape"] > 0.88 and 0.5 < found["row"] < 0.75 and 0.5 < found["column"] < 0.75, found
    assert sum(path.stat().st_size for path in TINY_SCORER.iterdir()) < 5e6


def test_as_a_reward_it_follows_the_truth_within_a_prompt_and_is_not_it() -> None:
    prompts = [scene.prompt() for scene in map(scenes.scene_at, range(7, scenes.NUM_SCENES, scenes.NUM_SCENES // 12))][:12]
    prompts = [prompt for prompt in prompts for _ in range(8)]
    pipeline = StableDiffusionPipeline.from_pretrained(
        TINY, dtype=torch.float32, safety_checker=None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    pixels = pipeline(
        prompts, num_inference_steps=5, guidance_scale=1.0, output_type="pt", generator=torch.Generator().manual_seed(1)
    ).images
    images = (pixels * 255).round().to(torch.uint8)
    reward = ClipScore(model="tiny_scorer", prefix="", scale=1.0, device="cpu")
    reward.prepare()
    scores, truth = reward.score(images, prompts, [{}] * len(prompts)).scores, read_images(images, prompts).scores
    within = [(values.view(12, 8) - values.view(12, 8).mean(1, keepdim=True)).flatten().numpy() for values in (scores, truth)]
    assert 0.3 < np.corrcoef(*within)[0, 1] < 0.9
    others = reward.score(images, prompts[8:] + prompts[:8], [{}] * len(prompts)).scores
    assert float((scores > others).float().mean()) > 0.95


def test_the_negatives_differ_in_what_they_say_they_do() -> None:
    import random

    scene, chooser = scenes.scene_at(1234), random.Random(0)
    for name in scenes.ATTRIBUTES:
        other = make_scorer.other_scene(scene, name, chooser)
        assert [field for field in scene._fields if getattr(scene, field) != getattr(other, field)] == [name]
        assert len({other.fill, other.outline, other.background}) == 3


def test_its_command_trains_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def train(steps: int) -> None:
        words = ["--work", tmp_path / "work", "--output", tmp_path / "made", "--images", 64, "--generated", 8, "--batch", 8]
        monkeypatch.setattr(sys, "argv", ["make_scorer", *map(str, words), "--steps", str(steps)])
        make_scorer.main()

    train(2)
    train(3)  # from the state of the second step
    assert "scorer 3/3" in capsys.readouterr().out.replace("\r", "\n")
    made = CLIPModel.from_pretrained(tmp_path / "made")
    shipped = CLIPModel.from_pretrained(TINY_SCORER)
    assert {name: tensor.shape for name, tensor in made.state_dict().items()} == {
        name: tensor.shape for name, tensor in shipped.state_dict().items()
    }
    reward = ClipScore(model=str(tmp_path / "made"), device="cpu")
    reward.prepare()
    assert reward.score(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), ["a"], [{}]).scores.isfinite().all()
