"""The models that can be trained: one table of them, by the class of their diffusers pipeline."""

from __future__ import annotations

from prdp_fast.config.recipe import LoraSettings
from prdp_fast.core.errors import UserError
from prdp_fast.models.families.base import Family
from prdp_fast.models.families.sd import StableDiffusion
from prdp_fast.models.families.sdxl import StableDiffusionXL
from prdp_fast.models.files import read_json

FAMILIES: dict[str, type[Family]] = {family.pipeline_class.__name__: family for family in (StableDiffusion, StableDiffusionXL)}

__all__ = ["FAMILIES", "Family", "StableDiffusion", "StableDiffusionXL", "find_family", "read_family"]


def find_family(pretrained: str) -> type[Family]:
    """By model_index.json alone. Raises: UserError if it is another class of pipeline, or lacks a component."""
    index = read_json(pretrained, "model_index.json")
    name = index.get("_class_name")
    if name not in FAMILIES:
        raise UserError(
            f"model.pretrained {pretrained!r} is a {name}; expected a {' or '.join(FAMILIES)}: text-to-image models of the SD 1, "
            "SD 2 and SDXL families"
        )
    for component in FAMILIES[name].components:
        if not (index.get(component) or [None])[0]:
            raise UserError(
                f"model.pretrained {pretrained!r} has no {component} in its model_index.json, which a {name} needs; "
                "save the whole pipeline with save_pretrained"
            )
    return FAMILIES[name]


def read_family(pretrained: str, lora: LoraSettings | None = None) -> Family:
    """A model's family and configurations. Raises: UserError."""
    return find_family(pretrained).read(pretrained, lora)
