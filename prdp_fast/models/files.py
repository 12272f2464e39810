"""The files of a model: a diffusers directory, a hub id, or 'tiny', which ships with the package."""

from __future__ import annotations

import inspect
import json
import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from diffusers.utils import logging as diffusers_logging
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from transformers.utils import logging as transformers_logging

from prdp_fast.core.digest import files_digest
from prdp_fast.core.errors import UserError
from prdp_fast.core.hub import hub_file
from prdp_fast.core.run_directory import EXPORT, RUN
from prdp_fast.core.weight_files import CHECKPOINTS, check_weight_file, fault, quantised_tensor, read_header
from prdp_fast.models.lora import WEIGHTS as LORA_WEIGHTS
from prdp_fast.world import TINY

READ = {".json", ".txt", ".model", ".safetensors", ".bin"}  # of a component; tokenizers have the second and third
INDEX = "model_index.json"
PIPELINE_DIRECTORY = "expected a diffusers pipeline directory, as save_pretrained writes it"
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")  # of weight files: diffusers', transformers' and its older one

Config = TypeVar("Config", bound="ReadConfig")


def resolve(pretrained: str) -> str:
    """A directory or a hub id, as diffusers reads it."""
    return str(TINY) if pretrained == "tiny" else pretrained


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


# Configurations.


def read_json(pretrained: str, filename: str) -> dict[str, Any]:
    """A configuration of a pipeline directory or hub id. Raises: UserError if it is not there, or no JSON object."""
    path, what = find_file(pretrained, filename), f"model.pretrained {pretrained!r}"
    if reason := fault(path):
        raise UserError(f"{what}: {filename} {reason}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what}: {filename} is no JSON ({error}); fetch it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{what}: {filename} holds {kind_of(content)}; expected an object of settings; fetch it again")
    return content


class ReadConfig(BaseModel):
    """What is read of a configuration by name. Of each key, what is expected: its description."""

    model_config = ConfigDict(strict=True, extra="ignore", populate_by_name=True)


def one_size(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


Positive = Annotated[int, Field(ge=1)]
Side = Annotated[Positive | tuple[Positive, Positive], BeforeValidator(one_size)]
Sizes = Annotated[Positive | tuple[Positive, ...], BeforeValidator(one_size)]


class UnetConfig(ReadConfig):
    sample_size: Side = Field(description="the side of its latents, such as 64 for pictures of 512 pixels, or [height, width]")
    in_channels: Positive = Field(4, description="a whole number from 1")
    cross_attention_dim: Sizes = Field(1280, description="the text encoder's width, a whole number or a list of them")
    addition_embed_type: str | None = Field(None, description="a name or null")
    addition_time_embed_dim: Positive | None = Field(None, description="a whole number from 1, or null")
    projection_class_embeddings_input_dim: Positive | None = Field(None, description="a whole number from 1, or null")
    time_cond_proj_dim: Positive | None = Field(None, description="a whole number from 1, or null")


class VaeConfig(ReadConfig):
    scaling_factor: float = Field(0.18215, gt=0, allow_inf_nan=False, description="a number above 0")
    latent_channels: Positive = Field(4, description="a whole number from 1")
    block_out_channels: list[Positive] = Field([64], min_length=1, description="a list of whole numbers from 1")
    force_upcast: bool | None = Field(True, description="true or false")
    latents_mean: list[float] | None = Field(None, description="a list of a number a channel, or null")
    latents_std: list[float] | None = Field(None, description="a list of a number a channel, or null")


class TextConfig(ReadConfig):
    max_position_embeddings: Positive = Field(77, description="a whole number from 1, the tokens of a prompt")
    hidden_size: Positive = Field(512, description="a whole number from 1")
    num_hidden_layers: Positive = Field(12, description="a whole number from 1")
    vocab_size: Positive = Field(49408, description="a whole number from 1")


class TokenizerConfig(ReadConfig):
    # transformers writes 1e30 where there is no limit.
    model_max_length: Annotated[float, Field(ge=1)] | None = Field(None, description="a number of tokens from 1, or nothing")


class SchedulerConfig(ReadConfig):
    name: str = Field("", alias="_class_name", description="the name of a scheduler's class")
    num_train_timesteps: Positive = Field(1000, description="a whole number from 1")
    beta_start: float = Field(0.0001, ge=0, lt=1, description="a number from 0, below 1")
    beta_end: float = Field(0.02, ge=0, lt=1, description="a number from 0, below 1")
    beta_schedule: str = Field("linear", description="the name of a schedule")
    trained_betas: list[float] | None = Field(None, description="a list of numbers, or null")
    prediction_type: str = Field("epsilon", description="epsilon, v_prediction or sample")
    timestep_spacing: str = Field("leading", description="leading, trailing or linspace")
    steps_offset: int = Field(0, description="a whole number")


def read_config(pretrained: str, filename: str, keys: type[Config], *, optional: bool = False) -> tuple[Config, dict[str, Any]]:
    """A configuration, checked where it is read by name.

    Args: optional: without the file its defaults are returned.
    Returns: what is read, and the whole of it.
    Raises: UserError for a key that is missing or has a value of another kind.
    """
    directory = Path(resolve(pretrained))
    if optional and directory.is_dir() and not (directory / filename).is_file():
        return keys(), {}
    content = read_json(pretrained, filename)
    try:
        return keys.model_validate(content), content
    except ValidationError as error:
        key = str(error.errors()[0]["loc"][0])
        expected = next(
            field.description for name, field in keys.model_fields.items() if key in (name, field.alias)
        )  # fmt: skip
        found = f"{key} is {shown(content[key])}" if key in content else f"it has no {key}"
        raise UserError(f"model.pretrained {pretrained!r}: {filename}: {found}; expected {expected}; correct it there") from None


def check_arguments(pretrained: str, filename: str, content: Mapping[str, Any], built: type) -> None:
    """Compare a configuration with what the constructor of diffusers' class is annotated to take, where it is.

    null passes: diffusers' own published configurations have it where the annotation does not.

    Raises: UserError for a value of another kind.
    """
    constructor = getattr(built, "__init__")  # noqa: B009  # of a class, which mypy would have its own opinion on
    try:
        hints = typing.get_type_hints(constructor)
    except (NameError, TypeError):
        return
    for name, parameter in inspect.signature(constructor).parameters.items():
        if name not in content or content[name] is None or name not in hints:
            continue
        kinds = kinds_of(hints[name])
        if parameter.default not in (inspect.Parameter.empty, None):
            kinds |= {type(parameter.default)}
        if object not in kinds and not all(is_of(value, kinds) for value in flat(content[name], kinds)):
            words = " or ".join(sorted(KINDS[kind] for kind in kinds if kind in KINDS))
            raise UserError(
                f"model.pretrained {pretrained!r}: {filename}: {name} is {shown(content[name])}; expected {words}, as "
                f"{built.__name__} takes; correct it there"
            )


KINDS: dict[type, str] = {
    int: "a whole number", float: "a number", str: "a text", bool: "true or false", list: "a list", dict: "an object",
}  # fmt: skip


def kinds_of(annotation: Any) -> set[type]:
    """The kinds of JSON that an annotation speaks of, those inside lists among them. `object`: any."""
    if annotation in (int, float, str, bool, dict):
        return {annotation}
    if annotation is type(None):
        return set()
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in (list, tuple):
        return {list, object}
    if origin in (typing.Union, types.UnionType):
        return set().union(*map(kinds_of, arguments))
    if origin in (list, tuple):
        return {list}.union(*(kinds_of(argument) for argument in arguments if argument is not Ellipsis))
    if origin is typing.Literal:
        return {type(value) for value in arguments}
    return {object}


def flat(value: Any, kinds: set[type]) -> Iterable[Any]:
    """The values inside lists, where lists are taken; otherwise the value."""
    if isinstance(value, list) and kinds & {list, tuple}:
        for inner in value:
            yield from flat(inner, kinds)
    else:
        yield value


def is_of(value: Any, kinds: set[type]) -> bool:
    if value is None:
        return True
    return type(value) in kinds or (type(value) is int and float in kinds)


def kind_of(value: Any) -> str:
    return "null" if value is None else KINDS[type(value)]


def shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


# Weights.


@dataclass(frozen=True)
class Weights:
    """The files of one network, as its directory holds them."""

    files: tuple[Path, ...]
    variant: str | None = None  # of their names, such as fp16

    def layers(self) -> int:
        """Of a text encoder, by the names in its safetensors files; 0 if they have no such names."""
        names = [name for path in self.files if path.suffix == ".safetensors" for name in read_header(path)]
        return max((int(match[1]) + 1 for name in names if (match := re.search(r"\.layers\.(\d+)\.", name))), default=0)


def find_weights(directory: Path) -> Weights | None:
    """The files that diffusers or transformers would read from a network's directory; None if there are none.

    The plain file before one that is split, safetensors before torch's own, and a variant where there is nothing else.
    """
    names = sorted(path.name for path in directory.iterdir() if path.is_file()) if directory.is_dir() else []
    for suffix in (".safetensors", ".bin"):
        for stem in STEMS:
            if stem + suffix in names:
                return Weights((directory / f"{stem}{suffix}",))
            if f"{stem}{suffix}.index.json" in names:
                return Weights(split_files(directory / f"{stem}{suffix}.index.json"))
    for suffix in (".safetensors", ".bin"):
        for stem in STEMS:
            for name in names:
                variant = name.removeprefix(f"{stem}.").removesuffix(suffix)
                if name == f"{stem}.{variant}{suffix}" and variant and "." not in variant and "-" not in variant:
                    return Weights((directory / name,), variant)
                variant = name.removeprefix(f"{stem}{suffix}.index.").removesuffix(".json")
                if name == f"{stem}{suffix}.index.{variant}.json" and variant:
                    return Weights(split_files(directory / name), variant)
    return None


def split_files(index: Path) -> tuple[Path, ...]:
    """The index of weights that are split over files, and those files. Raises: UserError if one is missing."""
    if reason := fault(index):
        raise UserError(f"{index} {reason}")
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        names = sorted({str(name) for name in content["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{index} is no index of weights; expected an object with a weight_map; fetch it again") from None
    for name in names:
        if not (index.parent / name).is_file():
            raise UserError(f"{index.parent / name} is missing, of which {index.name} speaks; fetch it again")
    return (index, *(index.parent / name for name in names))


def check_weights(pretrained: str, directory: Path, component: str) -> Weights | None:
    """A network's files of weights, looked at but not read; None if there are none.

    Raises: UserError if one is damaged, or holds what is no floating-point number.
    """
    what = f"model.pretrained {pretrained!r}"
    try:
        weights = find_weights(directory / component)
    except UserError as error:
        raise UserError(f"{what}: {error}") from None
    for path in weights.files if weights else ():
        check_weight_file(what, path)
        if path.suffix == ".safetensors" and (tensor := quantised_tensor(path)):
            raise UserError(
                f"{what}: {path} holds quantised weights, {tensor}; expected float32, float16 or bfloat16: give the model that "
                "it was made from"
            )
    return weights


def pipeline_digest(pretrained: str) -> str:
    """Of the files that a pipeline is loaded from; of one on the hub, its commit there. Raises: UserError, OSError."""
    index = find_file(pretrained, "model_index.json")
    root = Path(resolve(pretrained))
    if not root.is_dir():
        return index.parent.name  # in the hub's cache a file lies in a directory named after its commit
    components = [name for name, value in read_json(pretrained, "model_index.json").items() if isinstance(value, list)]
    files = [path for name in components for path in (root / name).rglob("*") if path.suffix in READ and path.is_file()]
    return files_digest((path.relative_to(root).as_posix(), path) for path in [index, *files])


def quiet_loading() -> None:
    """No progress bars for loading and saving, and no advice on dtypes, between the lines of a run."""
    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()
        library.set_verbosity_error()
