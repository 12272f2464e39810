"""SD3 and SD3.5: a transformer over patches and words, told by two CLIP text encoders and, where it is there, by T5.

Source: Scaling Rectified Flow Transformers (arXiv:2403.03206).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift
from pydantic import Field
from transformers import CLIPTextModelWithProjection

from prdp_fast.core.errors import UserError
from prdp_fast.models.configs import Positive, ReadConfig
from prdp_fast.models.families.flow import PATCH, FlowTransformer
from prdp_fast.models.families.sd import read_text_encoder


class TransformerConfig(ReadConfig):
    sample_size: Positive = Field(128, description="the side of its latents, such as 128 for pictures of 1024 pixels")
    patch_size: Positive = Field(2, description="a whole number from 1")
    in_channels: Positive = Field(16, description="a whole number from 1")
    out_channels: Positive | None = Field(16, description="a whole number from 1, or null")
    joint_attention_dim: Positive = Field(4096, description="the width of the text embeddings, a whole number")
    pooled_projection_dim: Positive = Field(2048, description="the width of the pooled text embeddings, a whole number")
    pos_embed_max_size: Positive | None = Field(96, description="a whole number from 1, or null")


class StableDiffusion3(FlowTransformer):
    pipeline_class = StableDiffusion3Pipeline
    title = "SD3 and SD3.5"
    components = (*FlowTransformer.components, "text_encoder_3", "tokenizer_3")
    optional = ("text_encoder_3", "tokenizer_3")
    t5_encoders = ("text_encoder_3",)
    denoiser_class = SD3Transformer2DModel
    denoiser_keys = TransformerConfig
    repeated_blocks = ("JointTransformerBlock",)
    hub_tag = "stable-diffusion-3"
    lora_targets = (
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj",
        "attn.to_add_out",
    )  # fmt: skip
    default_sequence = 256
    shift_of = staticmethod(calculate_shift)
    max_shift = 1.16

    @classmethod
    def text_encoders(cls, pretrained: str, absent: Collection[str] = ()) -> tuple[int, list[Any]]:
        names = ("text_encoder", "text_encoder_2")
        encoders = [read_text_encoder(pretrained, name, CLIPTextModelWithProjection) for name in names]
        length = encoders[0].config.max_position_embeddings + cls.default_sequence  # without T5 its tokens are zeros
        t5 = [] if "text_encoder_3" in absent else [cls.read_t5(pretrained, "text_encoder_3")]
        return length, [*encoders, *t5]

    def check_text_encoders(self, text_encoders: list[Any]) -> None:
        clip, t5 = text_encoders[:2], text_encoders[2:]
        width, takes = sum(encoder.config.hidden_size for encoder in clip), self.denoiser_config.get("joint_attention_dim", 4096)
        if width > takes:
            raise UserError(
                f"model.pretrained {self.pretrained!r} has CLIP text encoders of width {width} together and a transformer of "
                f"joint_attention_dim {takes}; expected no wider ones: their config.json are of two models"
            )
        pooled = sum(encoder.config.projection_dim for encoder in clip)
        self.check_width("pooled embeddings of text_encoder and text_encoder_2", pooled, "pooled_projection_dim")
        for encoder in t5:
            self.check_width("a text_encoder_3", encoder.config.d_model, "joint_attention_dim")

    @property
    def own_shape(self) -> tuple[int, int, int]:
        config = self.denoiser_config
        return config.get("in_channels", 16), config.get("sample_size", 128), config.get("sample_size", 128)

    def denoiser_inputs(self, rows: int, device: torch.device | str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        config = self.denoiser_config
        words, pooled = config.get("joint_attention_dim", 4096), config.get("pooled_projection_dim", 2048)
        return {
            "hidden_states": torch.zeros(rows, *self.latent_shape, device=device, dtype=dtype),
            "timestep": torch.zeros(rows, device=device),
            "encoder_hidden_states": torch.zeros(rows, self.text_length, words, device=device, dtype=dtype),
            "pooled_projections": torch.zeros(rows, pooled, device=device, dtype=dtype),
            "return_dict": False,
        }

    def encode(self, whole: Any, texts: list[str], *, negative: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        # encode_prompt returns embeddings, negative ones, pooled and negative pooled ones.
        encoded = whole.encode_prompt(
            texts, None, None, device=whole.text_encoder.device, do_classifier_free_guidance=negative,
            max_sequence_length=self.sequence,
        )  # fmt: skip
        embeds, pooled = encoded[int(negative) :: 2]
        return embeds, pooled

    def check(self, denoiser: Any, vae: Any) -> None:
        super().check(denoiser, vae)
        self.check_vae(vae)
        if denoiser.patch_size != PATCH or (denoiser.out_channels or denoiser.in_channels) != denoiser.in_channels:
            raise UserError(
                f"model.pretrained {self.pretrained!r} has a transformer of patch_size {denoiser.patch_size} from "
                f"{denoiser.in_channels} channels to {denoiser.out_channels}; expected {PATCH}, and as many out as in"
            )
        self.check_size()

    def check_size(self) -> None:
        most = self.denoiser_config.get("pos_embed_max_size", 96)
        sides = self.latent_shape[1:]
        if any(side % PATCH for side in sides):
            raise UserError(
                f"model.pretrained {self.pretrained!r}: transformer/config.json has sample_size {sides[0]}; expected a "
                f"multiple of its patch_size {PATCH}"
            )
        if most is not None and max(sides) > most * PATCH:
            raise UserError(
                f"model.pretrained {self.pretrained!r} has positions for {most * PATCH * self.vae_scale} pixels a side "
                f"(pos_embed_max_size {most}), but pictures of {max(sides) * self.vae_scale}; lower sampler.image_size"
            )
