"""What a job is: recipe and DeepSpeed file, resolved and checked against each other before a weight is in memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from prdp_fast import cost, memory, zero
from prdp_fast.errors import UserError
from prdp_fast.models.pipeline import load_scheduler
from prdp_fast.models.shapes import Shapes
from prdp_fast.objectives import build_objective
from prdp_fast.prompts.embeddings import has_embeddings
from prdp_fast.prompts.stream import PromptSet, PromptStream
from prdp_fast.records import Prompt
from prdp_fast.rewards import WeightedRewards, build_rewards
from prdp_fast.sampling.policy import Policy
from prdp_fast.sampling.transitions import Transitions
from prdp_fast.settings import Settings
from prdp_kernels import dispatch


@dataclass(frozen=True)
class Job:
    """Everything that can be checked without a weight in memory."""

    settings: Settings
    config: zero.ZeroConfig
    world_size: int
    transitions: Transitions
    train_prompts: PromptSet
    evaluation_prompts: dict[str, list[Prompt]]  # "seen", "unseen"
    rewards: WeightedRewards

    @classmethod
    def prepare(cls, settings: Settings, config_name: str, *, world_size: int, cuda: bool) -> Job:
        """Resolve and check the whole job. Raises: UserError, before anything is loaded."""
        settings.check_ranks(world_size)
        check_kernels(settings.kernels, cuda)
        evaluation, prompts = settings.evaluation, settings.prompts
        if 0 < evaluation.prompts < world_size:
            raise UserError(f"evaluation.prompts is {evaluation.prompts}, fewer than the {world_size} ranks; raise it or set 0")
        rewards = build_rewards(settings.rewards)
        scheduler = load_scheduler(settings.model.pretrained, settings.sampler.scheduler)
        if settings.model.lora is not None:
            Shapes.load(settings.model.pretrained, settings.model.lora).meta_unet()  # refuses an adapter that does not fit
        transitions = Transitions.from_scheduler(scheduler, settings.sampler.num_inference_steps, settings.sampler.eta)
        config = zero.resolve_config(
            config_name, settings, world_size=world_size, stochastic_steps=len(transitions.stochastic), cuda=cuda
        )
        if settings.model.ema_decay is not None and config.stage == 3:
            raise UserError(
                f"model.ema_decay with config {config.path.name}: at ZeRO stage 3 no average is kept; use stage 0, 1 or 2, or "
                "set ema_decay null"
            )
        check_steps(settings, transitions)
        train = PromptSet.open(prompts.source, prompts.train, limit=prompts.limit)
        if prompts.stored_embeddings and not has_embeddings(train.directory):
            raise UserError(
                f"prompts.stored_embeddings is set, but {train.directory} has none; run 'prdp embed {train.directory} --model "
                f"{settings.model.pretrained}', or set it false"
            )
        PromptStream(train, seed=settings.seed, prompts_per_epoch=settings.schedule.prompts_per_epoch, world_size=world_size)
        held = {}
        if evaluation.prompts:
            # With a limited training set, "seen" means the prompts that are trained on.
            seen = train if prompts.limit else PromptSet.open(prompts.source, prompts.seen)
            unseen = PromptSet.open(prompts.source, prompts.unseen)
            for name, prompt_set in (("seen", seen), ("unseen", unseen)):
                held[name] = prompt_set.draw(min(evaluation.prompts, len(prompt_set)), seed=evaluation.seed)
        return cls(settings, config, world_size, transitions, train, held, rewards)

    def record(self) -> dict[str, Any]:
        """What identifies the job in its run directory."""
        return {
            "recipe": self.settings.model_dump(mode="json"),
            "prompts": self.train_prompts.fingerprint,  # a directory may have been rebuilt under the same name
            "deepspeed": self.config.values,
            "world_size": self.world_size,
        }

    def forwards_per_epoch(self) -> dict[str, int]:
        """U-Net rows of one epoch over all ranks, on the fast path (DESIGN: rollout 2T, reference 2T, update K 2T)."""
        return {name: round(phase.forward) for name, phase in self.epoch_rows().items()}

    def epoch_rows(self) -> dict[str, cost.PhaseRows]:
        policy = build_policy(self.settings, self.transitions)
        return cost.epoch_rows(self.settings.schedule, policy, needs_reference=self.needs_reference)

    @property
    def needs_reference(self) -> bool:
        return build_objective(self.settings.objective).needs_reference

    def dry_run(self, device_name: str | None) -> list[str]:
        """What an epoch costs and a rank holds, line by line, from configurations alone. Nothing is loaded.

        Args: device_name: of the GPU, whose peak may be known; None on a CPU.
        """
        settings, schedule, cuda = self.settings, self.settings.schedule, device_name is not None
        recompute = settings.performance.activation_checkpointing
        shapes = Shapes.load(settings.model.pretrained, settings.model.lora)
        tf32 = settings.performance.tf32 == "on"  # auto leaves it off in a float32 job
        peak = cost.device_peak(device_name, self.config.dtype, tf32=tf32) if device_name else None
        lines = cost.describe(
            self.epoch_rows(), cost.unet_flop(shapes), recompute=recompute, peak=peak, gpus=self.world_size,
            backward=cost.backward_per_forward(shapes),
        )  # fmt: skip
        if shapes.lora is not None:
            trained, whole = shapes.trained_parameters, shapes.unet_parameters
            lines.insert(0, f"LoRA of rank {shapes.lora.rank}: {trained} weights are trained, {whole - trained} stay as they are")
        job = self.footprint(shapes, cuda=cuda)
        job = replace(job, activations=memory.fake_activations(shapes, self.config.dtype, checkpointing=recompute))
        available = memory.free_bytes(torch.device("cuda" if cuda else "cpu"), zero.launched_local_ranks())
        size, about = schedule.micro_batch, ""
        if size == "auto":
            most = self.rows_per_update if cuda else min(self.rows_per_update, memory.CPU_MICRO_BATCH)
            try:
                size, about = memory.choose_micro_batch(job, available, most=most), "auto, about "
            except UserError:  # the machine at hand need not be the one that will train
                size, about = 1, "auto, here not even "
        plan = memory.plan_memory(replace(job, micro_batch=size))
        each = " (2 U-Net rows each with guidance)" if job.evaluations == 2 else ""
        lines.append(
            f"one update of a rank: {self.rows_per_update} rows (trajectory, timestep){each}, "
            f"micro-batch {about}{size}: {-(-self.rows_per_update // size)} backward passes"
        )
        verdict = "fits" if plan.fits(available) else "may not fit"
        return [*lines, plan.table(), f"  {verdict}: {memory.human(available)} free on this machine's {'GPU' if cuda else 'CPU'}"]

    def footprint(self, shapes: Shapes, *, cuda: bool, micro_batch: int = 1) -> memory.Footprint:
        """What the job holds; activations are still to be measured."""
        return memory.Footprint.of(
            self.settings, self.config, shapes, memory.Activations(0), micro_batch, world_size=self.world_size,
            needs_reference=self.needs_reference, cuda=cuda,
        )  # fmt: skip

    @property
    def rows_per_update(self) -> int:
        """Of one rank: more in a micro-batch there never are."""
        schedule, stochastic = self.settings.schedule, len(self.transitions.stochastic)
        images = schedule.prompts_per_epoch * schedule.images_per_prompt // self.world_size
        return images * min(schedule.update_timesteps or stochastic, stochastic)


def build_policy(settings: Settings, transitions: Transitions) -> Policy:
    sampler = settings.sampler
    return Policy(transitions, sampler.guidance_scale, settings.kernels, sampler.guidance_interval)


def check_kernels(kernels: str, cuda: bool) -> None:
    """Raises: UserError if the recipe insists on kernels that cannot run here."""
    if kernels == "triton" and not (dispatch.HAS_TRITON and (cuda or dispatch.interpreted())):
        raise UserError(
            f"kernels is 'triton', but {'there is no CUDA device' if dispatch.HAS_TRITON else 'triton is not installed'}; "
            "set kernels to 'auto', or TRITON_INTERPRET=1 in the environment to run them, slowly, on a CPU"
        )


def check_steps(settings: Settings, transitions: Transitions) -> None:
    """Raises: UserError where the recipe speaks of steps that the schedule does not have."""
    count = len(transitions.stochastic)
    for name in ("update_timesteps", "reference_timesteps"):
        wanted = getattr(settings.schedule, name)
        if wanted is not None and wanted > count:
            raise UserError(
                f"schedule.{name} is {wanted}, more than the {count} stochastic steps of the sampler; lower it or remove it"
            )
    policy = build_policy(settings, transitions)
    if settings.sampler.guidance_interval is not None and not policy.guided.any():
        raise UserError(
            f"sampler.guidance_interval {list(settings.sampler.guidance_interval)} holds none of the sampler's timesteps "
            f"{transitions.timesteps.tolist()}; widen it, or set guidance_scale null to sample without guidance"
        )
