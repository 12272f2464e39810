"""The recipe: what a job is. YAML validated by pydantic, where an unknown key fails and names the nearest known one.

How the job is spread over devices is DeepSpeed's own JSON (`deepspeed.py`).
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from prdp_fast.config.objectives import ObjectiveSettings, PrdpSettings
from prdp_fast.config.section import LARGEST, Section
from prdp_fast.config.tracking import TrackingSettings
from prdp_fast.core.errors import UserError

MOST_NAMED = 12  # numbers in one line
COLLECTIVE_MARGIN_S = 120.0  # that ranks may differ by beside what their rewards may take


def _switch(value: Any) -> Any:
    return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value


# YAML reads on and off as booleans.
Switch = Annotated[Literal["auto", "on", "off"], BeforeValidator(_switch)]


def _micro_batch(value: Any) -> Any:
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    raise ValueError(f"{value!r}; expected a whole number of rows, at least 1, or auto")


def _stop_after(value: Any) -> Any:
    if isinstance(value, str) and (match := re.fullmatch(r"([0-9]{1,2}):([0-9]{2})", value)):
        if int(match[1]) < 24 and int(match[2]) < 60:
            return value
    elif value is None or (isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0):
        return value
    raise ValueError(f"{value!r}; expected minutes above 0, or a time of day such as 06:30")


class LoraSettings(Section):
    """A low-rank adapter (arXiv:2106.09685) that is trained in place of the denoiser's own weights."""

    rank: int = Field(16, ge=1)
    alpha: float | None = Field(None, gt=0, description="the adapter is scaled by alpha / rank; null: alpha = rank")
    targets: list[str] | None = Field(
        None, min_length=1, description="layers that get one, by the end of their name; null: the model's attention projections"
    )


class ModelSettings(Section):
    pretrained: str = Field("tiny", description="'tiny' or 'tiny_flow' (embedded), a diffusers directory, or a hub id")
    lora: LoraSettings | None = Field(None, description="null trains the whole denoiser")
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


class RandomSteps(Section):
    """A run of consecutive steps, another one for each trajectory, drawn from its noise key."""

    count: int = Field(..., ge=1, description="steps of a run")
    first: int = Field(0, ge=0, description="number of the first step that a run may have")
    last: int | None = Field(None, ge=0, description="of the last; null: the last step with noise")


def _stochastic_steps(value: Any) -> Any:
    def whole(number: Any) -> bool:
        return isinstance(number, int) and not isinstance(number, bool) and number >= 0

    match value:
        case None | RandomSteps():
            return value
        case [first, last] if whole(first) and whole(last) and first <= last:
            return value
        case dict() if value.keys() <= RandomSteps.model_fields.keys() and whole(value.get("count")) and value["count"]:
            first, last = value.get("first", 0), value.get("last")
            if whole(first) and (last is None or (whole(last) and first <= last)):
                return RandomSteps(**value)
    raise ValueError(
        f"{value!r}; expected [first, last] with 0 <= first <= last, numbers of steps, or {{count: 2, first: 0, last: 5}} for a "
        "random run of each trajectory, or null for all"
    )


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
    eta: float = Field(1.0, description="DDIM's share of noise, 0 < eta <= 1; DDPM and flow matching have only 1")
    method: Literal["flow_sde", "dance_sde", "cps", "exact", "exact_dance"] | None = Field(
        None, description="of flow-matching models: how a noisy step is taken; null: flow_sde"
    )
    noise_level: float | None = Field(
        None, description="of flow-matching models; null: the method's own, 0.7 flow_sde and exact, 0.3 dance_sde, 0.8 cps"
    )
    embedded_guidance: float | None = Field(
        None,
        ge=0,
        le=LARGEST,
        description="guidance that a guidance-distilled model is told, at no further cost; null: its pipeline's default",
    )
    image_size: int | tuple[int, int] | None = Field(
        None, description="pixels of a side, or [height, width], of models for many sizes; null: the model's own"
    )
    max_sequence_length: int | None = Field(
        None, ge=1, description="tokens of a prompt for a T5 text encoder; null: its pipeline's default"
    )
    stochastic_steps: Annotated[tuple[int, int] | RandomSteps | None, BeforeValidator(_stochastic_steps)] = Field(
        None,
        description="numbers of the first and last step that are noisy and trained, 0 the noisiest, or {count, first, last} for "
        "a random run of each trajectory; the others are the ODE's. null: all that can be",
    )
    rollout_batch: int = Field(
        64, ge=1, description="trajectories per denoiser call (guidance doubles the rows); changes speed only"
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
            if not 0 <= low <= high < 2**31:
                raise ValueError(f"guidance_interval [{low}, {high}]; expected timesteps with 0 <= first <= second < 2^31")
        if not 0 < self.eta <= 1:
            raise ValueError(f"eta {self.eta}; expected 0 < eta <= 1: without noise a step has no density to train")
        return self


class PromptSettings(Section):
    source: str = Field(
        "scenes", description="'scenes' (embedded world), 'animals' (45), a shard directory or its URL, or a .txt file"
    )
    train: str = Field("train", description="name of the set that is trained on")
    seen: str = Field("seen_eval", description="evaluation set of prompts that training may draw")
    unseen: str = Field("unseen_eval", description="evaluation set of prompts that training never draws")
    limit: int | None = Field(None, ge=1, description="train on this many prompts of the set, chosen once by a fixed seed")
    stored_embeddings: bool = Field(
        False, description="read the float16 embeddings that `prdp embed` left beside the shards; the text encoder rests"
    )
    on_corrupt: Literal["stop", "skip"] = Field(
        "stop",
        description="a damaged shard of the trained set: stop, or leave it out of all passes, as found when the run began",
    )
    cache_dir: str | None = Field(None, description="of files from a URL; null: the user's cache. Ranks and jobs may share it")
    cache_gb: float = Field(10.0, gt=0, description="that it may hold; what was used longest ago goes first")
    fetch_timeout_s: float = Field(
        300.0, gt=0, description="seconds in which a file has to come from its URL, with all attempts; then the run stops"
    )


class RewardSettings(Section):
    name: str
    weight: float = 1.0
    options: dict[str, Any] = Field({})
    normalise: Literal["none", "running", "batch"] = Field(
        "none",
        description="in training, divide by the standard deviation over all ranks' images before weighting: of the run so far, "
        "or of the epoch. Evaluations and logged parts stay as they are",
    )


Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerSettings(Section):
    learning_rate: float = Field(1e-5, gt=0)
    warmup_updates: int = Field(0, ge=0, description="linear; Adam's first steps are as long as its learning rate")
    betas: tuple[Beta, Beta] = (0.9, 0.999)
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
    time_limit_minutes: float | None = Field(
        None, gt=0, description="of each start: stop after the epoch that passes this, then evaluate; the same command goes on"
    )
    stop_after: Annotated[float | str | None, BeforeValidator(_stop_after)] = Field(
        None,
        description="minutes of each start, or a time of day (06:30): stop as by SIGTERM, saved and without an evaluation; in a "
        "job of SLURM, --grace before its end at the latest",
    )
    collective_timeout_minutes: float | None = Field(
        None,
        gt=0,
        description="that a rank waits for the others; then the run ends and says which did not come. null: 30, or longer where "
        "rewards may take longer",
    )
    on_failure: Literal["stop", "repeat"] = Field(
        "stop",
        description="of a reward, after its own retries: end with a checkpoint, or repeat the epoch, same prompts and noise",
    )
    max_repeats: int = Field(3, ge=1, description="of one epoch or evaluation; the run stops after the last")
    reward_timeout_s: float = Field(
        540, gt=0, description="seconds that each reward has to score a rank's images; then it failed"
    )
    max_skipped_updates: int = Field(
        20,
        ge=1,
        description="updates in a row that were skipped, for no gradient was finite; then the run stops, saved",
    )
    max_nonfinite_epochs: int = Field(
        3, ge=1, description="epochs in a row with an image that came out NaN, and has no reward; then the run stops likewise"
    )

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
        "auto", description="torch.compile of the denoiser: its repeated blocks (starts soon) or all of it"
    )
    compile_cache: str | None = Field(
        None,
        description="directory of compiled code, for a quick second start; null: on a GPU the user's cache, else torch's own",
    )
    cuda_graphs: Switch = Field("auto", description="capture the rollout's fixed shapes")
    channels_last: Switch = "auto"
    fuse_qkv: Switch = Field("auto", description="one matrix product for query, key and value of the frozen denoisers")
    shared_halves: Switch = Field(
        "auto", description="compute once what both halves of a guided call have in common: all before the first cross-attention"
    )
    tf32: Switch = Field("auto", description="float32 matrix products of CUDA on tensor cores")
    fused_optimizer: Switch = Field("auto", description="AdamW in one kernel")
    activation_checkpointing: bool = Field(
        False, description="recompute activations in the backward: less memory, a third slower"
    )
    coalesce_gradients: Switch = Field(
        "auto", description="reduce gradients over ranks once an update; needs room for all of them"
    )
    background_rewards: Switch = Field("auto", description="score images while the denoiser goes on")


class EvaluationSettings(Section):
    prompts: int = Field(96, ge=0, description="prompts of each evaluation set; 0 evaluates nothing")
    images_per_prompt: int = Field(1, ge=1)
    every: int = Field(0, ge=0, description="epochs between evaluations of the seen set and sample grids; 0: ends only")
    rewards: list[RewardSettings] = Field(
        [], description="held out from training: scored at every evaluation, beside the trained ones, to see them over-optimised"
    )
    on_over_optimised: Literal["warn", "stop"] = Field(
        "warn",
        description="where the trained reward has risen and one of `rewards` has fallen, by more than two standard errors each: "
        "a line, or that and the end of the training",
    )
    seed: int = Field(0, ge=0, lt=2**63, description="draws the evaluation prompts and their noise, the same before and after")


class CheckpointSettings(Section):
    every: int = Field(50, ge=1, description="epochs")
    keep: int = Field(2, ge=1, description="the newest this many stay")
    keep_every: int | None = Field(None, ge=1, description="every so manieth checkpoint stays too; null: none")
    keep_best: str | None = Field(
        None,
        description="the checkpoint with the highest value of this metric of evaluations stays too, e.g. evaluation/unseen, or "
        "evaluation/unseen/held/NAME of a reward that is held out; one is saved when an evaluation is the best so far",
    )
    async_save: Switch = Field(
        "auto", description="training stands still for a copy to host memory, which is then written; auto: where that has room"
    )

    @field_validator("keep_best")
    @classmethod
    def _check_metric(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"evaluation/(seen|unseen)(/held/.+)?", value):
            raise ValueError(
                f"{value!r}; expected evaluation/seen or evaluation/unseen, or one of these with /held/NAME behind it"
            )
        return value


class Settings(Section):
    """One job."""

    seed: int = Field(0, ge=0, lt=2**63)
    kernels: Literal["auto", "triton", "torch"] = "auto"
    model: ModelSettings = ModelSettings()
    sampler: SamplerSettings = SamplerSettings()
    prompts: PromptSettings = PromptSettings()
    rewards: list[RewardSettings] = Field(min_length=1)
    objective: ObjectiveSettings = PrdpSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    performance: PerformanceSettings = PerformanceSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    tracking: TrackingSettings = TrackingSettings()

    @model_validator(mode="after")
    def _check_reference(self) -> Settings:
        if getattr(self.objective, "reference", None) == "moving_average" and self.model.ema_decay is None:
            raise ValueError("objective.reference 'moving_average' without model.ema_decay; set it, to 0.99 say")
        return self

    @model_validator(mode="after")
    def _check_best(self) -> Settings:
        metric, evaluation = self.checkpoint.keep_best, self.evaluation
        if metric is None:
            return self
        if not evaluation.every or not evaluation.prompts:
            name = "prompts" if evaluation.every else "every"
            raise ValueError(f"checkpoint.keep_best {metric!r} with evaluation.{name} 0, without evaluations; set that above 0")
        held, named = [reward.name for reward in evaluation.rewards], metric.partition("/held/")[2]
        if named and named not in held:
            known = f"expected one of {', '.join(held)}" if held else "there are none"
            raise ValueError(f"checkpoint.keep_best {metric!r}: {named!r} is no reward of evaluation.rewards; {known}")
        return self

    @model_validator(mode="after")
    def _check_over_optimised(self) -> Settings:
        evaluation = self.evaluation
        if evaluation.on_over_optimised == "stop":
            if not evaluation.rewards or not evaluation.every or not evaluation.prompts:
                missing = next(name for name in ("rewards", "every", "prompts") if not getattr(evaluation, name))
                raise ValueError(f"evaluation.on_over_optimised 'stop' without evaluation.{missing}, which it looks at; set that")
            if self.checkpoint.keep_best is None:
                raise ValueError(
                    "evaluation.on_over_optimised 'stop' without checkpoint.keep_best, for it comes too late for the last "
                    "weights; set that, to evaluation/seen/held/NAME say"
                )
        return self

    @property
    def longest_rewards_s(self) -> float:
        """That the rewards of a rank may take while the others wait."""
        return (len(self.rewards) + len(self.evaluation.rewards)) * self.schedule.reward_timeout_s

    @property
    def collective_timeout_s(self) -> float:
        minutes = self.schedule.collective_timeout_minutes
        return 60 * minutes if minutes is not None else max(1800.0, self.longest_rewards_s + COLLECTIVE_MARGIN_S)

    @model_validator(mode="after")
    def _check_timeouts(self) -> Settings:
        if self.collective_timeout_s <= self.longest_rewards_s:
            raise ValueError(
                f"schedule.collective_timeout_minutes {self.schedule.collective_timeout_minutes:g} is not above what the rewards "
                f"may take ({len(self.rewards) + len(self.evaluation.rewards)} x schedule.reward_timeout_s "
                f"{self.schedule.reward_timeout_s:g} s = "
                f"{self.longest_rewards_s / 60:g} minutes); raise the first, or lower the second"
            )
        return self

    def check_ranks(self, world_size: int) -> None:
        """Refuse a rank count that would split a prompt's group, before anything is loaded."""
        if self.schedule.prompts_per_epoch % world_size:
            prompts = self.schedule.prompts_per_epoch
            fits = [count for count in divisors(prompts) if count <= 2 * world_size][-MOST_NAMED:]
            named = " or ".join(filter(None, [", ".join(map(str, fits[:-1])), str(fits[-1])]))
            near = max(count for count in fits if count <= world_size)
            raise UserError(
                f"schedule.prompts_per_epoch is {prompts}, not divisible by {world_size} ranks; start {named} "
                f"(--num_gpus {near}), or a run with a multiple of {world_size} prompts"
            )


def divisors(number: int) -> list[int]:
    """Ascending."""
    small = [one for one in range(1, math.isqrt(number) + 1) if number % one == 0]
    return sorted({*small, *(number // one for one in small)})
