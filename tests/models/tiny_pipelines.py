"""A pipeline of each family that the engine trains: the true classes and layouts, random weights, 32-pixel images.

What the families differ in is here at its true value: prediction type, scheduler class, activation, linear projections, heads per
block, transformer layers per block, padding token, scaling factor. Widths and depths are not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from prdp_fast.world import TINY

FAMILIES = ("sd1", "sd2", "sdxl")
SAMPLE_SIZE = 8
TOKENIZER = TINY / "tokenizer"
PAD = "<|startoftext|>"  # stands for the "!" that SD 2 and SDXL's second tokenizer pad with: not the end of text


def _tokenizer(**settings: Any) -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(TOKENIZER, **settings)


def _text_config(width: int, hidden_act: str, layers: int = 2) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=150, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=2,
        max_position_embeddings=20, hidden_act=hidden_act, projection_dim=width, bos_token_id=0, eos_token_id=1, pad_token_id=1,
        initializer_range=0.2,
    )  # fmt: skip


def _vae(scaling_factor: float) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(4, 8, 8), down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=4 * SAMPLE_SIZE, scaling_factor=scaling_factor,
        force_upcast=True,
    )  # fmt: skip


def _sd_unet(**settings: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=SAMPLE_SIZE, block_out_channels=(8, 16, 16, 16), layers_per_block=1, norm_num_groups=4, **settings
    )  # fmt: skip  # the block types are SD's own by default


def _schedule(**settings: Any) -> dict[str, Any]:
    return {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1} | settings


def _sd1() -> DiffusionPipeline:
    return StableDiffusionPipeline(
        vae=_vae(0.18215),
        text_encoder=CLIPTextModel(_text_config(16, "quick_gelu")),
        tokenizer=_tokenizer(),
        unet=_sd_unet(cross_attention_dim=16, attention_head_dim=2),
        scheduler=PNDMScheduler(**_schedule(skip_prk_steps=True, set_alpha_to_one=False)),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def _sd2() -> DiffusionPipeline:
    return StableDiffusionPipeline(
        vae=_vae(0.18215),
        text_encoder=CLIPTextModel(_text_config(16, "gelu")),
        tokenizer=_tokenizer(pad_token=PAD),
        unet=_sd_unet(cross_attention_dim=16, attention_head_dim=[1, 2, 4, 4], use_linear_projection=True, upcast_attention=True),
        scheduler=DDIMScheduler(**_schedule(prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False)),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def _sdxl() -> DiffusionPipeline:
    pooled, time_width = 24, 8
    return StableDiffusionXLPipeline(
        vae=_vae(0.13025),
        text_encoder=CLIPTextModel(_text_config(16, "quick_gelu")),
        text_encoder_2=CLIPTextModelWithProjection(_text_config(pooled, "gelu", layers=3)),
        tokenizer=_tokenizer(),
        tokenizer_2=_tokenizer(pad_token=PAD),
        unet=UNet2DConditionModel(
            sample_size=SAMPLE_SIZE, block_out_channels=(8, 16, 16), layers_per_block=1, norm_num_groups=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=[1, 1, 2], attention_head_dim=[1, 2, 4], use_linear_projection=True,
            cross_attention_dim=16 + pooled, addition_embed_type="text_time", addition_time_embed_dim=time_width,
            projection_class_embeddings_input_dim=pooled + 6 * time_width,
        ),
        scheduler=EulerDiscreteScheduler(**_schedule(timestep_spacing="leading")),
        force_zeros_for_empty_prompt=True, add_watermarker=False,
    )  # fmt: skip


def build(family: str, directory: str | Path, seed: int = 0) -> Path:
    """Write a pipeline directory, as `save_pretrained` does, and return its path. family: one of FAMILIES."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = {"sd1": _sd1, "sd2": _sd2, "sdxl": _sdxl}[family]()
    pipeline.save_pretrained(directory)
    return Path(directory)
