"""Noise schedules: the scheduler that a model is sampled with, of betas or, for flow matching, of sigmas."""

from __future__ import annotations

from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin

from prdp_fast.core.errors import UserError
from prdp_fast.models.configs import FlowSchedulerConfig, SchedulerConfig, check_arguments, read_config

SCHEDULERS: dict[str, type[SchedulerMixin]] = {"DDPMScheduler": DDPMScheduler, "DDIMScheduler": DDIMScheduler}


def load_beta_scheduler(pretrained: str, wanted: str | None = None) -> SchedulerMixin:
    """A pipeline's scheduler alone: kilobytes of JSON, so that settings can be checked before weights are touched.

    Args:
        wanted: a key of SCHEDULERS, to sample with on the same noise schedule; None: the pipeline's own. One without a density
            (SD v1.4's PNDM, SDXL's Euler) becomes a DDIMScheduler, which with eta 1 takes the steps of DDPM, but for the last.
    Raises: UserError if the model was not trained on a schedule of betas.
    """
    file = "scheduler/scheduler_config.json"
    keys, config = read_config(pretrained, file, SchedulerConfig)
    name = keys.name
    scheduler_class = SCHEDULERS[wanted] if wanted else SCHEDULERS.get(name, DDIMScheduler)
    if name not in SCHEDULERS:
        if not {"beta_start", "beta_end", "beta_schedule"} <= config.keys() and not config.get("trained_betas"):
            raise UserError(
                f"model.pretrained {pretrained!r} samples with {name or 'an unnamed scheduler'}, which has no betas (flow "
                "matching or EDM); expected a model trained on a DDPM noise schedule, as SD 1, SD 2 and SDXL are"
            )
        # Samplers without these settings neither clip nor threshold; the default of those that have them would.
        config = {"clip_sample": False, "thresholding": False} | config
    check_arguments(pretrained, file, config, scheduler_class)
    if keys.trained_betas is not None and len(keys.trained_betas) != keys.num_train_timesteps:
        raise UserError(
            f"model.pretrained {pretrained!r}: {file} has {len(keys.trained_betas)} trained_betas and num_train_timesteps "
            f"{keys.num_train_timesteps}; expected a beta for each; correct it there"
        )
    try:
        scheduler_class.from_config(config).set_timesteps(1)  # some settings are looked at no earlier
        return scheduler_class.from_config(config)
    except Exception as error:  # diffusers and torch raise all kinds, by the value that is wrong
        raise UserError(
            f"model.pretrained {pretrained!r}: {scheduler_class.__name__} refuses scheduler_config.json ({error}); "
            "correct it there"
        ) from None


def load_flow_scheduler(pretrained: str, wanted: str | None = None) -> FlowMatchEulerDiscreteScheduler:
    """The scheduler of a flow-matching pipeline alone.

    Args: wanted: a class that the recipe asks for; there is no choice.
    Raises: UserError if the model's own is another class, or refuses its configuration.
    """
    file, only = "scheduler/scheduler_config.json", FlowMatchEulerDiscreteScheduler.__name__
    if wanted is not None:
        raise UserError(
            f"sampler.scheduler is {wanted}, but model.pretrained {pretrained!r} is a flow-matching model, which has sigmas and "
            f"no betas; set it null, and choose the noise of its {only} by sampler.method and sampler.noise_level"
        )
    keys, config = read_config(pretrained, file, FlowSchedulerConfig)
    if keys.name != only:
        raise UserError(
            f"model.pretrained {pretrained!r} is a flow-matching model, but its {file} is of {keys.name or 'no scheduler'}; "
            f"expected {only}, whose sigmas it was trained with: fetch the file again"
        )
    check_arguments(pretrained, file, config, FlowMatchEulerDiscreteScheduler)
    try:
        return FlowMatchEulerDiscreteScheduler.from_config(config)
    except Exception as error:  # diffusers raises all kinds, by the value that is wrong
        raise UserError(
            f"model.pretrained {pretrained!r}: {only} refuses scheduler_config.json ({error}); correct it there"
        ) from None
