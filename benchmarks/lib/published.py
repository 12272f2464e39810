"""The configurations of published pipelines, as their repositories have them, and directories of them without a weight."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# unet/config.json, as far as it differs from diffusers' defaults, which are Stable Diffusion 1's.
UNETS: dict[str, dict[str, Any]] = {
    "sd14": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    "sd21": {
        "sample_size": 96, "cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True,
    },
    "sdxl": {
        "sample_size": 128, "cross_attention_dim": 2048, "attention_head_dim": [5, 10, 20],
        "block_out_channels": [320, 640, 1280],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 2, 10], "use_linear_projection": True, "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
    },
}  # fmt: skip
PARAMETERS = {"tiny": 2_448_100, "sd14": 859_520_964, "sd21": 865_910_724, "sdxl": 2_567_463_684}  # of the U-Net
TRANSFORMER_PARAMETERS = {"sd35m": 2_243_171_520, "flux_dev": 11_901_408_320}

CLIP_L = {
    "architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "hidden_size": 768, "intermediate_size": 3072,
    "num_hidden_layers": 12, "num_attention_heads": 12, "projection_dim": 768, "hidden_act": "quick_gelu", "vocab_size": 49408,
    "max_position_embeddings": 77, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1,
}  # fmt: skip
CLIP_H = CLIP_L | {  # SD 2's has 23 of the 24 layers
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16, "projection_dim": 512,
    "hidden_act": "gelu",
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
WIDE_VAE = VAE | {
    "latent_channels": 16, "sample_size": 1024, "force_upcast": True, "use_quant_conv": False, "use_post_quant_conv": False,
}  # fmt: skip
T5_XXL = {
    "architectures": ["T5EncoderModel"], "model_type": "t5", "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24,
    "num_decoder_layers": 24, "num_heads": 64, "vocab_size": 32128, "feed_forward_proj": "gated-gelu",
    "dense_act_fn": "gelu_new", "is_gated_act": True, "relative_attention_num_buckets": 32, "tie_word_embeddings": False,
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
TRANSFORMER_INDEX = {
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"], "vae": ["diffusers", "AutoencoderKL"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
}  # fmt: skip
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "sd14": {
        "model_index.json": SD_INDEX,
        "scheduler/scheduler_config.json": {"_class_name": "PNDMScheduler"} | BETAS,
        "text_encoder/config.json": CLIP_L,
        "vae/config.json": VAE | {"sample_size": 512},
        "unet/config.json": UNETS["sd14"],
    },
    "sd21": {
        "model_index.json": SD_INDEX | {"scheduler": ["diffusers", "DDIMScheduler"]},
        "scheduler/scheduler_config.json": {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"} | BETAS,
        "text_encoder/config.json": CLIP_H,
        "vae/config.json": VAE | {"sample_size": 768},
        "unet/config.json": UNETS["sd21"],
    },
    "sdxl": {
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
    },
}  # fmt: skip
# Flow-matching transformers, which no benchmark runs: their jobs are counted and planned.
TRANSFORMERS: dict[str, dict[str, dict[str, Any]]] = {
    "sd35m": {
        "model_index.json": TRANSFORMER_INDEX
        | {
            "_class_name": "StableDiffusion3Pipeline", "transformer": ["diffusers", "SD3Transformer2DModel"],
            "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"], "tokenizer_2": ["transformers", "CLIPTokenizer"],
            "text_encoder_3": ["transformers", "T5EncoderModel"], "tokenizer_3": ["transformers", "T5TokenizerFast"],
        },
        "scheduler/scheduler_config.json": {
            "_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0,
        },
        "text_encoder/config.json": CLIP_L | {"architectures": ["CLIPTextModelWithProjection"]},
        "text_encoder_2/config.json": BIG_G,
        "text_encoder_3/config.json": T5_XXL,
        "vae/config.json": WIDE_VAE | {"scaling_factor": 1.5305, "shift_factor": 0.0609},
        "transformer/config.json": {
            "_class_name": "SD3Transformer2DModel", "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16,
            "num_layers": 24, "attention_head_dim": 64, "num_attention_heads": 24, "joint_attention_dim": 4096,
            "caption_projection_dim": 1536, "pooled_projection_dim": 2048, "pos_embed_max_size": 384, "qk_norm": "rms_norm",
            "dual_attention_layers": list(range(13)),
        },
    },
    "flux_dev": {
        "model_index.json": TRANSFORMER_INDEX
        | {
            "_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"],
            "text_encoder": ["transformers", "CLIPTextModel"], "text_encoder_2": ["transformers", "T5EncoderModel"],
            "tokenizer_2": ["transformers", "T5TokenizerFast"],
        },
        "scheduler/scheduler_config.json": {
            "_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0,
            "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256,
            "max_image_seq_len": 4096,
        },
        "text_encoder/config.json": CLIP_L,
        "text_encoder_2/config.json": T5_XXL,
        "vae/config.json": WIDE_VAE | {"scaling_factor": 0.3611, "shift_factor": 0.1159},
        "transformer/config.json": {
            "_class_name": "FluxTransformer2DModel", "patch_size": 1, "in_channels": 64, "num_layers": 19,
            "num_single_layers": 38, "attention_head_dim": 128, "num_attention_heads": 24, "joint_attention_dim": 4096,
            "pooled_projection_dim": 768, "guidance_embeds": True,
        },
    },
}  # fmt: skip
HUB_IDS = {
    "CompVis/stable-diffusion-v1-4": "sd14",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd14",  # the same configurations
    "stabilityai/stable-diffusion-2-1": "sd21",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
    "stabilityai/stable-diffusion-3.5-medium": "sd35m",
    "black-forest-labs/FLUX.1-dev": "flux_dev",
}


TOKENIZER = {"model_max_length": 77, "tokenizer_class": "CLIPTokenizer"}


def write_configurations(preset: str, directory: Path) -> Path:
    """Write what `Job.prepare` reads of a pipeline directory: its configurations. Returns: the directory."""
    configurations = (PRESETS | TRANSFORMERS)[preset]
    names = [name for name in configurations["model_index.json"] if "tokenizer" in name]
    tokenizers = {f"{name}/tokenizer_config.json": TOKENIZER for name in names}
    for filename, config in (configurations | tokenizers).items():
        path = directory / filename
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(config))
    return directory
