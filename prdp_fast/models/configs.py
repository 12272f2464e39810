"""The JSON files of a model: read by name, checked where a value is of another kind than its class takes."""

from __future__ import annotations

import inspect
import json
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from prdp_fast.core.errors import UserError
from prdp_fast.core.weight_files import fault
from prdp_fast.models.files import find_file

Config = TypeVar("Config", bound="ReadConfig")


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
    shift_factor: float | None = Field(None, allow_inf_nan=False, description="a number, or null")
    block_out_channels: list[Positive] = Field([64], min_length=1, description="a list of whole numbers from 1")
    force_upcast: bool | None = Field(True, description="true or false")
    latents_mean: list[float] | None = Field(None, description="a list of a number a channel, or null")
    latents_std: list[float] | None = Field(None, description="a list of a number a channel, or null")


class TextConfig(ReadConfig):
    max_position_embeddings: Positive = Field(77, description="a whole number from 1, the tokens of a prompt")
    hidden_size: Positive = Field(512, description="a whole number from 1")
    num_hidden_layers: Positive = Field(12, description="a whole number from 1")
    vocab_size: Positive = Field(49408, description="a whole number from 1")


class T5Keys(ReadConfig):
    d_model: Positive = Field(512, description="a whole number from 1")
    num_layers: Positive = Field(6, description="a whole number from 1")
    vocab_size: Positive = Field(32128, description="a whole number from 1")


class TokenizerConfig(ReadConfig):
    # transformers writes 1e30 where there is no limit.
    model_max_length: Annotated[float, Field(ge=1)] | None = Field(None, description="a number of tokens from 1, or nothing")


class SchedulerConfig(ReadConfig):
    name: str = Field("", alias="_class_name", description="the name of a scheduler's class")
    num_train_timesteps: Positive = Field(1000, description="a whole number from 1")
    beta_start: float = Field(0.0001, ge=0, lt=1, description="a number from 0, below 1")
    beta_end: float = Field(0.02, ge=0, lt=1, description="a number from 0, below 1")
    beta_schedule: str = Field("linear", description="the name of a schedule")
    trained_betas: list[float] | None = Field(None, min_length=1, description="a list of numbers, or null")
    prediction_type: str = Field("epsilon", description="epsilon, v_prediction or sample")
    timestep_spacing: str = Field("leading", description="leading, trailing or linspace")
    steps_offset: int = Field(0, description="a whole number")


class FlowSchedulerConfig(ReadConfig):
    name: str = Field("", alias="_class_name", description="the name of a scheduler's class")
    num_train_timesteps: Positive = Field(1000, description="a whole number from 1")
    shift: float = Field(1.0, gt=0, allow_inf_nan=False, description="a number above 0")
    use_dynamic_shifting: bool = Field(False, description="true or false")
    base_shift: float | None = Field(0.5, allow_inf_nan=False, description="a number")
    max_shift: float | None = Field(1.15, allow_inf_nan=False, description="a number")
    base_image_seq_len: Positive | None = Field(256, description="a whole number from 1")
    max_image_seq_len: Positive | None = Field(4096, description="a whole number from 1")


def read_config(pretrained: str, filename: str, keys: type[Config]) -> tuple[Config, dict[str, Any]]:
    """A configuration, checked where it is read by name.

    Returns: what is read, and the whole of it.
    Raises: UserError for a key that is missing or has a value of another kind.
    """
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
