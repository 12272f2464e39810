"""A pipeline's sizes from its configurations alone: kilobytes of JSON, no weights, nothing computed.

Modules are built where a tensor has a shape and no memory: on torch's meta device, or as fake tensors of a CPU, for which torch
chooses the kernels a real one would get.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from prdp_fast.models.lora import add_adapter, check_targets
from prdp_fast.models.pipeline import family, quiet_loading, read_json
from prdp_fast.settings import LoraSettings

TIME_IDS = 6  # of SDXL's micro-conditioning: original size, crop and target size


@dataclass(frozen=True)
class Shapes:
    """What counting needs of a pipeline."""

    unet_config: dict[str, Any]
    text_length: int  # tokens of a prompt, padded
    vae_parameters: int = 0
    text_parameters: int = 0
    lora: LoraSettings | None = None  # the adapter that the U-Net is given

    @classmethod
    def load(cls, pretrained: str, lora: LoraSettings | None = None) -> Shapes:
        """Read the configurations of a pipeline directory or hub id. Raises: UserError if one is missing."""

        def read(component: str) -> dict[str, Any]:
            return read_json(pretrained, f"{component}/config.json")

        quiet_loading()
        is_xl = family(pretrained) == "StableDiffusionXLPipeline"
        text_config = CLIPTextConfig(**read("text_encoder"))
        with torch.device("meta"):
            vae, text = AutoencoderKL.from_config(read("vae")), [CLIPTextModel(text_config)]
            if is_xl:
                text.append(CLIPTextModelWithProjection(CLIPTextConfig(**read("text_encoder_2"))))
        return cls(
            read("unet"), text_config.max_position_embeddings, count_parameters(vae), sum(count_parameters(one) for one in text),
            lora,
        )  # fmt: skip

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        size = self.unet_config["sample_size"]
        height, width = (size, size) if isinstance(size, int) else size
        return self.unet_config.get("in_channels", 4), height, width

    @cached_property
    def unet_parameters(self) -> int:
        """The adapter's included."""
        return count_parameters(self.meta_unet())

    @cached_property
    def trained_parameters(self) -> int:
        """The adapter's, or all."""
        return sum(parameter.numel() for parameter in self.meta_unet().parameters() if parameter.requires_grad)

    def meta_unet(self) -> UNet2DConditionModel:
        """With the adapter, if there is one, and what is trained requires gradients. Raises: UserError if it does not fit."""
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(self.unet_config)
            if self.lora is not None:
                check_targets(unet, self.lora)
                add_adapter(unet, self.lora, seed=0)
            return unet

    @contextlib.contextmanager
    def fake_unet(self, dtype: torch.dtype) -> Iterator[UNet2DConditionModel]:
        """The U-Net as fake tensors of a CPU. Inside the block every new tensor is one."""
        unet = self.meta_unet()
        with FakeTensorMode():
            for module in unet.modules():  # a module of fake tensors can neither be cast nor moved
                for name, parameter in module.named_parameters(recurse=False):
                    fake = torch.empty(parameter.shape, dtype=dtype, device="cpu")
                    setattr(module, name, nn.Parameter(fake, requires_grad=parameter.requires_grad))
            yield unet

    def unet_inputs(self, rows: int, device: torch.device | str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """Arguments of one U-Net call, zeros: `unet(**inputs)`."""
        config = self.unet_config
        inputs: dict[str, Any] = {
            "sample": torch.zeros(rows, *self.latent_shape, device=device, dtype=dtype),
            "timestep": torch.zeros(rows, device=device, dtype=torch.long),
            "encoder_hidden_states": torch.zeros(rows, self.text_length, self._text_width, device=device, dtype=dtype),
            "return_dict": False,
        }
        if config.get("addition_embed_type") == "text_time":  # SDXL
            pooled = config["projection_class_embeddings_input_dim"] - TIME_IDS * config["addition_time_embed_dim"]
            inputs["added_cond_kwargs"] = {
                "text_embeds": torch.zeros(rows, pooled, device=device, dtype=dtype),
                "time_ids": torch.zeros(rows, TIME_IDS, device=device, dtype=dtype),
            }
        return inputs

    @property
    def _text_width(self) -> int:
        width = self.unet_config.get("cross_attention_dim", 1280)
        return width if isinstance(width, int) else width[0]


def count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
