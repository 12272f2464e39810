"""The configurations of published pipelines, as their repositories have them: model directories without a weight in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.workload import UNETS

CLIP_L = {
    "architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "hidden_size": 768, "intermediate_size": 3072,
    "num_hidden_layers": 12, "num_attention_heads": 12, "projection_dim": 768, "hidden_act": "quick_gelu", "vocab_size": 49408,
    "max_position_embeddings": 77, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1,
}  # fmt: skip
BIG_G = CLIP_L | {
    "architectures": ["CLIPTextModelWithProjection"], "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32,
    "num_attention_heads": 20, "projection_dim": 1280, "hidden_act": "gelu",
}  # fmt: skip
VAE = {
    "_class_name": "AutoencoderKL", "act_fn": "silu", "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4, "in_channels": 3,
    "out_channels": 3, "latent_channels": 4, "layers_per_block": 2, "norm_num_groups": 32,
}  # fmt: skip
BETAS = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000, "clip_sample": False,
    "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None,
}  # fmt: skip
SD_INDEX = {
    "_class_name": "StableDiffusionPipeline", "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
}  # fmt: skip
SD: dict[str, dict[str, Any]] = {
    "model_index.json": SD_INDEX,
    "scheduler/scheduler_config.json": {"_class_name": "PNDMScheduler"} | BETAS,
    "text_encoder/config.json": CLIP_L,
    "vae/config.json": VAE | {"sample_size": 512},
    "unet/config.json": UNETS["sd14"],
}
SDXL: dict[str, dict[str, Any]] = {
    "model_index.json": SD_INDEX
    | {
        "_class_name": "StableDiffusionXLPipeline", "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"], "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "force_zeros_for_empty_prompt": True,
    },
    "scheduler/scheduler_config.json": {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"} | BETAS,
    "text_encoder/config.json": CLIP_L,
    "text_encoder_2/config.json": BIG_G,
    "vae/config.json": VAE | {"sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True},
    "unet/config.json": UNETS["sdxl"],
}  # fmt: skip
PIPELINES = {
    "CompVis/stable-diffusion-v1-4": SD,
    "stable-diffusion-v1-5/stable-diffusion-v1-5": SD,
    "stabilityai/stable-diffusion-xl-base-1.0": SDXL,
}


def write_configurations(hub_id: str, directory: Path) -> Path:
    """A directory with what `--dry-run` reads of a hub id. Returns: it."""
    for filename, config in PIPELINES[hub_id].items():
        path = directory / filename
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(config))
    return directory
