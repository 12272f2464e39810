"""The diffusers pipeline taken apart: a trainable U-Net, a frozen reference, and everything that stays frozen."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    SchedulerMixin,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from prdp_fast.errors import UserError

TINY = Path(__file__).resolve().parent.parent / "assets" / "tiny"
SCHEDULERS: dict[str, type[SchedulerMixin]] = {"DDPMScheduler": DDPMScheduler, "DDIMScheduler": DDIMScheduler}


def resolve(pretrained: str) -> str:
    """'tiny' is the model that ships with the package; anything else is a directory or a hub id, as diffusers reads it."""
    return str(TINY) if pretrained == "tiny" else pretrained


def load_scheduler(pretrained: str) -> SchedulerMixin:
    """The pipeline's scheduler alone: kilobytes of JSON, so that settings can be checked before weights are touched.

    A sampler without a density (PNDM, as SD v1.4 ships) becomes a DDIMScheduler on the same noise schedule, which with eta 1
    is the paper's DDPM sampler.
    """
    path = Path(resolve(pretrained)) / "scheduler" / "scheduler_config.json"
    if not path.is_file():
        path = _from_hub(pretrained, "scheduler/scheduler_config.json")
    config: dict[str, Any] = json.loads(path.read_text())
    scheduler_class = SCHEDULERS.get(config.get("_class_name", ""), DDIMScheduler)
    if scheduler_class.__name__ != config.get("_class_name"):
        # Samplers without these settings neither clip nor threshold; DDIM's own default would.
        config = {"clip_sample": False, "thresholding": False} | config
    return scheduler_class.from_config(config)


def _from_hub(pretrained: str, filename: str) -> Path:
    if Path(pretrained).is_dir():
        raise UserError(f"model.pretrained {pretrained!r} has no {filename}; expected a StableDiffusionPipeline directory")
    try:
        return Path(hf_hub_download(pretrained, filename))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"model.pretrained {pretrained!r} is no directory, and the hub did not give it ({type(error).__name__}); "
            "check the name, the network and `hf auth login`"
        ) from None


def quiet_loading() -> None:
    """No progress bars for loading and saving, and no advice on dtypes, between the lines of a run."""
    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()
        library.set_verbosity_error()


@dataclass
class Pipeline:
    """The parts of a StableDiffusionPipeline on one device. Only `unet` is ever trained."""

    unet: UNet2DConditionModel  # float32; ZeRO takes it over
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler: SchedulerMixin

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return self.unet.config.in_channels, height, width

    @classmethod
    def load(cls, pretrained: str, device: torch.device, frozen_dtype: torch.dtype) -> Pipeline:
        """Load every component.

        Args:
            frozen_dtype: of text encoder and VAE; the U-Net is loaded in float32 and cast by DeepSpeed.
        Raises: UserError if the directory does not hold a StableDiffusionPipeline.
        """
        scheduler = load_scheduler(pretrained)
        quiet_loading()
        try:
            pipeline = StableDiffusionPipeline.from_pretrained(
                resolve(pretrained), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
                dtype=torch.float32,
            )  # fmt: skip
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise UserError(
                f"model.pretrained {pretrained!r} did not load as a StableDiffusionPipeline: {' '.join(str(error).split())[:300]}"
            ) from None
        for module in (pipeline.vae, pipeline.text_encoder, pipeline.unet):
            module.requires_grad_(False).eval()
        # Convolutions alone: channels-last decodes a fifth faster on a CPU, and is what tensor cores want.
        pipeline.vae.to(device, frozen_dtype, memory_format=torch.channels_last)
        pipeline.text_encoder.to(device, frozen_dtype)
        return cls(pipeline.unet.to(device), pipeline.vae, pipeline.text_encoder, pipeline.tokenizer, scheduler)

    def reference_unet(self, dtype: torch.dtype) -> nn.Module:
        """A frozen copy of the U-Net as it is now, in the policy's dtype."""
        return copy.deepcopy(self.unet).to(dtype).requires_grad_(False).eval()

    @torch.no_grad()
    def decode(self, latents: torch.Tensor, batch: int = 16) -> torch.Tensor:
        """Images of final latents.

        Args:
            latents: (N, C, H, W) float32, x_0.
        Returns: (N, 3, H, W) uint8 on the CPU, rounded exactly as diffusers rounds on its way to PIL.
        """
        images = []
        for part in latents.split(batch):
            scaled = (part.to(self.vae.dtype) / self.vae.config.scaling_factor).contiguous(memory_format=torch.channels_last)
            pixels = self.vae.decode(scaled, return_dict=False)[0]
            images.append(((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8))
        return torch.cat(images).contiguous().cpu()  # one wait for all of them

    def export(self, directory: Path, unet_state: dict[str, torch.Tensor]) -> None:
        """Write a StableDiffusionPipeline directory with `unet_state` in place of the original weights."""
        unet = UNet2DConditionModel.from_config(self.unet.config)
        unet.load_state_dict(unet_state)
        StableDiffusionPipeline(
            vae=self.vae, text_encoder=self.text_encoder, tokenizer=self.tokenizer, unet=unet, scheduler=self.scheduler,
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        ).save_pretrained(directory, safe_serialization=True)  # fmt: skip
