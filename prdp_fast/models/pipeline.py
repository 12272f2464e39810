"""The diffusers pipeline taken apart: a trainable U-Net, a frozen reference, and everything that stays frozen."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    SchedulerMixin,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.utils import logging as diffusers_logging
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from prdp_fast.errors import UserError
from prdp_fast.hub import hub_file
from prdp_fast.models.lora import export_adapter
from prdp_fast.models.upsampling import join_upsampling
from prdp_fast.settings import LoraSettings

TINY = Path(__file__).resolve().parent.parent / "assets" / "tiny"
SCHEDULERS: dict[str, type[SchedulerMixin]] = {"DDPMScheduler": DDPMScheduler, "DDIMScheduler": DDIMScheduler}
# The families, and what each needs; SD 1 and SD 2 differ in configurations alone.
FAMILIES: dict[str, type[DiffusionPipeline]] = {
    "StableDiffusionPipeline": StableDiffusionPipeline,
    "StableDiffusionXLPipeline": StableDiffusionXLPipeline,
}
# Images that the VAE decodes at once, and latents of all of them: 16 images of 512 pixels, whose tensors take 12 GiB in float32.
# Of the embedded model's 32 pixels more than 32 are no faster on a CPU.
DECODED, DECODED_LATENTS = 32, 16 * 64 * 64
COMPONENTS = {
    "StableDiffusionPipeline": ("unet", "vae", "scheduler", "text_encoder", "tokenizer"),
    "StableDiffusionXLPipeline": ("unet", "vae", "scheduler", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
}


def resolve(pretrained: str) -> str:
    """'tiny' is the model that ships with the package; anything else is a directory or a hub id, as diffusers reads it."""
    return str(TINY) if pretrained == "tiny" else pretrained


def find_file(pretrained: str, filename: str) -> Path:
    """A file of a pipeline directory or hub id. Raises: UserError if it is not there."""
    path, what = Path(resolve(pretrained)), f"model.pretrained {pretrained!r}"
    if (path / filename).is_file():
        return path / filename
    if path.is_dir():
        raise UserError(f"{what} has no {filename}; expected a {' or '.join(FAMILIES)} directory, as save_pretrained writes it")
    return hub_file(what, pretrained, filename, lacking="expected a diffusers pipeline, not a single checkpoint file")


def read_json(pretrained: str, filename: str) -> dict[str, Any]:
    """A configuration of a pipeline directory or hub id. Raises: UserError if it is not there or no JSON."""
    path = find_file(pretrained, filename)
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"model.pretrained {pretrained!r}: {filename} is no JSON ({error}); fetch it again") from None


def family(pretrained: str) -> str:
    """The pipeline's class, a key of FAMILIES, by its model_index.json alone.

    Raises: UserError if it is another class, or lacks a component.
    """
    index = read_json(pretrained, "model_index.json")
    name = index.get("_class_name")
    if name not in FAMILIES:
        raise UserError(
            f"model.pretrained {pretrained!r} is a {name}; expected a {' or '.join(FAMILIES)}: text-to-image models of the SD 1, "
            "SD 2 and SDXL families"
        )
    for component in COMPONENTS[name]:
        if not (index.get(component) or [None])[0]:
            raise UserError(
                f"model.pretrained {pretrained!r} has no {component} in its model_index.json, which a {name} needs; "
                "save the whole pipeline with save_pretrained"
            )
    return name


def load_scheduler(pretrained: str, wanted: str | None = None) -> SchedulerMixin:
    """The pipeline's scheduler alone: kilobytes of JSON, so that settings can be checked before weights are touched.

    Args:
        wanted: a key of SCHEDULERS, to sample with on the same noise schedule; None: the pipeline's own. One without a density
            (SD v1.4's PNDM, SDXL's Euler) becomes a DDIMScheduler, which with eta 1 takes the steps of DDPM, but for the last.
    Raises: UserError if the model is of no family, or was not trained on a schedule of betas.
    """
    family(pretrained)
    config = read_json(pretrained, "scheduler/scheduler_config.json")
    name = config.get("_class_name", "")
    scheduler_class = SCHEDULERS[wanted] if wanted else SCHEDULERS.get(name, DDIMScheduler)
    if name not in SCHEDULERS:
        if not {"beta_start", "beta_end", "beta_schedule"} <= config.keys() and not config.get("trained_betas"):
            raise UserError(
                f"model.pretrained {pretrained!r} samples with {name or 'an unnamed scheduler'}, which has no betas (flow "
                "matching or EDM); expected a model trained on a DDPM noise schedule, as SD 1, SD 2 and SDXL are"
            )
        # Samplers without these settings neither clip nor threshold; the default of those that have them would.
        config = {"clip_sample": False, "thresholding": False} | config
    try:
        return scheduler_class.from_config(config)
    except (NotImplementedError, ValueError, TypeError) as error:
        raise UserError(
            f"model.pretrained {pretrained!r}: {scheduler_class.__name__} refuses scheduler_config.json ({error}); "
            "correct it there"
        ) from None


def quiet_loading() -> None:
    """No progress bars for loading and saving, and no advice on dtypes, between the lines of a run."""
    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()
        library.set_verbosity_error()


@dataclass
class Pipeline:
    """A diffusers pipeline on one device. Only `unet` is ever trained."""

    unet: UNet2DConditionModel  # float32; ZeRO takes it over
    vae: AutoencoderKL
    scheduler: SchedulerMixin
    whole: DiffusionPipeline  # as it was loaded; its own encode_prompt makes the embeddings

    @property
    def text_encoder(self) -> CLIPTextModel:
        return self.whole.text_encoder

    @property
    def tokenizer(self) -> CLIPTokenizer:
        return self.whole.tokenizer

    @property
    def is_xl(self) -> bool:
        return isinstance(self.whole, StableDiffusionXLPipeline)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return self.unet.config.in_channels, height, width

    @cached_property
    def time_ids(self) -> list[int] | None:
        """SDXL's micro-conditioning: original size, crop, target size, as its pipeline has them by default; else None.

        Source: SDXL (arXiv:2307.01952) section 2.2.
        """
        if not self.is_xl:
            return None
        size = [side * self.whole.vae_scale_factor for side in self.latent_shape[1:]]
        return [*size, 0, 0, *size]

    @classmethod
    def load(cls, pretrained: str, device: torch.device, frozen_dtype: torch.dtype, scheduler: str | None = None) -> Pipeline:
        """Load every component.

        Args:
            frozen_dtype: of text encoders and VAE; the U-Net is loaded in float32 and cast by DeepSpeed. A VAE of SDXL that
                overflows in float16 (`force_upcast`) stays in float32, as in its pipeline.
            scheduler: as `load_scheduler` takes it.
        Raises: UserError if it is no pipeline of FAMILIES, or one that takes other inputs than theirs.
        """
        name, sampled_with = family(pretrained), load_scheduler(pretrained, scheduler)
        quiet_loading()
        # What would warn of images, or mark them.
        options: dict[str, Any] = (
            {"add_watermarker": False}
            if name == "StableDiffusionXLPipeline"
            else {"safety_checker": None, "requires_safety_checker": False}
        )
        try:
            whole = FAMILIES[name].from_pretrained(resolve(pretrained), feature_extractor=None, dtype=torch.float32, **options)
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(
                f"model.pretrained {pretrained!r} did not load as a {name}: {' '.join(str(error).split())[:300]}"
            ) from None
        unet, vae = whole.unet, whole.vae
        check_inputs(pretrained, name, unet.config, vae.config)
        text_encoders = [module for module in (whole.text_encoder, getattr(whole, "text_encoder_2", None)) if module is not None]
        for module in (vae, unet, *text_encoders):
            module.requires_grad_(False).eval()
        overflows = name == "StableDiffusionXLPipeline" and frozen_dtype == torch.float16 and vae.config.force_upcast
        if device.type == "cpu":  # where it is measured; cuDNN may like its own 3 x 3 kernels better
            join_upsampling(vae.decoder)
        # Convolutions alone: channels-last decodes a fifth faster on a CPU, and is what tensor cores want.
        vae.to(device, torch.float32 if overflows else frozen_dtype, memory_format=torch.channels_last)
        for module in text_encoders:
            module.to(device, frozen_dtype)
        return cls(unet.to(device), vae, sampled_with, whole)

    def reference_unet(self, dtype: torch.dtype) -> nn.Module:
        """A frozen copy of the U-Net as it is now, in the policy's dtype."""
        return copy.deepcopy(self.unet).to(dtype).requires_grad_(False).eval()

    @torch.no_grad()
    def decode(self, latents: torch.Tensor, batch: int | None = None) -> torch.Tensor:
        """Images of final latents.

        Args:
            latents: (N, C, H, W) float32, x_0.
            batch: images at once; None: 16 of 512 x 512 pixels, fewer of larger ones, at most 32.
        Returns: (N, 3, H, W) uint8 on the CPU, rounded exactly as diffusers rounds on its way to PIL.
        """
        if batch is None:
            batch = max(1, min(DECODED, DECODED_LATENTS // latents[0, 0].numel())) if len(latents) else 1
        images = []
        for part in latents.split(batch):
            scaled = self._unscaled(part.to(self.vae.dtype)).contiguous(memory_format=torch.channels_last)
            pixels = self.vae.decode(scaled, return_dict=False)[0]
            images.append(((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8))
        return torch.cat(images).contiguous().cpu()  # one wait for all of them

    def _unscaled(self, latents: torch.Tensor) -> torch.Tensor:
        config = self.vae.config
        mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
        if self.is_xl and mean is not None and std is not None:  # of each channel, which some models of SDXL's layout have
            mean, std = (latents.new_tensor(values).view(1, -1, 1, 1) for values in (mean, std))
            return latents * std / config.scaling_factor + mean
        return latents / config.scaling_factor

    def export(self, directory: Path, state: dict[str, torch.Tensor], lora: LoraSettings | None = None) -> None:
        """Write a directory of the pipeline's own class, or of an adapter to one, with the scheduler that it was sampled with.

        Args:
            state: the trained weights: the U-Net's, or its adapter's.
            lora: what the adapter is.
        """
        if lora is not None:
            export_adapter(directory, self.whole, lora, state)
            self.scheduler.save_pretrained(directory / "scheduler")
            return
        unet = UNet2DConditionModel.from_config(self.unet.config)
        unet.load_state_dict(state)
        components = self.whole.components | {"unet": unet, "scheduler": self.scheduler}
        options: dict[str, Any] = {"requires_safety_checker": False}
        if self.is_xl:
            empty = self.whole.config.force_zeros_for_empty_prompt
            options = {"force_zeros_for_empty_prompt": empty, "add_watermarker": False}
        type(self.whole)(**components, **options).save_pretrained(directory, safe_serialization=True)


def check_inputs(pretrained: str, name: str, unet: Any, vae: Any) -> None:
    """Raises: UserError if a U-Net of the right class takes inputs that the family's do not, by its configuration."""
    what = f"model.pretrained {pretrained!r}"
    if unet.in_channels != vae.latent_channels:
        raise UserError(
            f"{what} has a U-Net of {unet.in_channels} input channels on latents of {vae.latent_channels}; expected a "
            "text-to-image model, not one that inpaints or edits pictures"
        )
    if unet.time_cond_proj_dim is not None:
        raise UserError(
            f"{what} is told its guidance scale (unet time_cond_proj_dim {unet.time_cond_proj_dim}: distilled for a few steps); "
            "train the model that it was distilled from"
        )
    expected = "text_time" if name == "StableDiffusionXLPipeline" else None
    if unet.addition_embed_type != expected:
        raise UserError(
            f"{what} is a {name} whose U-Net has addition_embed_type {unet.addition_embed_type!r}; expected {expected!r}: "
            "model_index.json and unet/config.json are of two models"
        )
