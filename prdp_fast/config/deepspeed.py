"""A DeepSpeed JSON resolved against the recipe: how a job is spread over a machine. Imports nothing of DeepSpeed."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from prdp_fast.config.load import CONFIGS
from prdp_fast.config.recipe import Settings
from prdp_fast.core.errors import UserError


@dataclass(frozen=True)
class DeepSpeedConfig:
    """A DeepSpeed JSON with every "auto" resolved."""

    path: Path
    values: dict[str, Any]  # what deepspeed.initialize is given
    stage: int
    dtype: torch.dtype  # of the policy's weights and matrix products

    @property
    def offloads_optimizer(self) -> bool:
        return self.values["zero_optimization"].get("offload_optimizer", {}).get("device", "none") != "none"

    @property
    def offloads(self) -> list[str]:
        """The devices that the optimizer and the weights are kept on, "none" for the ranks' own."""
        zero = self.values["zero_optimization"]
        return [zero.get(f"offload_{what}", {}).get("device", "none") for what in ("optimizer", "param")]

    def coalesces(self, wanted: str) -> bool:
        """Whether the gradients of an update are reduced over ranks once, after its last micro-batch.

        Stages 1 to 3 in float32. In 16 bits DeepSpeed would add up an update's micro-batches in 16 bits until they are reduced,
        which loses the small ones. Every rank then holds all gradients, so "auto" leaves it off at stage 3, where weights are
        sharded for want of room.

        Args: wanted: performance.coalesce_gradients.
        Raises: UserError if it is "on" and impossible.
        """
        if self.stage > 0 and self.dtype == torch.float32:
            return wanted == "on" or (wanted == "auto" and self.stage < 3)
        if wanted == "on":
            reason = (
                "at ZeRO stage 0 gradients are reduced once an update in any case" if self.stage == 0
                else f"DeepSpeed would add the gradients of an update up in {self.dtype}"
            )  # fmt: skip
            raise UserError(f"performance.coalesce_gradients is on, but {reason}; set auto, or another --config")
        return False


# What of a DeepSpeed JSON is read here, and may therefore not be of another type. Whatever else is in it is DeepSpeed's to judge.

Auto = Literal["auto"]
Whole = Annotated[int, Field(ge=0)] | Auto


class Part(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


class Offload(Part):
    device: Literal["none", "cpu", "nvme"] = "none"


class Zero(Part):
    stage: Annotated[int, Field(ge=0, le=3)] = 0
    offload_optimizer: Offload | Auto | None = None
    offload_param: Offload | Auto | None = None


class Precision(Part):
    enabled: bool | Auto = "auto"


class Parameters(Part):
    lr: float | Auto = "auto"
    betas: Annotated[list[float], Field(min_length=2, max_length=2)] | Auto = "auto"
    eps: float | Auto = "auto"
    weight_decay: float | Auto = "auto"


class Optimizer(Part):
    type: str = "AdamW"
    params: Parameters = Parameters()


class DataTypes(Part):
    grad_accum_dtype: Literal["fp32", "float32", "float", "bf16", "bfloat16", "fp16", "float16", "half"] | None = None


class File(Part):
    train_batch_size: Whole = "auto"
    train_micro_batch_size_per_gpu: Whole = "auto"
    gradient_accumulation_steps: Whole = "auto"
    gradient_clipping: float | Auto = "auto"
    steps_per_print: Annotated[int, Field(ge=0)] | None = None
    optimizer: Optimizer = Optimizer()
    zero_optimization: Zero = Zero()
    bf16: Precision = Precision()
    fp16: Precision = Precision()
    data_types: DataTypes = DataTypes()


def check_types(path: Path, config: Any) -> None:
    """Raises: UserError naming the file, the key, what it holds and what was expected."""
    try:
        File.model_validate(config)
    except ValidationError as error:
        raise UserError(f"config {path.name}: {_explain(error, config)}") from None


def _explain(error: ValidationError, config: Any) -> str:
    """The first problem in one line. Where a value may be of several types, pydantic puts their names into the place."""
    first = error.errors()[0]
    place = [str(part) for part in first["loc"] if part in EXPECTED]
    got: Any = config
    at: list[str] = []
    for part in place:
        got, at = got[part], [*at, part]
        if not isinstance(got, dict):
            break
    text = json.dumps(got)
    shown = text if len(text) <= 80 else f"{text[:80]}..."
    if not at:
        return f"expected a DeepSpeed configuration object, got {shown}"
    return f"{'.'.join(at)} is {shown}; expected {EXPECTED[at[-1]]}"


EXPECTED = {
    "bf16": 'an object, e.g. {"enabled": true}', "fp16": 'an object, e.g. {"enabled": true}',
    "offload_optimizer": 'an object, e.g. {"device": "cpu"}', "offload_param": 'an object, e.g. {"device": "cpu"}',
    "zero_optimization": 'an object, e.g. {"stage": 2}', "optimizer": 'an object, e.g. {"type": "AdamW"}',
    "params": 'an object, e.g. {"lr": "auto"}', "data_types": 'an object, e.g. {"grad_accum_dtype": "fp32"}',
    "lr": 'a number or "auto"', "eps": 'a number or "auto"', "weight_decay": 'a number or "auto"',
    "gradient_clipping": 'a number or "auto"',
    "enabled": 'true, false or "auto"', "stage": "0, 1, 2 or 3", "device": '"none", "cpu" or "nvme"',
    "betas": 'a list of two numbers, or "auto"', "type": "the name of an optimizer",
    "grad_accum_dtype": '"fp32", "bf16" or "fp16"',
    "train_batch_size": 'a whole number or "auto"', "train_micro_batch_size_per_gpu": 'a whole number or "auto"',
    "gradient_accumulation_steps": 'a whole number or "auto"', "steps_per_print": "a whole number",
}  # fmt: skip


def find_config(name: str) -> Path:
    for candidate in (Path(name), CONFIGS / name, CONFIGS / f"{name}.json"):
        if candidate.is_file():
            return candidate
    known = ", ".join(sorted(path.name for path in CONFIGS.glob("*.json")))
    raise UserError(f"--config {name!r} is neither a file nor one of the shipped configurations; known: {known}")


def resolve_config(name: str, settings: Settings, *, world_size: int, stochastic_steps: int, cuda: bool) -> DeepSpeedConfig:
    """Fill in "auto" and refuse a value that contradicts the recipe.

    Args:
        name: path, or name of a file in configs/.
        stochastic_steps: S, the steps of a trajectory that have a log-prob.
        cuda: whether the job runs on CUDA, where "auto" precision is bf16 (float32 at stage 0 and on a CPU).
    Raises: UserError naming the file, the DeepSpeed key and the recipe's key.
    """
    path = find_config(name)
    try:
        config = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise UserError(f"config {path.name}: not valid JSON: {str(error) or 'it is nested too deeply'}") from None
    check_types(path, config)

    def settle(section: dict[str, Any], key: str, value: Any, recipe_key: str, shown: str = "") -> Any:
        """The recipe's value, which the configuration may leave out, leave to "auto" or repeat, but not contradict."""
        given = section.pop(key, "auto")
        same = given == "auto" or (list(given) == list(value) if isinstance(value, (list, tuple)) else given == value)
        if not same:
            raise UserError(
                f"config {path.name}: {shown or key} is {given}, but the recipe's {recipe_key} makes it {value}; "
                f'write "auto", or change one of the two'
            )
        return value

    schedule, optimizer = settings.schedule, settings.optimizer
    trajectories = schedule.prompts_per_epoch * schedule.images_per_prompt
    # DeepSpeed wants numbers, and uses them for nothing here: every update says which backward is its last. So "auto", which is
    # found when the job starts, is 1 to DeepSpeed, and the job's record does not depend on the memory that happened to be free.
    micro_batch = 1 if schedule.micro_batch == "auto" else schedule.micro_batch
    accumulation = math.ceil(trajectories * stochastic_steps / world_size / micro_batch)
    for key, value, recipe_key in (
        ("train_batch_size", micro_batch * accumulation * world_size, "schedule (rows of one update over all ranks)"),
        ("train_micro_batch_size_per_gpu", micro_batch, "schedule.micro_batch"),
        ("gradient_accumulation_steps", accumulation, "schedule (prompts x images x steps / ranks / micro_batch)"),
    ):
        settle(config, key, "auto" if schedule.micro_batch == "auto" else value, recipe_key)
        if key != "train_batch_size":
            config[key] = value
    # DeepSpeed clips at 1.0 when nothing is said, so it is always said.
    config["gradient_clipping"] = settle(config, "gradient_clipping", optimizer.max_grad_norm, "optimizer.max_grad_norm")
    config["steps_per_print"] = config.get("steps_per_print") or 1_000_000_000

    section = config.pop("optimizer", {})
    kind = section.get("type", "AdamW")
    if kind.lower() != "adamw":
        raise UserError(f"config {path.name}: optimizer.type is {kind!r}; expected 'AdamW', the optimizer of the recipe")
    parameters = dict(section.get("params", {}))
    settle(parameters, "lr", optimizer.learning_rate, "optimizer.learning_rate", "optimizer.params.lr")
    settle(parameters, "betas", optimizer.betas, "optimizer.betas", "optimizer.params.betas")
    settle(parameters, "eps", optimizer.eps, "optimizer.eps", "optimizer.params.eps")
    settle(parameters, "weight_decay", optimizer.weight_decay, "optimizer.weight_decay", "optimizer.params.weight_decay")
    if parameters:
        raise UserError(
            f"config {path.name}: optimizer.params.{next(iter(parameters))} has no counterpart in the recipe; remove it"
        )
    if "scheduler" in config:
        raise UserError(f"config {path.name}: a 'scheduler' section contradicts the recipe's optimizer.warmup_updates; remove it")

    zero = config.setdefault("zero_optimization", {})
    stage = zero.get("stage", 0)
    if settings.model.ema_decay is not None and stage == 3:
        raise UserError(
            f"model.ema_decay with config {path.name}: at ZeRO stage 3 no average is kept; use stage 0, 1 or 2, or set ema_decay "
            "null"
        )
    if zero.get("round_robin_gradients") is True:
        raise UserError(
            f"config {path.name}: with zero_optimization.round_robin_gradients DeepSpeed takes one weight's float32 copy for "
            "another's, in checkpoints and in what is exported; remove it, or set it false"
        )
    for key in [key for key, value in zero.items() if value == "auto" or (value is None and key.startswith("offload_"))]:
        del zero[key]  # DeepSpeed's own default
    return DeepSpeedConfig(path, config, stage, _resolve_precision(path, config, stage, cuda))


def _resolve_precision(path: Path, config: dict[str, Any], stage: int, cuda: bool) -> torch.dtype:
    bf16, fp16 = config.setdefault("bf16", {}), config.setdefault("fp16", {})
    if fp16.get("enabled", False) == "auto":
        fp16["enabled"] = False
    if bf16.get("enabled", "auto") == "auto":
        bf16["enabled"] = cuda and stage > 0 and not fp16.get("enabled", False)
    if bf16["enabled"] and fp16.get("enabled", False):
        raise UserError(f"config {path.name}: bf16 and fp16 are both enabled; enable one")
    half = bf16["enabled"] or fp16.get("enabled", False)
    if half and stage == 0:
        raise UserError(
            f"config {path.name}: stage 0 adds the gradients of hundreds of micro-batches up in 16 bits, which loses the small "
            "ones; use stage 1 (it adds in float32), or turn bf16/fp16 off"
        )
    if half:
        config["data_types"] = {"grad_accum_dtype": "fp32"} | config.get("data_types", {})
    if bf16["enabled"] and stage > 1:
        bf16["check_grad_overflow"] = True  # a non-finite gradient never reaches the weights
    return torch.bfloat16 if bf16["enabled"] else torch.float16 if half else torch.float32
