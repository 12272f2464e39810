"""The objectives of a recipe and their settings: one section each, chosen by `objective.name`."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from prdp_fast.config.section import LARGEST, Section

Clip = Annotated[float, Field(gt=0, le=LARGEST)]
Weight = Annotated[float, Field(ge=0, le=LARGEST)]


class PrdpSettings(Section):
    name: Literal["prdp"] = "prdp"
    kl_weight: float = Field(3e-5, gt=0, description="beta")
    clip_range: Clip | None = Field(1e-4, description="epsilon, on the log-ratio of one step; null: the loss without clipping")
    step_weights: Literal["uniform", "inverse_kappa"] = Field(
        "uniform",
        description="of a trajectory's steps in the mean over them: all alike, or by the inverse of kappa, with which the "
        "model's output counts in a step's log-prob; clip_range is then of the weighted log-ratio",
    )
    pairs: Literal["all", "best_worst", "random"] = Field(
        "all",
        description="of a prompt's images: every pair, the best with the worst, or each image with one other, drawn each epoch",
    )
    reference: Literal["base", "last_epoch", "moving_average"] = Field(
        "base",
        description="what log-ratios are taken to: the model that training began with, the policy at the start of the epoch, or "
        "the moving average of model.ema_decay",
    )
    trajectories: Literal["policy", "reference"] = Field(
        "policy", description="who samples: the policy (online), or the frozen reference (offline)"
    )

    @model_validator(mode="after")
    def _check(self) -> PrdpSettings:
        if self.trajectories == "reference" and self.reference != "base":
            raise ValueError(f"trajectories 'reference' with reference {self.reference!r}; expected reference 'base'")
        return self


class DdpoSettings(Section):
    name: Literal["ddpo"]
    clip_range: Clip = Field(1e-4, description="PPO clip of one step's importance ratio")
    normalization: Literal["per_prompt", "global", "running"] = Field(
        "per_prompt",
        description="over what rewards become advantages: the prompt's images, all of the epoch, or what the run has seen of the "
        "prompt",
    )
    advantage_clip: Clip = 5.0
    running_buffer: int = Field(16, ge=2, description="running: the newest rewards of a prompt that count")
    running_min_count: int = Field(16, ge=2, description="running: with fewer of them, those of the whole epoch count instead")

    @model_validator(mode="after")
    def _check(self) -> DdpoSettings:
        if self.running_min_count > self.running_buffer:
            raise ValueError(
                f"running_min_count {self.running_min_count} is above running_buffer {self.running_buffer}, which is never "
                "reached; lower the first, or raise the second"
            )
        return self


class DpokSettings(Section):
    name: Literal["dpok"]
    reward_weight: float = Field(10.0, gt=0, le=LARGEST, description="alpha")
    kl_weight: Weight = Field(0.01, description="beta, of the KL divergence of each step from the reference")
    clip_range: Clip = Field(1e-4, description="PPO clip of one step's importance ratio")


class GrpoSettings(Section):
    name: Literal["grpo"]
    clip_range: Clip = Field(1e-4, description="PPO clip of one step's importance ratio")
    kl_weight: Weight = Field(0.04, description="of the KL divergence of each step from the reference; 0 needs no reference")
    advantage_clip: Clip = 5.0


class RwrSettings(Section):
    name: Literal["rwr"]
    temperature: float = Field(1.0, gt=0, description="of the softmax over the rewards of a prompt's images")


class RebelSettings(Section):
    name: Literal["rebel"]
    eta: float = Field(1.0, gt=0, le=LARGEST, description="of log-ratios summed over steps and elements: the step size")


ObjectiveSettings = Annotated[
    PrdpSettings | DdpoSettings | DpokSettings | GrpoSettings | RwrSettings | RebelSettings, Field(discriminator="name")
]
OBJECTIVES: dict[str, type[Section]] = {
    section.model_fields["name"].annotation.__args__[0]: section for section in get_args(get_args(ObjectiveSettings)[0])
}
