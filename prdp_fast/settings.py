"""The recipe: what a job is. YAML validated by pydantic, where an unknown key fails and names the nearest known one.

How the job is spread over devices is DeepSpeed's own JSON and none of this file's business (`zero.py`).
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from prdp_fast.errors import UserError

REPOSITORY = Path(__file__).resolve().parent.parent
RECIPES = REPOSITORY / "configs" / "recipes"


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _switch(value: Any) -> Any:
    return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value


# YAML reads on and off as booleans.
Switch = Annotated[Literal["auto", "on", "off"], BeforeValidator(_switch)]


def _micro_batch(value: Any) -> Any:
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    raise ValueError(f"{value!r}; expected a whole number of rows, at least 1, or auto")


class LoraSettings(Section):
    """A low-rank adapter (arXiv:2106.09685) that is trained in place of the U-Net's own weights."""

    rank: int = Field(16, ge=1)
    alpha: float | None = Field(None, gt=0, description="the adapter is scaled by alpha / rank; null: alpha = rank")
    targets: list[str] = Field(
        ["to_q", "to_k", "to_v", "to_out.0"], min_length=1, description="layers that get one, by the end of their name"
    )


class ModelSettings(Section):
    pretrained: str = Field("tiny", description="'tiny' (embedded), a diffusers directory, or a hub id")
    lora: LoraSettings | None = Field(None, description="null trains the whole U-Net")
    ema_decay: float | None = Field(
        None, gt=0, lt=1, description="evaluate and export a moving average of the trained weights, e.g. 0.999; stages 0 to 2"
    )
    push_to_hub: str | None = Field(
        None, description="hub id (owner/name) that gets the result at the end; a repository that is new there is private"
    )

    @field_validator("push_to_hub")
    @classmethod
    def _check_hub_id(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", value):
            raise ValueError(f"{value!r} is no hub id; expected owner/name")
        return value


class SamplerSettings(Section):
    num_inference_steps: int = Field(50, ge=1, description="T")
    guidance_scale: float | None = Field(5.0, description="s of classifier-free guidance; null samples without it")
    guidance_interval: tuple[int, int] | None = Field(
        None,
        description="guide only at timesteps from the first to the second (arXiv:2404.07724); steps outside cost one evaluation",
    )
    scheduler: Literal["DDPMScheduler", "DDIMScheduler"] | None = Field(
        None,
        description="sample with this class on the model's noise schedule; null: its own if it is one of them, else DDIM",
    )
    eta: float = Field(1.0, description="DDIM's share of noise, 0 < eta <= 1; DDPM has only 1")
    rollout_batch: int = Field(
        64, ge=1, description="trajectories per U-Net call (guidance doubles the rows); changes speed only"
    )

    @model_validator(mode="after")
    def _check(self) -> SamplerSettings:
        if self.guidance_scale is not None and self.guidance_scale <= 1:
            raise ValueError(
                f"guidance_scale {self.guidance_scale} with classifier-free guidance; expected more than 1, "
                "or null to sample without guidance at half the cost"
            )
        if self.guidance_interval is not None:
            low, high = self.guidance_interval
            if self.guidance_scale is None:
                raise ValueError("guidance_interval without guidance_scale; set guidance_scale, or remove the interval")
            if not 0 <= low <= high:
                raise ValueError(f"guidance_interval [{low}, {high}]; expected timesteps with 0 <= first <= second")
        if not 0 < self.eta <= 1:
            raise ValueError(f"eta {self.eta}; expected 0 < eta <= 1: without noise a step has no density to train")
        return self


class PromptSettings(Section):
    source: str = Field("scenes", description="'scenes' (embedded world), 'animals' (45), a shard directory, or a .txt file")
    train: str = Field("train", description="name of the set that is trained on")
    seen: str = Field("seen_eval", description="evaluation set of prompts that training may draw")
    unseen: str = Field("unseen_eval", description="evaluation set of prompts that training never draws")
    limit: int | None = Field(None, ge=1, description="train on this many prompts of the set, chosen once by a fixed seed")
    stored_embeddings: bool = Field(
        False, description="read the float16 embeddings that `prdp embed` left beside the shards; the text encoder rests"
    )


class RewardSettings(Section):
    name: str
    weight: float = 1.0
    options: dict[str, Any] = {}
    normalise: Literal["none", "running", "batch"] = Field(
        "none",
        description="in training, divide by the standard deviation over all ranks' images before weighting: of the run so far, "
        "or of the epoch. Evaluations and logged parts stay as they are",
    )


class PrdpSettings(Section):
    name: Literal["prdp"] = "prdp"
    kl_weight: float = Field(3e-5, gt=0, description="beta")
    clip_range: float = Field(1e-4, gt=0, description="epsilon, on the log-ratio of one step")


class DdpoSettings(Section):
    name: Literal["ddpo"]
    clip_range: float = Field(1e-4, gt=0, description="PPO clip of one step's importance ratio")
    normalization: Literal["per_prompt", "global"] = Field("per_prompt", description="over what rewards become advantages")
    advantage_clip: float = Field(5.0, gt=0)


class OptimizerSettings(Section):
    learning_rate: float = Field(1e-5, gt=0)
    warmup_updates: int = Field(0, ge=0, description="linear; Adam's first steps are as long as its learning rate")
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(1e-4, ge=0)
    max_grad_norm: float = Field(1.0, gt=0, description="global gradient norm above which the gradient is scaled down")


class ScheduleSettings(Section):
    epochs: int = Field(1000, ge=1, description="E")
    updates_per_epoch: int = Field(1, ge=1, description="K")
    prompts_per_epoch: int = Field(64, ge=1, description="N, over all ranks")
    images_per_prompt: int = Field(8, ge=2, description="B; pairs need two")
    micro_batch: Annotated[int | Literal["auto"], BeforeValidator(_micro_batch)] = Field(
        16, description="(trajectory, timestep) rows of one backward; memory and speed only. auto: as many as fit"
    )
    update_timesteps: int | None = Field(
        None,
        ge=1,
        description="K = 1: backpropagate this many steps of a trajectory, drawn one from each of as many strata; unbiased",
    )
    reference_timesteps: int | None = Field(
        None, ge=2, description="K = 1: evaluate the reference at this many steps of a trajectory, drawn likewise; unbiased"
    )
    time_limit_minutes: float | None = Field(None, gt=0, description="stop after the epoch that passes this, then evaluate")
    on_failure: Literal["stop", "repeat"] = Field(
        "stop",
        description="of a reward, after its own retries: end with a checkpoint, or repeat the epoch, same prompts and noise",
    )
    max_repeats: int = Field(3, ge=1, description="of one epoch or evaluation; the run stops after the last")

    @model_validator(mode="after")
    def _check(self) -> ScheduleSettings:
        for name in ("update_timesteps", "reference_timesteps"):
            if getattr(self, name) is not None and self.updates_per_epoch > 1:
                raise ValueError(
                    f"{name} with updates_per_epoch {self.updates_per_epoch}; a subset of timesteps is unbiased for one update "
                    f"an epoch only: set updates_per_epoch 1, or remove {name}"
                )
        return self


class PerformanceSettings(Section):
    """How fast, never what. `auto` takes what works and is faster on this machine, and says so once; `on` insists."""

    attention: Literal["auto", "sdpa", "xformers", "flash", "cudnn"] = Field(
        "auto", description="auto: the fastest of those that work, measured at start on the model's own shapes"
    )
    compile: Annotated[Literal["auto", "off", "blocks", "full"], BeforeValidator(_switch)] = Field(
        "auto", description="torch.compile of the U-Net: its repeated blocks (starts soon) or all of it"
    )
    compile_cache: str | None = Field(None, description="directory of compiled code; a second start is quick. null: torch's own")
    cuda_graphs: Switch = Field("auto", description="capture the rollout's fixed shapes")
    channels_last: Switch = "auto"
    fuse_qkv: Switch = Field("auto", description="one matrix product for query, key and value of the frozen U-Nets")
    tf32: Switch = Field("auto", description="float32 matrix products of CUDA on tensor cores")
    fused_optimizer: Switch = Field("auto", description="AdamW in one kernel")
    activation_checkpointing: bool = Field(
        False, description="recompute activations in the backward: less memory, a third slower"
    )
    coalesce_gradients: Switch = Field(
        "auto", description="reduce gradients over ranks once an update; needs room for all of them"
    )
    background_rewards: Switch = Field("auto", description="score images while the U-Net goes on")


class EvaluationSettings(Section):
    prompts: int = Field(96, ge=0, description="prompts of each evaluation set; 0 evaluates nothing")
    images_per_prompt: int = Field(1, ge=1)
    every: int = Field(0, ge=0, description="epochs between evaluations of the seen set and sample grids; 0: ends only")
    seed: int = Field(0, ge=0, description="draws the evaluation prompts and their noise, the same before and after")


class CheckpointSettings(Section):
    every: int = Field(50, ge=1, description="epochs")
    keep: int = Field(2, ge=1, description="the newest this many stay")


class Settings(Section):
    """One job."""

    seed: int = Field(0, ge=0)
    kernels: Literal["auto", "triton", "torch"] = "auto"
    model: ModelSettings = ModelSettings()
    sampler: SamplerSettings = SamplerSettings()
    prompts: PromptSettings = PromptSettings()
    rewards: list[RewardSettings] = Field(min_length=1)
    objective: Annotated[PrdpSettings | DdpoSettings, Field(discriminator="name")] = PrdpSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    performance: PerformanceSettings = PerformanceSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()

    def check_ranks(self, world_size: int) -> None:
        """Refuse a rank count that would split a prompt's group, before anything is loaded."""
        if self.schedule.prompts_per_epoch % world_size:
            raise UserError(
                f"schedule.prompts_per_epoch is {self.schedule.prompts_per_epoch}, not divisible by {world_size} ranks; "
                f"use a multiple of {world_size}, or another --num_gpus"
            )


def find_recipe(name: str) -> Path:
    """A path as given, or the name of a recipe in configs/recipes."""
    for candidate in (Path(name), RECIPES / name, RECIPES / f"{name}.yaml"):
        if candidate.is_file():
            return candidate
    known = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    raise UserError(f"recipe {name!r} is neither a file nor one of the shipped recipes{_nearest(name, known)}")


def load_recipe(name: str, overrides: list[str] | None = None, *, seed: int | None = None) -> Settings:
    """Read, override and validate a recipe.

    Args:
        name: path or shipped name.
        overrides: "section.key=value" strings; the value is YAML. List items are addressed by number: rewards.0.weight=2.
        seed: replaces the recipe's own.
    Raises: UserError, one line, naming file, key and the nearest known key.
    """
    path = find_recipe(name)
    try:
        raw = yaml.load(path.read_text(), Loader=_RecipeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {path.name}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise UserError(f"recipe {path.name}: expected a mapping of sections at the top level, got {type(raw).__name__}")
    for override in overrides or []:
        _apply_override(raw, override)
    if seed is not None:
        raw["seed"] = seed
    if isinstance(raw.get("objective"), dict):
        raw["objective"].setdefault("name", "prdp")
    try:
        return Settings.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"recipe {path.name}: {_explain(error)}") from None


class _RecipeLoader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-4 as a string for want of a dot, and takes the last of two equal keys in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _construct_number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    return float(loader.construct_scalar(node))


_RecipeLoader.add_constructor("tag:prdp,scientific", _construct_number)
_RecipeLoader.add_implicit_resolver(
    "tag:prdp,scientific", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse_value(text: str) -> Any:
    """A value as a recipe would hold it. Raises: ValueError if it is not YAML."""
    try:
        return yaml.load(text, Loader=_RecipeLoader)
    except yaml.YAMLError:
        raise ValueError(f"the value {text!r} is not valid YAML") from None


def _apply_override(raw: dict[str, Any], override: str) -> None:
    path, separator, text = override.partition("=")
    keys = path.split(".")
    if not separator or not all(keys):
        raise UserError(f"--set {override!r}: expected section.key=value, e.g. --set schedule.epochs=10")
    try:
        value = parse_value(text)
    except ValueError as error:
        raise UserError(f"--set {override!r}: {error}") from None
    place: Any = raw
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(place, list):
            if not key.isdigit() or int(key) >= len(place):
                raise UserError(f"--set {override!r}: {'.'.join(keys[:depth])} is a list of {len(place)}; {key!r} is not in it")
            if last:
                place[int(key)] = value
            else:
                place = place[int(key)]
        elif isinstance(place, dict):
            if last:
                place[key] = value
            else:
                if place.get(key) is None:
                    place[key] = {}
                place = place[key]
        else:
            raise UserError(f"--set {override!r}: {'.'.join(keys[:depth])} is {place!r}, not a section")


def _explain(error: ValidationError) -> str:
    """The first problem as one line, in the recipe's own words."""
    problem = error.errors()[0]
    # The discriminated objective adds its tag ("prdp") to the location; the user never wrote it.
    location = [part for i, part in enumerate(problem["loc"]) if not (i == 1 and problem["loc"][0] == "objective")]
    where = ".".join(str(part) for part in location)
    if problem["type"] == "extra_forbidden":
        section, key = location[:-1], str(location[-1])
        fields = _fields_at(problem["loc"][:-1])
        place = f" under {'.'.join(map(str, section))!r}" if section else ""
        return f"unknown key {key!r}{place}{_nearest(key, fields)}"
    if problem["type"] == "missing":
        return f"{where} is missing; it has no default"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{where}: {message}" if where else message
    return f"{where} is {problem['input']!r}: {message[0].lower()}{message[1:]}"


def _fields_at(location: tuple[int | str, ...]) -> list[str]:
    sections: dict[str, type[Section]] = {"rewards": RewardSettings, "prdp": PrdpSettings, "ddpo": DdpoSettings}
    section: type[Section] = Settings
    for part in location:
        if part in sections:
            section = sections[str(part)]
        elif part in section.model_fields:
            annotation = section.model_fields[str(part)].annotation
            choices = [annotation, *get_args(annotation)]  # of an optional section, say
            section = next((c for c in choices if isinstance(c, type) and issubclass(c, Section)), section)
    return list(section.model_fields)


def _nearest(word: str, known: list[str]) -> str:
    """'; did you mean ...?', or the list when nothing is near. klweight -> kl_weight."""
    flat = {name.replace("_", "").lower(): name for name in known}
    near = difflib.get_close_matches(word.replace("_", "").lower(), flat, n=1, cutoff=0.6)
    return f"; did you mean {flat[near[0]]!r}?" if near else f"; known: {', '.join(known)}"
