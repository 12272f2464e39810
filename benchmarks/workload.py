"""A job's parts in this process, at the shapes of a preset, and the bare U-Net calls that its phases contain.

One rank, no launcher: `python benchmarks/profile_step.py` and the bench files build one and time its phases. `tiny` is the
embedded model with everything around it; sd14, sd21 and sdxl are U-Nets of the true configurations with random weights and random
text embeddings, so nothing is downloaded, and have no decoder, reward or text.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import nn

from prdp_fast.acceleration.choose import Acceleration
from prdp_fast.acceleration.process import choose_fused_optimizer, prepare_process
from prdp_fast.config.load import load_recipe
from prdp_fast.core import distributed
from prdp_fast.core.records import Prompt, TextEmbeddings, Trajectories
from prdp_fast.models.families import Family, StableDiffusion, read_family
from prdp_fast.models.pipeline import Pipeline
from prdp_fast.models.text import TextEncoder
from prdp_fast.objectives import build_objective
from prdp_fast.planning.job import Job
from prdp_fast.prompts.stream import PromptStream
from prdp_fast.sampling.policy import Policy, build_policy, conditioning
from prdp_fast.sampling.rollout import rollout
from prdp_fast.sampling.transitions import Transitions
from prdp_fast.training import trainer as runner
from prdp_fast.training.engine import ZeroEngine
from prdp_fast.training.passes import Reference, reference_pass
from prdp_fast.training.update import UpdateReport, run_updates

Call = Callable[[], object]

# The configurations as published with the weights (unet/config.json of the repositories), as far as they differ from diffusers'
# defaults, which are Stable Diffusion 1's.
UNETS: dict[str, dict[str, Any]] = {
    "sd14": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    "sd21": {
        "sample_size": 96,
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    },
    "sdxl": {
        "sample_size": 128,
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
PARAMETERS = {"tiny": 2_448_100, "sd14": 859_520_964, "sd21": 865_910_724, "sdxl": 2_567_463_684}
PREDICTION = {"sd14": "epsilon", "sd21": "v_prediction", "sdxl": "epsilon"}
TOKENS = 77


def random_denoiser(preset: str) -> nn.Module:
    """The U-Net of a preset with random weights, on the current default device."""
    return UNet2DConditionModel(**UNETS[preset])


def random_embeddings(shapes: Family, prompts: int, device: torch.device, dtype: torch.dtype) -> TextEmbeddings:
    """What the U-Net is told of so many prompts and of the empty one; SDXL also of one square picture's size."""
    told = shapes.denoiser_inputs(prompts + 1, device, dtype)
    embeds = torch.randn_like(told["encoder_hidden_states"])
    if "added_cond_kwargs" not in told:
        return TextEmbeddings(embeds[1:], embeds[:1])
    pooled = torch.randn_like(told["added_cond_kwargs"]["text_embeds"])
    side = 8 * shapes.latent_shape[-1]
    time_ids = torch.tensor([[side, side, 0, 0, side, side]], device=device, dtype=dtype)
    return TextEmbeddings(embeds[1:], embeds[:1], pooled[1:], pooled[:1], time_ids)


def _even(rows: int, most: int) -> tuple[int, int]:
    """(calls, rows a call): as the engine cuts them."""
    calls = -(-rows // most)
    return calls, -(-rows // calls)


@dataclass
class Workload:
    """One epoch, phase by phase. Every method but `bare_*` is the engine's own code."""

    preset: str
    policy: Policy
    engine: ZeroEngine
    reference_denoiser: nn.Module
    objective: Any
    embeddings: TextEmbeddings
    prompts: list[Prompt]
    images_per_prompt: int
    latent_shape: tuple[int, int, int]
    rollout_batch: int
    micro_batch: int
    settings: Any
    speed: Acceleration
    pipeline: Pipeline | None = None
    text: TextEncoder | None = None
    rewards: Any = None
    stream: PromptStream | None = None

    @classmethod
    def build(
        cls, preset: str, overrides: list[str], *, config: str = "zero2.json", epoch: int = 0, prepare: bool = True
    ) -> Workload:
        """Args:
        overrides: as for --set, on the recipe `tiny`.
        prepare: set what the engine sets for its whole process (memory that stays, TF32).
        """
        settings = load_recipe("tiny", ["schedule.time_limit_minutes=null", *overrides])
        device = distributed.init()
        job = Job.prepare(settings, config, world_size=1, cuda=device.type == "cuda")
        schedule, dtype = settings.schedule, job.config.dtype
        pipeline = text = stream = None
        torch.manual_seed(0)
        if preset == "tiny":
            pipeline = Pipeline.load("tiny", device, dtype, settings.sampler.scheduler)
            text = TextEncoder(pipeline, dtype)
            denoiser: nn.Module = pipeline.denoiser
            transitions, latent_shape, shapes = job.transitions, pipeline.latent_shape, read_family("tiny")
            stream = PromptStream(
                job.train_prompts, seed=0, prompts_per_epoch=schedule.prompts_per_epoch, rank=0, world_size=1
            )  # fmt: skip
            prompts = stream.epoch(epoch)
            embeddings = text.encode(prompts)
        else:
            with device:
                denoiser = random_denoiser(preset)
            scheduler = DDIMScheduler(
                beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, set_alpha_to_one=False,
                steps_offset=1, prediction_type=PREDICTION[preset],
            )  # fmt: skip
            transitions = Transitions.from_scheduler(scheduler, settings.sampler.num_inference_steps)
            shapes = StableDiffusion(dict(denoiser.config), TOKENS)
            latent_shape = shapes.latent_shape
            prompts = [Prompt(i, f"prompt {i}", {}) for i in range(schedule.prompts_per_epoch)]
            embeddings = random_embeddings(shapes, len(prompts), device, dtype)
        policy = build_policy(settings, transitions)
        reference = copy.deepcopy(denoiser).to(dtype).requires_grad_(False).eval()
        performance = settings.performance
        process = prepare_process(performance, device, dtype) if prepare else {}
        fused = choose_fused_optimizer(performance.fused_optimizer, device, job.config.offloads_optimizer)
        engine = ZeroEngine(
            denoiser, settings.optimizer, job.config, device, performance.coalesce_gradients, fused.value == "on"
        )  # fmt: skip
        micro_batch = schedule.micro_batch if isinstance(schedule.micro_batch, int) else job.rows_per_update
        speed = runner.speed_up(job, engine, reference, shapes, micro_batch, device)
        speed.decisions |= process | {"fused_optimizer": fused}
        return cls(
            preset, policy, engine, reference, build_objective(settings.objective, settings.kernels), embeddings, prompts,
            schedule.images_per_prompt, latent_shape, settings.sampler.rollout_batch, micro_batch, settings, speed,
            pipeline, text, job.rewards if preset == "tiny" else None, stream,
        )  # fmt: skip

    @property
    def images(self) -> int:
        return len(self.prompts) * self.images_per_prompt

    # The engine's phases.

    def rollout(self) -> Trajectories:
        with self.engine.sampling_denoiser() as denoiser:
            return rollout(
                self.policy, denoiser, self.prompts, self.embeddings, images_per_prompt=self.images_per_prompt,
                latent_shape=self.latent_shape, batch=self.rollout_batch, seed=0, epoch=0,
            )  # fmt: skip

    def reference(self, trajectories: Trajectories) -> Reference:
        timesteps = self.settings.schedule.reference_timesteps
        return reference_pass(self.policy, self.reference_denoiser, trajectories, self.micro_batch, timesteps)

    def update(self, trajectories: Trajectories, rewards: torch.Tensor, reference: Reference | None) -> UpdateReport:
        return run_updates(
            self.policy, self.engine, self.objective, trajectories, rewards, reference=reference, updates=1,
            micro_batch=self.micro_batch, last_drift=0.0, reduce=distributed.all_reduce,
            timesteps=self.settings.schedule.update_timesteps,
        )  # fmt: skip

    def decode(self, trajectories: Trajectories) -> torch.Tensor:
        assert self.pipeline is not None
        return self.pipeline.decode(trajectories.latents[:, -1])

    def score(self, images: torch.Tensor) -> torch.Tensor:
        rows = [prompt for prompt in self.prompts for _ in range(self.images_per_prompt)]
        return self.rewards.score(images, [row.text for row in rows], [row.metadata for row in rows]).total

    def epoch(self) -> None:
        """Everything an epoch of the training loop does between two prompts batches."""
        if self.text is not None:
            self.embeddings = self.text.encode(self.prompts)
        trajectories = self.rollout()
        rewards = self.score(self.decode(trajectories)) if self.pipeline else torch.rand(self.images)
        reference = self.reference(trajectories) if self.objective.needs_reference else None
        self.update(trajectories, rewards, reference)

    # The bare U-Net calls of the same phases: same rows, same mode, inputs made beforehand.

    def _rows(self, rows: int) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        embeds = self.embeddings.prompt_embeds
        x = torch.randn(rows, *self.latent_shape, device=embeds.device, dtype=embeds.dtype)
        told = self.embeddings.rows(torch.arange(rows, device=embeds.device) % len(embeds))
        return x, torch.full((rows,), 500, device=embeds.device), conditioning(told, guided=False)

    def bare_forward(self, denoiser: nn.Module, latents: int, guided: bool, batch: int, repeat: int = 1) -> Call:
        """This many latents in calls of at most `batch`, `repeat` times, without gradients."""
        calls, even = _even(latents, batch)
        x, t, told = self._rows(even * (2 if guided else 1))

        @torch.no_grad()
        def run() -> None:
            for _ in range(calls * repeat):
                denoiser(x, t, **told, return_dict=False)

        return run

    def bare_forward_backward(self, denoiser: nn.Module, latents: int, guided: bool) -> Call:
        """The same with a given gradient at the output, on a module whose weights have gradients."""
        calls, even = _even(latents, self.micro_batch)
        x, t, told = self._rows(even * (2 if guided else 1))
        grad = torch.randn_like(x)

        def run() -> None:
            for _ in range(calls):
                denoiser(x, t, **told, return_dict=False)[0].backward(grad)
            denoiser.zero_grad(set_to_none=True)

        return run
