"""A pipeline small enough for float64 and for dozens of training runs, made from the true classes."""

from __future__ import annotations

import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DConditionModel

from prdp_fast.core.records import Prompt, TextEmbeddings, Trajectories
from prdp_fast.models.families import Family, StableDiffusion
from prdp_fast.sampling.policy import Policy
from prdp_fast.sampling.rollout import rollout
from prdp_fast.sampling.transitions import Transitions, Window

SHAPE = (4, 4, 4)
WIDTH = 16


def small_unet(seed: int = 0, dtype: torch.dtype = torch.float32) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    denoiser = UNet2DConditionModel(
        sample_size=SHAPE[1],
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    return denoiser.to(dtype).eval()


def small_family() -> Family:
    return StableDiffusion(dict(small_unet().config), text_length=6)


def small_policy(
    steps: int = 5,
    guidance_scale: float | None = 3.0,
    interval: tuple[int, int] | None = None,
    window: Window | None = None,
) -> Policy:
    """With a window of noisy steps it is DDIM's, else DDPM's."""
    scheduler = (DDPMScheduler if window is None else DDIMScheduler)(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="v_prediction", clip_sample=False,
        timestep_spacing="trailing",
    )  # fmt: skip
    table = Transitions.from_scheduler(scheduler, steps, window=window)
    return Policy(table, guidance_scale, small_family().predict, guidance_interval=interval)


def small_embeddings(groups: int, dtype: torch.dtype = torch.float32) -> TextEmbeddings:
    generator = torch.Generator().manual_seed(7)
    return TextEmbeddings(
        torch.randn(groups, 6, WIDTH, generator=generator, dtype=torch.float64).to(dtype),
        torch.randn(1, 6, WIDTH, generator=generator, dtype=torch.float64).to(dtype),
    )


def small_trajectories(
    policy: Policy,
    denoiser: torch.nn.Module,
    *,
    groups: int = 2,
    images: int = 3,
    batch: int = 64,
    dtype: torch.dtype = torch.float32,
) -> Trajectories:
    prompts = [Prompt(index=10 + g, text=f"prompt {g}", metadata={}) for g in range(groups)]
    trajectories = rollout(
        policy, denoiser, prompts, small_embeddings(groups, torch.float32), images_per_prompt=images, latent_shape=SHAPE,
        batch=batch, seed=3, epoch=0,
    )  # fmt: skip
    trajectories.latents = trajectories.latents.to(dtype)
    trajectories.embeddings = small_embeddings(groups, dtype)
    return trajectories
