"""What goes with an exported model: a card that says what it is and how to open it, and the way to the hub."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from prdp_fast.config.recipe import Settings
from prdp_fast.models.families.base import Family
from prdp_fast.models.lora import KOHYA, PEFT
from prdp_fast.reporting.private import recipe_for_others
from prdp_fast.reporting.tables import before_after, left_out
from prdp_fast.world import EMBEDDED

CARD = "README.md"
PICTURE = "before_after.png"


def write_model_card(directory: Path, settings: Settings, family: Family, summary: dict[str, Any], picture: Path) -> None:
    """Write `directory`/README.md, front matter as the hub reads it, and copy the picture beside it.

    Args:
        directory: of the exported model.
        summary: of the run: "epochs", "images" and "evaluation", which may be empty.
        picture: of the run's samples before and after; left out if it does not exist.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / PICTURE).unlink(missing_ok=True)
    if picture.is_file():
        shutil.copyfile(picture, directory / PICTURE)
    base: dict[str, Any] = {}
    if on_the_hub(settings.model.pretrained):  # which takes nothing but its own ids there
        relation = "adapter" if settings.model.lora else "finetune"
        base = {"base_model": settings.model.pretrained, "base_model_relation": relation}
    tags = ["text-to-image", family.hub_tag, settings.objective.name, *(["lora"] if settings.model.lora else [])]
    data = ModelCardData(library_name="diffusers", pipeline_tag="text-to-image", tags=tags, **base)
    body = "\n\n".join(
        part for part in (
            title(settings, family.denoiser_title), usage(directory, settings, family),
            scores(summary.get("evaluation") or {}),
            f"![The same prompts and the same noise before and after finetuning]({PICTURE})" if picture.is_file() else "",
            training(settings, summary),
        ) if part
    )  # fmt: skip
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n").save(directory / CARD)


def on_the_hub(pretrained: str) -> bool:
    return pretrained not in EMBEDDED and not Path(pretrained).is_dir()


def base_name(pretrained: str) -> str:
    """The hub id; of a directory its name alone."""
    return pretrained if on_the_hub(pretrained) or pretrained in EMBEDDED else Path(pretrained).resolve().name


def title(settings: Settings, denoiser: str) -> str:
    base = base_name(settings.model.pretrained)
    rewards = ", ".join(reward.name for reward in settings.rewards)
    what = f"A LoRA of rank {settings.model.lora.rank} for" if settings.model.lora else f"The {denoiser} of"
    source = f"[{base}](https://huggingface.co/{base})" if on_the_hub(base) else f"`{base}`"
    method = "[PRDP](https://arxiv.org/abs/2402.08714)" if settings.objective.name == "prdp" else settings.objective.name.upper()
    average = f", averaged with a decay of {settings.model.ema_decay}" if settings.model.ema_decay else ""
    return (
        f"# {base} finetuned on {rewards}\n\n{what} {source}, finetuned with {method} on a reward ({rewards}) by "
        f"prdp_fast{average}. The licence of the base model applies."
    )


def usage(directory: Path, settings: Settings, family: Family) -> str:
    """Code that opens the model and samples as it was trained to."""
    here, sampler, pipeline_class = settings.model.push_to_hub or directory.name, settings.sampler, family.pipeline_class.__name__
    without = "".join(f", {name}=None" for name in family.absent)
    # Of the base: without it a text encoder that was saved in half precision is loaded so, beside a float32 denoiser.
    dtype = f"dtype=torch.float32{without}"
    scheduler = json.loads((directory / "scheduler" / "scheduler_config.json").read_text())["_class_name"]
    if settings.model.lora:
        base = settings.model.pretrained if on_the_hub(settings.model.pretrained) else "PATH_OF_THE_BASE_MODEL"
        lines = [
            "import torch", f"from diffusers import {scheduler}, {pipeline_class}", "",
            f'pipe = {pipeline_class}.from_pretrained("{base}", {dtype})',
            f'pipe.load_lora_weights("{here}")',
            f'pipe.scheduler = {scheduler}.from_pretrained("{here}", subfolder="scheduler")',
        ]  # fmt: skip
    else:
        lines = [
            f"from diffusers import {pipeline_class}", "",
            f'pipe = {pipeline_class}.from_pretrained("{here}"{without})  # float32; or with dtype=torch.float16, torch.bfloat16',
        ]  # fmt: skip
    options = [f"{name}={value!r}" for name, value in family.call_options(sampler).items()]
    if scheduler == "DDIMScheduler":  # the other has no eta
        options.append(f"eta={sampler.eta}")
    lines.append(f'image = pipe("a prompt", {", ".join(options)}).images[0]')
    code = "\n".join(["```python", *lines, "```"])
    if settings.model.lora:
        code += f"\n\nThe same adapter is in `{KOHYA}` for ComfyUI and others, and in `{PEFT}` for `PeftModel.from_pretrained`."
    return code


def scores(evaluation: dict[str, Any]) -> str:
    """The reward before and after, by prompt set; empty if nothing was evaluated."""
    if not evaluation:
        return ""
    table = (
        "Mean reward over n prompts ± its standard error, with the same prompts and the same noise before and after. The "
        "difference is paired; s.e. is that difference in its own standard errors:\n\n"
        + before_after(evaluation, digits=4).markdown()
    )
    return "\n\n".join(filter(None, [table, left_out(evaluation)]))


def training(settings: Settings, summary: dict[str, Any]) -> str:
    values = recipe_for_others(settings.model_dump(mode="json"))
    recipe = yaml.safe_dump(values, sort_keys=False, allow_unicode=True).rstrip()
    return f"## Training\n\n{summary['epochs']} epochs, {summary['images']} images. The recipe:\n\n```yaml\n{recipe}\n```"
