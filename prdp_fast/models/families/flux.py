"""FLUX.1: a transformer over packed patches and words of T5, told CLIP's pooled embedding and, if distilled, its guidance.

Outside of this file its latents are (N, C, H, W) as every model's; inside a call 2 x 2 of them are one token of 4 C channels.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from pydantic import Field
from transformers import CLIPTextModel

from prdp_fast.config.recipe import SamplerSettings
from prdp_fast.core.errors import UserError
from prdp_fast.core.records import TextEmbeddings
from prdp_fast.models.configs import Positive, ReadConfig
from prdp_fast.models.families.flow import PATCH, FlowTransformer
from prdp_fast.models.families.sd import read_text_encoder

SIDE = 128  # of a latent, which the pipeline paints if it is told nothing
TRAINED_TIMESTEPS = 1000  # the pipeline divides timesteps by them
GUIDANCE = 3.5  # that the pipeline's call tells where it is told none


class TransformerConfig(ReadConfig):
    patch_size: Positive = Field(1, description="1: its latents are packed")
    in_channels: Positive = Field(64, description="a whole number from 1")
    out_channels: Positive | None = Field(None, description="a whole number from 1, or null")
    joint_attention_dim: Positive = Field(4096, description="the width of T5's embeddings, a whole number")
    pooled_projection_dim: Positive = Field(768, description="the width of CLIP's pooled embedding, a whole number")
    guidance_embeds: bool = Field(False, description="true or false")


class Flux(FlowTransformer):
    pipeline_class = FluxPipeline
    title = "FLUX.1"
    t5_encoders = ("text_encoder_2",)
    denoiser_class = FluxTransformer2DModel
    denoiser_keys = TransformerConfig
    repeated_blocks = ("FluxTransformerBlock", "FluxSingleTransformerBlock")
    hub_tag = "flux"
    lora_targets = (
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj",
        "attn.to_add_out",
    )  # fmt: skip
    default_sequence = 512
    shift_of = staticmethod(calculate_shift)
    max_shift = 1.15

    @classmethod
    def text_encoders(cls, pretrained: str, absent: Collection[str] = ()) -> tuple[int, list[Any]]:
        clip = read_text_encoder(pretrained, "text_encoder", CLIPTextModel)
        return cls.default_sequence, [clip, cls.read_t5(pretrained, "text_encoder_2")]

    def check_text_encoders(self, text_encoders: list[Any]) -> None:
        clip, t5 = text_encoders
        self.check_width("a text_encoder", clip.config.hidden_size, "pooled_projection_dim")
        self.check_width("a text_encoder_2", t5.config.d_model, "joint_attention_dim")

    @property
    def own_shape(self) -> tuple[int, int, int]:
        return self.denoiser_config.get("in_channels", 64) // PATCH**2, SIDE, SIDE

    @property
    def is_distilled(self) -> bool:
        """Whether it is told its guidance."""
        return bool(self.denoiser_config.get("guidance_embeds", False))

    @property
    def told_guidance(self) -> float:
        return GUIDANCE if self.embedded_guidance is None else self.embedded_guidance

    def check_guidance(self, sampler: SamplerSettings) -> None:
        if not self.is_distilled:
            super().check_guidance(sampler)
        elif sampler.guidance_scale is not None:
            raise UserError(
                f"sampler.guidance_scale is {sampler.guidance_scale:g}, but model.pretrained {self.pretrained!r} is "
                "guidance-distilled: set guidance_scale null, and what it is told with sampler.embedded_guidance "
                f"(null: {GUIDANCE}, its pipeline's default)"
            )

    def call_options(self, sampler: SamplerSettings) -> dict[str, Any]:
        options = super().call_options(sampler)
        if self.is_distilled:
            return options | {"guidance_scale": self.told_guidance}
        del options["guidance_scale"]  # which is that of distilled models
        guided = {} if sampler.guidance_scale is None else {"negative_prompt": "", "true_cfg_scale": sampler.guidance_scale}
        return options | guided

    def schedule_options(self, num_inference_steps: int) -> dict[str, Any]:
        options = super().schedule_options(num_inference_steps)
        if not getattr(self.scheduler().config, "use_flow_sigmas", False):
            options["sigmas"] = torch.linspace(1, 1 / num_inference_steps, num_inference_steps, dtype=torch.float64).tolist()
        return options

    def denoiser_inputs(self, rows: int, device: torch.device | str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        config, tokens = self.denoiser_config, self.image_tokens
        words, pooled = config.get("joint_attention_dim", 4096), config.get("pooled_projection_dim", 768)
        inputs = {
            "hidden_states": torch.zeros(rows, tokens, config.get("in_channels", 64), device=device, dtype=dtype),
            "timestep": torch.zeros(rows, device=device, dtype=dtype),
            "encoder_hidden_states": torch.zeros(rows, self.text_length, words, device=device, dtype=dtype),
            "pooled_projections": torch.zeros(rows, pooled, device=device, dtype=dtype),
            "txt_ids": torch.zeros(self.text_length, 3, device=device, dtype=dtype),
            "img_ids": torch.zeros(tokens, 3, device=device, dtype=dtype),
        }
        guidance = {"guidance": torch.zeros(rows, device=device)} if self.is_distilled else {}
        return inputs | guidance | {"return_dict": False}

    def predict(
        self,
        denoiser: Any,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        embeddings: TextEmbeddings,
        *,
        guided: bool,
        shared: bool = False,
    ) -> torch.Tensor:
        assert not shared, "halves of a guided call are shared in U-Nets alone"
        words = embeddings.prompt_embeds
        height, width = latents.shape[-2:]
        tokens = pack(latents.to(words.dtype))
        # Rounded, then divided, as the pipeline does it in the dtype of its latents.
        told = {"timestep": timesteps.to(words.dtype) / TRAINED_TIMESTEPS}
        if self.is_distilled:
            told["guidance"] = torch.full_like(timesteps, self.told_guidance, dtype=torch.float32)
        if guided:
            tokens, told = torch.cat([tokens, tokens]), {name: torch.cat([value, value]) for name, value in told.items()}
        told |= self.conditioning(embeddings, guided=guided)
        output = denoiser(
            tokens, **told, txt_ids=words.new_zeros(words.shape[1], 3), img_ids=positions(height // PATCH, width // PATCH, words),
            return_dict=False,
        )[0]  # fmt: skip
        return unpack(output, height, width)

    def encode(self, whole: Any, texts: list[str], *, negative: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        # The negative prompt of a guided call is encoded as any other: with none given, the empty one.
        embeds, pooled, _ = whole.encode_prompt(
            [""] * len(texts) if negative else texts, device=whole.text_encoder.device, max_sequence_length=self.sequence
        )
        return embeds, pooled

    def check(self, denoiser: Any, vae: Any) -> None:
        self.check_vae(vae)
        takes, gives = denoiser.in_channels, denoiser.out_channels or denoiser.in_channels
        packed = PATCH**2 * vae.latent_channels
        if not takes == gives == packed or denoiser.patch_size != 1:
            raise UserError(
                f"model.pretrained {self.pretrained!r} has a transformer from {takes} channels to {gives}, of patch_size "
                f"{denoiser.patch_size}; expected {packed} to {packed}, the packed latents of its VAE, of patch_size 1: a "
                "text-to-image model, not one that fills, controls or edits pictures"
            )


def pack(latents: torch.Tensor) -> torch.Tensor:
    """(N, C, H, W) -> (N, H/2 W/2, 4 C): channels outermost, then the row and the column inside a patch."""
    rows, channels, height, width = latents.shape
    patches = latents.reshape(rows, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(rows, height * width // PATCH**2, channels * PATCH**2)


def unpack(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """What `pack` was given."""
    patches = tokens.reshape(len(tokens), height // PATCH, width // PATCH, tokens.shape[-1] // PATCH**2, PATCH, PATCH)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(len(tokens), -1, height, width)


def positions(height: int, width: int, like: torch.Tensor) -> torch.Tensor:
    """(height width, 3): 0, row and column of each patch."""
    rows, columns = (torch.arange(side, device=like.device, dtype=like.dtype) for side in (height, width))
    grid = torch.cartesian_prod(rows, columns)
    return torch.cat([torch.zeros_like(grid[:, :1]), grid], dim=1)
