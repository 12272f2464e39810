"""The models that can be trained: one table of them, by the class of their diffusers pipeline."""

from __future__ import annotations

from prdp_fast.config.recipe import LoraSettings
from prdp_fast.core.errors import UserError
from prdp_fast.models.configs import read_json, shown
from prdp_fast.models.families.base import Family
from prdp_fast.models.families.flux import Flux
from prdp_fast.models.families.sd import StableDiffusion
from prdp_fast.models.families.sd3 import StableDiffusion3
from prdp_fast.models.families.sdxl import StableDiffusionXL
from prdp_fast.models.files import INDEX

FAMILIES: dict[str, type[Family]] = {
    family.pipeline_class.__name__: family for family in (StableDiffusion, StableDiffusionXL, StableDiffusion3, Flux)
}

__all__ = ["FAMILIES", "Family", "StableDiffusion", "StableDiffusionXL", "find_family", "read_family"]


def find_family(pretrained: str) -> type[Family]:
    """By model_index.json alone. Raises: UserError if it is another class of pipeline, or lacks a component."""
    index = read_json(pretrained, INDEX)
    name = index.get("_class_name")
    if not isinstance(name, str) or name not in FAMILIES:
        what = f"is a {name}" if isinstance(name, str) else f"has _class_name {shown(name)} in its {INDEX}"
        raise UserError(
            f"model.pretrained {pretrained!r} {what}; expected a {' or '.join(FAMILIES)}: text-to-image models of the families "
            f"{', '.join(family.title for family in FAMILIES.values())}"
        )
    family = FAMILIES[name]
    for component in family.components:
        entry = index.get(component)
        if entry in (None, [None, None]) and component in family.optional:
            continue
        if entry is None or entry == [None, None]:
            raise UserError(
                f"model.pretrained {pretrained!r} has no {component} in its {INDEX}, which a {name} needs; "
                "save the whole pipeline with save_pretrained"
            )
        if not (isinstance(entry, list) and len(entry) == 2 and all(isinstance(word, str) for word in entry)):
            raise UserError(
                f"model.pretrained {pretrained!r}: {INDEX}: {component} is {shown(entry)}; expected the library and the name of "
                'its class, such as ["diffusers", "AutoencoderKL"]; correct it there'
            )
    denoiser = index[family.denoiser_component]
    if denoiser[1] != family.denoiser_class.__name__:
        raise UserError(
            f"model.pretrained {pretrained!r}: {INDEX}: {family.denoiser_component} is {shown(denoiser)}; expected a "
            f"{family.denoiser_class.__name__}"
        )
    return family


def read_family(pretrained: str, lora: LoraSettings | None = None) -> Family:
    """A model's family and configurations. Raises: UserError."""
    return find_family(pretrained).read(pretrained, lora)
