"""The card of an exported model: what the hub reads, the table of before and after, and code that runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from prdp_fast.config.load import load_recipe
from prdp_fast.config.recipe import Settings
from prdp_fast.models import lora
from prdp_fast.models.families import Family, StableDiffusion, StableDiffusionXL, read_family
from prdp_fast.models.pipeline import Pipeline
from prdp_fast.reporting.model_card import write_model_card
from prdp_fast.world import TINY

SUMMARY = {
    "epochs": 3, "images": 96,
    "evaluation": {
        "seen": {
            "before": {"mean": 0.5, "stderr": 0.01, "n": 16},
            "after": {"mean": 0.61234, "stderr": 0.02, "n": 16},
            "difference": {"mean": 0.11234, "stderr": 0.0151, "n": 16},
        },
    },
}  # fmt: skip


def exported(
    settings: Settings, directory: Path, picture: Path, family: type[Family] = StableDiffusion, summary: dict = SUMMARY
) -> str:
    (directory / "scheduler").mkdir(parents=True, exist_ok=True)
    (directory / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": "DDIMScheduler"}))
    write_model_card(directory, settings, family({}, 77), summary, picture)
    return (directory / "README.md").read_text()


def test_the_card_of_a_hub_model(tmp_path: Path) -> None:
    picture = tmp_path / "samples.png"
    picture.write_bytes(b"png")
    overrides = ["model.lora={rank: 4}", "model.pretrained=owner/base-model", "model.push_to_hub=me/tuned", "model.ema_decay=0.9"]
    settings = load_recipe("smoke", overrides)
    card = exported(settings, tmp_path / "model", picture, StableDiffusionXL)
    data = ModelCard(card).data.to_dict()
    assert data == {
        "library_name": "diffusers", "pipeline_tag": "text-to-image", "base_model": "owner/base-model",
        "base_model_relation": "adapter", "tags": ["text-to-image", "stable-diffusion-xl", "prdp", "lora"],
    }  # fmt: skip
    assert "| seen | 16 | 0.5000 ± 0.0100 | 0.6123 ± 0.0200 | +0.1123 ± 0.0151 | +7.4 |" in card
    assert (
        "without a score" not in card and "decay of 0.9" in card and "shapes_alignment" in card and "3 epochs, 96 images" in card
    )
    (recipe,) = re.findall(r"```yaml\n(.*?)```", card, re.DOTALL)
    assert Settings.model_validate(yaml.safe_load(recipe)) == settings, "whoever has the card has the recipe"
    assert (tmp_path / "model" / "before_after.png").read_bytes() == b"png" and "(before_after.png)" in card
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    compile(code, "card", "exec")
    assert 'load_lora_weights("me/tuned")' in code and 'from_pretrained("owner/base-model", dtype=torch.float32)' in code
    assert "num_inference_steps=4, guidance_scale=2.0, eta=1.0" in code


def test_the_card_of_a_directory_names_no_place_of_this_machine(tmp_path: Path) -> None:
    base = tmp_path / "secret" / "base"
    base.mkdir(parents=True)
    settings = load_recipe("smoke", [f"model.pretrained={base}", "evaluation.prompts=0"])
    card = exported(settings, tmp_path / "model", tmp_path / "none.png", summary=SUMMARY | {"evaluation": {}})
    data = ModelCard(card).data.to_dict()
    assert "base_model" not in data and "lora" not in data["tags"]
    assert "secret" not in card and "| seen |" not in card and "before_after" not in card
    assert 'StableDiffusionPipeline.from_pretrained("model")' in card, "every network of an export is float32"


def test_the_card_tells_no_address_and_no_argument_of_a_reward(tmp_path: Path) -> None:
    options = "{url: 'http://scorer.internal:8000', token_env: PRDP_KEY, arguments: {account: blue-42}}"
    settings = load_recipe("smoke", [f"rewards=[{{name: http, options: {options}}}]", "evaluation.prompts=0"])
    card = exported(settings, tmp_path / "model", tmp_path / "none.png", summary=SUMMARY | {"evaluation": {}})
    assert "http" in card and not any(word in card for word in ("scorer.internal", "PRDP_KEY", "blue-42"))


@pytest.mark.parametrize("overrides", [[], ["model.lora={rank: 2}"]], ids=["whole", "lora"])
def test_the_code_of_a_card_runs(overrides: list[str], tmp_path: Path, monkeypatch) -> None:
    """Of a run in bfloat16 too."""
    settings = load_recipe("smoke", overrides)
    family = read_family(settings.model.pretrained, settings.model.lora)
    pipeline = Pipeline.load(family, torch.device("cpu"), torch.bfloat16)
    if settings.model.lora is not None:
        lora.add_adapter(pipeline.denoiser, settings.model.lora, 0)
        state = {name: value for name, value in pipeline.denoiser.named_parameters() if value.requires_grad}
    else:
        state = pipeline.denoiser.state_dict()
    pipeline.export(tmp_path / "model", state)
    write_model_card(tmp_path / "model", settings, pipeline.family, SUMMARY, tmp_path / "none.png")
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "model" / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    exec(code.replace("PATH_OF_THE_BASE_MODEL", str(TINY)), scope)
    assert scope["image"].size == (32, 32)


def test_the_card_says_how_many_images_had_no_score(tmp_path: Path) -> None:
    summary = json.loads(json.dumps(SUMMARY))
    summary["evaluation"]["seen"]["before"] |= {"n": 15, "unscored": 1}
    summary["evaluation"]["seen"]["difference"] |= {"n": 15}
    card = exported(load_recipe("smoke"), tmp_path / "model", tmp_path / "none.png", summary=summary)
    assert "| seen | 15/16/15 | 0.5000 ± 0.0100 |" in card and "left out: seen 1 before and 0 after;" in card
