"""SDXL: a second text encoder, whose pooled embedding and the picture's size the U-Net is told too.

Source: SDXL (arXiv:2307.01952) section 2.2.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from transformers import CLIPTextModelWithProjection

from prdp_fast.core.errors import UserError
from prdp_fast.core.records import TextEmbeddings
from prdp_fast.models.families.base import both_halves
from prdp_fast.models.families.sd import StableDiffusion, read_text_encoder

TIME_IDS = 6  # original size, crop and target size


class StableDiffusionXL(StableDiffusion):
    pipeline_class = StableDiffusionXLPipeline
    title = "SDXL"
    components = (*StableDiffusion.components, "text_encoder_2", "tokenizer_2")
    hub_tag = "stable-diffusion-xl"
    addition_embed_type = "text_time"

    @classmethod
    def text_encoders(cls, pretrained: str, absent: Collection[str] = ()) -> tuple[int, list[Any]]:
        length, encoders = super().text_encoders(pretrained)
        return length, [*encoders, read_text_encoder(pretrained, "text_encoder_2", CLIPTextModelWithProjection)]

    def check_text_encoders(self, text_encoders: list[Any]) -> None:
        super().check_text_encoders(text_encoders)
        config, pooled = self.denoiser_config, text_encoders[1].config.projection_dim
        for key in ("projection_class_embeddings_input_dim", "addition_time_embed_dim"):
            if config.get(key) is None:
                raise UserError(
                    f"model.pretrained {self.pretrained!r}: unet/config.json has no {key}; expected a whole number, as of SDXL"
                )
        takes = config["projection_class_embeddings_input_dim"] - TIME_IDS * config["addition_time_embed_dim"]
        if pooled != takes:
            raise UserError(
                f"model.pretrained {self.pretrained!r} has a text_encoder_2 of projection_dim {pooled} and a U-Net that takes "
                f"pooled embeddings of {takes}; text_encoder_2/config.json and unet/config.json are of two models"
            )

    def denoiser_inputs(self, rows: int, device: torch.device | str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        config = self.denoiser_config
        pooled = config["projection_class_embeddings_input_dim"] - TIME_IDS * config["addition_time_embed_dim"]
        added = {
            "text_embeds": torch.zeros(rows, pooled, device=device, dtype=dtype),
            "time_ids": torch.zeros(rows, TIME_IDS, device=device, dtype=dtype),
        }
        return super().denoiser_inputs(rows, device, dtype) | {"added_cond_kwargs": added}

    def conditioning(self, embeddings: TextEmbeddings, *, guided: bool) -> dict[str, Any]:
        assert embeddings.pooled_prompt_embeds is not None and embeddings.time_ids is not None
        pooled = both_halves(embeddings.negative_pooled_prompt_embeds, embeddings.pooled_prompt_embeds, guided=guided)
        added = {"text_embeds": pooled, "time_ids": embeddings.time_ids.repeat(len(pooled), 1)}
        return super().conditioning(embeddings, guided=guided) | {"added_cond_kwargs": added}

    def shared_conditioning(self, whole: Any, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Micro-conditioning as the pipeline has it by default: the picture's own size, not cropped."""
        size = [side * whole.vae_scale_factor for side in self.latent_shape[1:]]
        return {"time_ids": torch.tensor([[*size, 0, 0, *size]], dtype=dtype, device=device)}

    def unscaled(self, latents: torch.Tensor, vae: Any) -> torch.Tensor:
        mean, std = getattr(vae.config, "latents_mean", None), getattr(vae.config, "latents_std", None)
        if mean is None or std is None:
            return super().unscaled(latents, vae)
        # Of each channel, which some models of SDXL's layout have.
        mean, std = (latents.new_tensor(values).view(1, -1, 1, 1) for values in (mean, std))
        return latents * std / vae.config.scaling_factor + mean

    def keeps_float32_vae(self, vae: Any, dtype: torch.dtype) -> bool:
        return dtype == torch.float16 and vae.config.force_upcast

    def loading_options(self) -> dict[str, Any]:
        return {"add_watermarker": False}

    def saving_options(self, whole: Any) -> dict[str, Any]:
        return {"force_zeros_for_empty_prompt": whole.config.force_zeros_for_empty_prompt, "add_watermarker": False}
