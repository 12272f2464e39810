"""Stable Diffusion 1 and 2: one CLIP text encoder, a U-Net with cross-attention. They differ in configurations alone."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, ClassVar

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from prdp_fast.core.errors import UserError
from prdp_fast.core.records import TextEmbeddings
from prdp_fast.models.configs import TextConfig, UnetConfig, read_config
from prdp_fast.models.families.base import Family, both_halves, describing


class StableDiffusion(Family):
    pipeline_class = StableDiffusionPipeline
    title = "SD 1 and SD 2"
    components: ClassVar[tuple[str, ...]] = ("unet", "vae", "scheduler", "text_encoder", "tokenizer")
    denoiser_component = "unet"
    denoiser_class = UNet2DConditionModel
    denoiser_title = "U-Net"
    denoiser_keys = UnetConfig
    # diffusers' own choice (`_repeated_blocks`) leaves out the residual blocks, half of a U-Net's time.
    repeated_blocks = ("BasicTransformerBlock", "ResnetBlock2D")
    hub_tag = "stable-diffusion"
    addition_embed_type: str | None = None  # of the U-Net's configuration: what it is told beside text and timestep

    @classmethod
    def text_encoders(cls, pretrained: str, absent: Collection[str] = ()) -> tuple[int, list[Any]]:
        encoder = read_text_encoder(pretrained, "text_encoder", CLIPTextModel)
        return encoder.config.max_position_embeddings, [encoder]

    def check_text_encoders(self, text_encoders: list[Any]) -> None:
        width = sum(encoder.config.hidden_size for encoder in text_encoders)
        if width != self._text_width:
            raise UserError(
                f"model.pretrained {self.pretrained!r} has text encoders of width {width} and a U-Net of cross_attention_dim "
                f"{self._text_width}; text_encoder/config.json and unet/config.json are of two models"
            )

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        size = self.denoiser_config["sample_size"]
        height, width = (size, size) if isinstance(size, int) else size
        return self.denoiser_config.get("in_channels", 4), height, width

    def denoiser_inputs(self, rows: int, device: torch.device | str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        return {
            "sample": torch.zeros(rows, *self.latent_shape, device=device, dtype=dtype),
            "timestep": torch.zeros(rows, device=device, dtype=torch.long),
            "encoder_hidden_states": torch.zeros(rows, self.text_length, self._text_width, device=device, dtype=dtype),
            "return_dict": False,
        }

    @property
    def _text_width(self) -> int:
        width = self.denoiser_config.get("cross_attention_dim", 1280)
        return width if isinstance(width, int) else width[0]

    def conditioning(self, embeddings: TextEmbeddings, *, guided: bool) -> dict[str, Any]:
        text = both_halves(embeddings.negative_prompt_embeds, embeddings.prompt_embeds, guided=guided)
        return {"encoder_hidden_states": text}

    def encode(self, whole: Any, texts: list[str], *, negative: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        # encode_prompt returns embeddings and negative ones; SDXL's also pooled and negative pooled ones.
        encoded = whole.encode_prompt(
            texts, device=whole.text_encoder.device, num_images_per_prompt=1, do_classifier_free_guidance=negative
        )
        embeds, *pooled = encoded[int(negative) :: 2]
        return embeds, pooled[0] if pooled else None

    def loading_options(self) -> dict[str, Any]:
        return {"safety_checker": None, "requires_safety_checker": False}

    def saving_options(self, whole: Any) -> dict[str, Any]:
        return {"requires_safety_checker": False}

    def check(self, denoiser: Any, vae: Any) -> None:
        super().check(denoiser, vae)
        what = f"model.pretrained {self.pretrained!r}"
        if denoiser.time_cond_proj_dim is not None:
            raise UserError(
                f"{what} is told its guidance scale (unet time_cond_proj_dim {denoiser.time_cond_proj_dim}: distilled for a few "
                "steps); train the model that it was distilled from"
            )
        if denoiser.addition_embed_type != self.addition_embed_type:
            raise UserError(
                f"{what} is a {self.pipeline_class.__name__} whose U-Net has addition_embed_type "
                f"{denoiser.addition_embed_type!r}; expected {self.addition_embed_type!r}: "
                "model_index.json and unet/config.json are of two models"
            )


def read_text_encoder(pretrained: str, component: str, encoder: type[nn.Module]) -> Any:
    """On the current device, by its configuration. Raises: UserError."""
    file = f"{component}/config.json"
    _, content = read_config(pretrained, file, TextConfig)
    with describing(pretrained, file, "a CLIP text encoder"):
        return encoder(CLIPTextConfig(**content))
