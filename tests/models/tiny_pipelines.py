"""A pipeline of each family that the engine trains: the true classes and layouts, random weights, 32-pixel images.

What the families differ in is here at its true value: prediction type, scheduler class, activation, linear projections, heads per
block, transformer layers per block, padding token, scaling factor. Widths and depths are not.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from prdp_fast.world import TINY

FAMILIES = ("sd1", "sd2", "sdxl")
# SD3 without T5 and SD3.5 with it; guidance-distilled and step-distilled FLUX.
FLOW = ("sd3", "sd35", "flux_dev", "flux_schnell")
PIXELS = 32
TOKENS = 12  # of a prompt for T5, where the pipelines' own are hundreds
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


def _flow_vae(channels: int = 4) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(4, 8, 8), down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1, latent_channels=channels, norm_num_groups=4, sample_size=PIXELS, scaling_factor=1.5305,
        shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip


def _t5(width: int) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=128, d_model=width, d_kv=8, d_ff=2 * width, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu",
            dense_act_fn="gelu_new", is_gated_act=True, is_encoder_decoder=False, tie_word_embeddings=False,
        )
    )  # fmt: skip


def _t5_tokenizer() -> T5TokenizerFast:
    """Of the letters, as sentencepiece would split words that it does not know."""
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    words += [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz,"] + [("\u2581a", -4.0), ("red", -4.0)]
    return T5TokenizerFast(vocab=words, extra_ids=0, model_max_length=512)


def _sd3(t5: bool) -> DiffusionPipeline:
    """SD3 as diffusers writes it without T5, or SD3.5 with its normed queries and second attention."""
    later = {"qk_norm": "rms_norm", "dual_attention_layers": (0,)} if t5 else {}
    return StableDiffusion3Pipeline(
        vae=_flow_vae(),
        text_encoder=CLIPTextModelWithProjection(_text_config(16, "quick_gelu")),
        text_encoder_2=CLIPTextModelWithProjection(_text_config(24, "gelu", layers=3)),
        text_encoder_3=_t5(48) if t5 else None,
        tokenizer=_tokenizer(),
        tokenizer_2=_tokenizer(pad_token=PAD),
        tokenizer_3=_t5_tokenizer() if t5 else None,
        transformer=SD3Transformer2DModel(
            sample_size=SAMPLE_SIZE, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
            num_attention_heads=2, joint_attention_dim=48, caption_projection_dim=16, pooled_projection_dim=16 + 24,
            pos_embed_max_size=6, **later,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip


def _flux(guidance: bool) -> DiffusionPipeline:
    shift = {"use_dynamic_shifting": True, "shift": 3.0} if guidance else {"use_dynamic_shifting": False, "shift": 1.0}
    return FluxPipeline(
        vae=_flow_vae(),
        text_encoder=CLIPTextModel(_text_config(16, "quick_gelu")),
        text_encoder_2=_t5(48),
        tokenizer=_tokenizer(),
        tokenizer_2=_t5_tokenizer(),
        transformer=FluxTransformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=48, pooled_projection_dim=16, guidance_embeds=guidance, axes_dims_rope=(2, 2, 4),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(
            base_image_seq_len=256, max_image_seq_len=4096, base_shift=0.5, max_shift=1.15, **shift
        ),
    )  # fmt: skip


BUILDERS: dict[str, Callable[[], DiffusionPipeline]] = {
    "sd1": _sd1, "sd2": _sd2, "sdxl": _sdxl, "sd3": partial(_sd3, t5=False), "sd35": partial(_sd3, t5=True),
    "flux_dev": partial(_flux, guidance=True), "flux_schnell": partial(_flux, guidance=False),
}  # fmt: skip


def opening(family: str) -> dict[str, Any]:
    """Arguments that diffusers' `from_pretrained` takes for it: a pipeline without T5 is opened as such."""
    return {"text_encoder_3": None, "tokenizer_3": None} if family == "sd3" else {}


def build(family: str, directory: str | Path, seed: int = 0) -> Path:
    """Write a pipeline directory, as `save_pretrained` does, and return its path. family: one of FAMILIES or FLOW."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = BUILDERS[family]()
    pipeline.save_pretrained(directory)
    return Path(directory)
