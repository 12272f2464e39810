"""One epoch of a job in this process, phase by phase, with the parts that `Trainer.build` made.

`tiny` is the embedded model with everything around it. sd14, sd21 and sdxl have the published configurations, random weights and
random text embeddings: nothing is downloaded. They have no decoder, so their epochs have made-up rewards.
"""

from __future__ import annotations

import contextlib
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import torch
from torch import nn

from benchmarks.epoch.random_model import RandomPipeline
from benchmarks.lib.published import PRESETS, write_configurations
from prdp_fast.acceleration import process
from prdp_fast.acceleration.attention import set_attention
from prdp_fast.acceleration.probe import Decision
from prdp_fast.config.load import load_recipe
from prdp_fast.config.recipe import Settings
from prdp_fast.core import distributed
from prdp_fast.core.records import Prompt, Scores, TextEmbeddings, Trajectories
from prdp_fast.models.lora import add_adapter
from prdp_fast.models.pipeline import Pipeline
from prdp_fast.planning.job import Job
from prdp_fast.sampling.policy import Policy, build_policy, build_transitions
from prdp_fast.training.passes import Reference
from prdp_fast.training.trainer import Trainer
from prdp_fast.training.update import Experience, UpdateReport

TINY = "tiny"
NAMES = (TINY, *PRESETS)
# Everything under `performance` off, and PyTorch's own attention.
EAGER = (
    "performance={attention: sdpa, compile: 'off', cuda_graphs: 'off', channels_last: 'off', fuse_qkv: 'off', "
    "shared_halves: 'off', tf32: 'off', fused_optimizer: 'off', coalesce_gradients: 'off', background_rewards: 'off'}"
)


@dataclass
class Workload:
    """This rank's part of one epoch. Its methods are the trainer's own, with its own objects."""

    preset: str
    trainer: Trainer
    prompts: list[Prompt]
    embeddings: TextEmbeddings  # one row per prompt
    bare_denoiser: nn.Module  # outside DeepSpeed: the reference, or a copy (with the adapter) where the job has none

    @classmethod
    def build(cls, preset: str, overrides: list[str], *, config: str = "zero2.json", keep_heap: bool = True) -> Workload:
        """Every rank of a job calls it.

        Args:
            preset: one of NAMES.
            overrides: as for --set, on the recipe `tiny`.
            config: DeepSpeed JSON.
            keep_heap: False leaves the C library's allocator as Python starts it, where training sets it to keep freed memory.
        Raises: UserError.
        """
        device = distributed.init()
        with contextlib.ExitStack() as stack:
            # A long job: with `auto`, what is faster is taken if it saves more in the rest of the job than it costs.
            chosen = ["schedule.time_limit_minutes=null", "schedule.epochs=1000000", *overrides]
            if preset != TINY:
                directory = stack.enter_context(tempfile.TemporaryDirectory())
                write_configurations(preset, Path(directory))
                chosen.append(f"model.pretrained={directory}")
            if not keep_heap:
                left_alone = Decision("default", "left as Python starts it")
                stack.enter_context(mock.patch.object(process, "keep_heap", return_value=left_alone))
            settings = load_recipe("tiny", chosen)
            job = Job.prepare(settings, config, world_size=distributed.world_size(), cuda=device.type == "cuda")

            def load() -> Pipeline:
                pipeline_class = Pipeline if preset == TINY else RandomPipeline
                return pipeline_class.load(job.family, device, job.config.dtype, settings.sampler.scheduler)

            trainer = Trainer.build(job, device, None, pipeline=None if preset == TINY else load())
            trainer.state.last_drift = 0.0  # as after a first epoch: the update needs no log-prob pass to measure it
            bare = trainer.reference if trainer.reference is not None else copy_like_trained(load().denoiser, trainer)
        prompts = trainer.stream.epoch(0)
        return cls(preset, trainer, prompts, trainer.encode(prompts), bare)

    def resized(self, *, prompts: int | None = None, images_per_prompt: int | None = None, steps: int | None = None) -> Workload:
        """The same job at another size. Engine, models and rewards are shared with this one.

        Args:
            prompts: the first so many of this workload's.
            images_per_prompt: B.
            steps: T.
        Raises: ValueError if it has fewer prompts.
        """
        if prompts is not None and prompts > len(self.prompts):
            raise ValueError(f"resized: prompts is {prompts}, expected at most {len(self.prompts)}; build a larger workload")
        job, settings, policy = self.trainer.job, self.settings, self.policy
        kept = self.prompts[:prompts]
        schedule = settings.schedule.model_copy(
            update={
                "prompts_per_epoch": len(kept) * job.world_size,
                "images_per_prompt": images_per_prompt or settings.schedule.images_per_prompt,
            }
        )
        sampler = settings.sampler
        if steps is not None and steps != len(policy.transitions):
            sampler = sampler.model_copy(update={"num_inference_steps": steps})
            transitions = build_transitions(job.family, sampler, self.trainer.pipeline.scheduler)
            policy = build_policy(sampler, transitions, policy.predict, settings.kernels)
        settings = settings.model_copy(update={"schedule": schedule, "sampler": sampler})
        trainer = replace(self.trainer, job=replace(job, settings=settings, policy=policy))
        return replace(self, trainer=trainer, prompts=kept, embeddings=self.embeddings.rows(slice(prompts)))

    @property
    def settings(self) -> Settings:
        return self.trainer.job.settings

    @property
    def policy(self) -> Policy:
        return self.trainer.job.policy

    @property
    def device(self) -> torch.device:
        return self.trainer.engine.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the denoiser's matrix products."""
        return self.trainer.job.config.dtype

    @property
    def images_per_prompt(self) -> int:
        return self.settings.schedule.images_per_prompt

    @property
    def images(self) -> int:
        return len(self.prompts) * self.images_per_prompt

    @property
    def has_pictures(self) -> bool:
        return self.trainer.pipeline.vae is not None

    @property
    def needs_reference(self) -> bool:
        return self.trainer.objective.needs_reference

    # The phases of an epoch.

    def encode(self) -> TextEmbeddings:
        return self.trainer.encode(self.prompts)

    def rollout(self) -> Trajectories:
        return self.trainer.sample(self.prompts, self.embeddings)

    def decode(self, trajectories: Trajectories) -> torch.Tensor:
        return self.trainer.pipeline.decode(trajectories.latents[:, -1])

    def score(self, images: torch.Tensor) -> Scores:
        rows = [prompt for prompt in self.prompts for _ in range(self.images_per_prompt)]
        return self.trainer.job.rewards.score(images, [row.text for row in rows], [row.metadata for row in rows])

    def reference(self, trajectories: Trajectories) -> Reference:
        return self.trainer.reference_log_probs(trajectories)

    def update(self, trajectories: Trajectories, scores: Scores, reference: Reference | None) -> UpdateReport:
        return self.trainer.update(Experience(trajectories, scores, reference))

    def epoch(self) -> None:
        """All of them, as the training loop runs them after its first epoch."""
        self.embeddings = self.encode()
        trajectories = self.rollout()
        scores = self.score(self.decode(trajectories)) if self.has_pictures else self.made_up_scores()
        reference = self.reference(trajectories) if self.needs_reference else None
        self.update(trajectories, scores, reference)

    def made_up_scores(self, rewards: torch.Tensor | None = None) -> Scores:
        """Scores that no image was looked at for. rewards: (N,) float32; None: uniform, the same at every call."""
        if rewards is None:
            rewards = torch.rand(self.images, generator=torch.Generator().manual_seed(0))
        return Scores(rewards, {reward.name: rewards for reward in self.trainer.job.rewards.rewards}, {})


def copy_like_trained(denoiser: nn.Module, trainer: Trainer) -> nn.Module:
    """A frozen denoiser, made what the trained one is: dtype, adapter and attention kernel."""
    settings = trainer.job.settings
    denoiser.to(trainer.job.config.dtype).requires_grad_(False).eval()
    if settings.model.lora is not None:
        add_adapter(denoiser, settings.model.lora, settings.seed)
    set_attention(denoiser, trainer.acceleration.decisions["attention"].value)
    return denoiser
