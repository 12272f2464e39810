"""The files of a model: a diffusers directory, a hub id, or the name of one that ships with the package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from prdp_fast.core.errors import UserError
from prdp_fast.core.hub import hub_file
from prdp_fast.core.run_directory import EXPORT, RUN
from prdp_fast.core.weight_files import CHECKPOINTS, fault
from prdp_fast.models.lora import WEIGHTS as LORA_WEIGHTS
from prdp_fast.world import EMBEDDED

INDEX = "model_index.json"
PIPELINE_DIRECTORY = "expected a diffusers pipeline directory, as save_pretrained writes it"


def resolve(pretrained: str) -> str:
    """A directory or a hub id, as diffusers reads it."""
    return str(EMBEDDED.get(pretrained, pretrained))


def find_file(pretrained: str, filename: str) -> Path:
    """A file of a pipeline directory or hub id. Raises: UserError if it is not there."""
    path, what = Path(resolve(pretrained)), f"model.pretrained {pretrained!r}"
    if (path / filename).is_file():
        return path / filename
    if path.is_dir():
        if filename == INDEX and (reason := what_else(path)):
            raise UserError(f"{what} {reason}")
        raise UserError(f"{what} has no {filename}; {PIPELINE_DIRECTORY}")
    if path.is_file():
        raise UserError(f"{what} {single_file(path)}")
    return hub_file(what, pretrained, filename, lacking="expected a diffusers pipeline, not a single checkpoint file")


def single_file(path: Path) -> str:
    """What a file that was given as a model is, and the next move."""
    if path.suffix in (".safetensors", *CHECKPOINTS):
        if reason := fault(path):
            return f"is a single file, not a diffusers pipeline directory, and {reason}"
        return (
            "is a single checkpoint file; expected a diffusers pipeline directory: convert it once with "
            f"StableDiffusionPipeline.from_single_file({str(path)!r}).save_pretrained('DIRECTORY'), of SDXL with "
            "StableDiffusionXLPipeline, and give DIRECTORY"
        )
    return f"is a file; {PIPELINE_DIRECTORY}"


def what_else(directory: Path) -> str | None:
    """What a directory that is no pipeline is, if that is plain, and the next move."""
    if any((directory / name).is_file() for name in (LORA_WEIGHTS, "adapter_config.json")):
        base = adapter_base(directory)
        named = f"was trained on {base!r}: give that" if base else "names no base: give the model that it was trained on"
        return f"is a LoRA adapter, not a model, and {named} as model.pretrained; load the adapter onto it and save_pretrained"
    if (directory / RUN).is_file():
        if (directory / EXPORT / INDEX).is_file():
            return f"is a run directory; give the model that it made, {str(directory / EXPORT)!r}"
        return f"is a run directory without an exported pipeline ({directory / EXPORT / INDEX} is missing); finish the run first"
    if (directory.parent / INDEX).is_file() and (directory / "config.json").is_file():
        return f"is one component of a pipeline; give the whole, {str(directory.parent)!r}"
    single = sorted(path for path in directory.iterdir() if path.suffix in (".safetensors", ".ckpt"))
    if single:
        return f"has no {INDEX}, but {single[0].name}, which {single_file(single[0])}"
    return None


def adapter_base(directory: Path) -> str | None:
    """The model that a LoRA adapter is for, by its peft configuration, the run beside it or its model card."""
    for path, keys in ((directory.parent / RUN, ("recipe", "model", "pretrained")),
                       (directory / "adapter_config.json", ("base_model_name_or_path",))):  # fmt: skip
        try:
            value: Any = json.loads(path.read_text(encoding="utf-8"))
            for key in keys:
                value = value[key]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if isinstance(value, str) and value:
            return value
    try:
        front = (directory / "README.md").read_text(encoding="utf-8").split("---")[1]
        value = yaml.safe_load(front)["base_model"]
    except (OSError, ValueError, IndexError, KeyError, TypeError, yaml.YAMLError):
        return None
    value = value[0] if isinstance(value, list) and value else value
    return value if isinstance(value, str) else None


def quiet_loading() -> None:
    """No progress bars for loading and saving, and no advice on dtypes, between the lines of a run."""
    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()
        library.set_verbosity_error()
