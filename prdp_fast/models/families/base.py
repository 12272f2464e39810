"""What the engine asks of a model. One subclass of `Family` per pipeline class of diffusers, one file each.

A family knows its model from configurations alone: kilobytes of JSON, no weights. `Pipeline` loads the weights through it. A new
model brings, in a file beside this one:

    pipeline_class, title             which diffusers pipeline it is, and what people call its models
    components, optional              what that must have, and what it may go without
    denoiser_component, denoiser_class, denoiser_title, repeated_blocks
                                      the network that is trained
    latent_shape, attention_tokens, denoiser_inputs
                                      the shapes of one call, for counting, probing and planning
    conditioning, predict             how the network is called on N latents and their prompts
    encode                            texts to embeddings
    shared_conditioning, unscaled, keeps_float32_vae
                                      what else a pipeline does before the denoiser and after it, where it does
    scheduler, schedule_options       the noise schedule, from which `Transitions` makes the table of steps
    for_sampler, call_options         the recipe's settings that only some models have, and the same for the pipeline's own call
    denoiser_keys, t5_encoders, text_encoders, check_text_encoders
                                      what its configurations must say
    lora_targets                      the layers that an adapter is given where the recipe names none
    loading_options, saving_options   of `from_pretrained` and of the pipeline that is exported
    check                             refuses a model of the right class that takes other inputs

and its line in `FAMILIES`. Everything else follows: counting FLOP and bytes, LoRA, compilation, export, evaluation.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, SchedulerMixin
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from prdp_fast.config.recipe import LoraSettings, SamplerSettings
from prdp_fast.core.errors import UserError
from prdp_fast.core.records import TextEmbeddings
from prdp_fast.models.configs import (
    ReadConfig,
    TextConfig,
    TokenizerConfig,
    VaeConfig,
    check_arguments,
    read_config,
    read_json,
)
from prdp_fast.models.files import INDEX, quiet_loading, resolve
from prdp_fast.models.lora import ATTENTION, add_adapter, check_targets
from prdp_fast.models.schedulers import load_beta_scheduler
from prdp_fast.models.weights import check_weights

UNLIMITED = 1e20  # tokens; transformers writes 1e30 where there is no limit


@contextlib.contextmanager
def describing(pretrained: str, filename: str, what: str) -> Iterator[None]:
    """Inside, a configuration is tried: whatever diffusers, transformers and torch raise is the configuration's fault."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # they raise all kinds, by the value that is wrong
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"model.pretrained {pretrained!r}: {filename} does not describe {what}: {type(error).__name__}: {reason}; correct it "
            "there, or fetch it again"
        ) from None


@dataclass(frozen=True)
class Family(ABC):
    """A model by its configurations. `read_family` makes one from a directory or hub id; tests and benchmarks from a dict."""

    pipeline_class: ClassVar[type[DiffusionPipeline]]
    title: ClassVar[str]  # what people call its models
    components: ClassVar[tuple[str, ...]]  # keys of model_index.json that name something
    optional: ClassVar[tuple[str, ...]] = ()  # those of them that may be null
    t5_encoders: ClassVar[tuple[str, ...]] = ()  # the text encoders that are T5's; the others are CLIP's
    denoiser_component: ClassVar[str]  # the key of the network that is trained
    denoiser_class: ClassVar[type[nn.Module]]
    denoiser_title: ClassVar[str]  # what users call it
    denoiser_keys: ClassVar[type[ReadConfig]]  # what is read of its configuration by name
    # Class names of its repeated blocks, which are compiled one by one; their first argument has the rows in front.
    repeated_blocks: ClassVar[tuple[str, ...]]
    hub_tag: ClassVar[str]  # as the hub's own models are tagged
    lora_targets: ClassVar[tuple[str, ...]] = ATTENTION  # by the end of their names, where the recipe leaves it open

    denoiser_config: dict[str, Any]
    text_length: int  # tokens of a prompt, padded
    vae_parameters: int = 0
    text_parameters: int = 0
    lora: LoraSettings | None = None  # the adapter that the denoiser is given
    pretrained: str = ""  # directory or hub id
    notes: tuple[str, ...] = ()  # what the user should know of it, a line each
    absent: tuple[str, ...] = ()  # the optional components that it goes without
    vae_scale: int = 8  # pixels of a picture's side for one of a latent's

    # From configurations.

    @classmethod
    def read(cls, pretrained: str, lora: LoraSettings | None = None) -> Family:
        """Read the configurations of a pipeline directory or hub id, and look at the files of weights in a directory.

        Weights may be missing: a job can be planned without them.

        Raises: UserError if a configuration is missing or describes no such model, or a file of weights is damaged.
        """
        quiet_loading()
        file = f"{cls.denoiser_component}/config.json"
        _, denoiser_config = read_config(pretrained, file, cls.denoiser_keys)
        check_arguments(pretrained, file, denoiser_config, cls.denoiser_class)
        _, vae_config = read_config(pretrained, "vae/config.json", VaeConfig)
        check_arguments(pretrained, "vae/config.json", vae_config, AutoencoderKL)
        absent = cls.find_absent(pretrained)
        with torch.device("meta"):
            with describing(pretrained, "vae/config.json", "a VAE"):
                vae = AutoencoderKL.from_config(vae_config)
            text_length, text_encoders = cls.text_encoders(pretrained, absent)
        present = tuple(name for name in cls.components if name not in absent)
        notes = (*cls.tokenizer_notes(pretrained, present), *cls.weight_notes(pretrained, networks_of(present)))
        if lora is not None and lora.targets is None:
            lora = lora.model_copy(update={"targets": list(cls.lora_targets)})
        family = cls(
            denoiser_config, text_length, count_parameters(vae), sum(map(count_parameters, text_encoders)), lora, pretrained,
            notes, absent, 2 ** (len(vae.config.block_out_channels) - 1),
        )  # fmt: skip
        with torch.device("meta"), describing(pretrained, file, f"a {cls.denoiser_title}"):
            denoiser = cls.denoiser_class.from_config(denoiser_config)
        family.check(denoiser.config, vae.config)
        family.check_text_encoders(text_encoders)
        with torch.device("meta"), describing(pretrained, file, f"a {cls.denoiser_title}, which was called without its weights"):
            denoiser(**family.denoiser_inputs(1, "meta"))
        with torch.device("meta"), describing(pretrained, "vae/config.json", "a VAE, which was called without its weights"):
            vae.decode(torch.zeros(1, *family.latent_shape))
        return family

    @classmethod
    def find_absent(cls, pretrained: str) -> tuple[str, ...]:
        """The optional components that are null in model_index.json: a text encoder and its tokenizer go together.

        Raises: UserError if there is an encoder without its tokenizer.
        """
        index = read_json(pretrained, INDEX) if cls.optional else {}
        null = [name for name in cls.optional if index.get(name) in (None, [None, None])]
        for name in cls.optional:
            encoder = name.replace("tokenizer", "text_encoder")
            if name in null and encoder not in null:
                raise UserError(
                    f"model.pretrained {pretrained!r} has a {encoder} and no {name} in its {INDEX}; save the whole pipeline with "
                    "save_pretrained, or without both"
                )
        return tuple(name for name in cls.optional if name.replace("tokenizer", "text_encoder") in null)

    def networks(self) -> tuple[str, ...]:
        """The components that have weights."""
        return networks_of(name for name in self.components if name not in self.absent)

    @classmethod
    def weight_notes(cls, pretrained: str, networks: Iterable[str]) -> list[str]:
        """Look at the files of weights. Raises: UserError if one is damaged."""
        directory = Path(resolve(pretrained))
        found = {name: check_weights(pretrained, directory, name) for name in networks} if directory.is_dir() else {}
        notes = []
        if variants := [f"{name} ({weights.variant})" for name, weights in found.items() if weights and weights.variant]:
            words = ", ".join(variants)
            notes.append(f"model.pretrained {pretrained!r} has nothing but a variant of the weights of {words}, which is loaded")
        for name, weights in found.items():
            # Cut short by its configuration, which is called clip skip.
            if weights and name.startswith("text_encoder") and name not in cls.t5_encoders:
                takes, holds = read_config(pretrained, f"{name}/config.json", TextConfig)[0].num_hidden_layers, weights.layers()
                if holds > takes:
                    notes.append(f"model.pretrained {pretrained!r}: {name} uses {takes} of the {holds} layers in its files")
        return notes

    @classmethod
    def tokenizer_notes(cls, pretrained: str, components: Iterable[str]) -> list[str]:
        """Read the tokenizers' lengths. Raises: UserError if one is no length."""
        notes = []
        for name in components:
            if not name.startswith("tokenizer"):
                continue
            encoder = name.replace("tokenizer", "text_encoder")
            if encoder in cls.t5_encoders:  # has no longest prompt of its own
                read_config(pretrained, f"{name}/tokenizer_config.json", TokenizerConfig)
                continue
            takes = read_config(pretrained, f"{encoder}/config.json", TextConfig)[0].max_position_embeddings
            length = read_config(pretrained, f"{name}/tokenizer_config.json", TokenizerConfig)[0].model_max_length
            if length is None or length > takes:
                has = f"has model_max_length {length:.0f}" if length and length < UNLIMITED else "has no model_max_length"
                notes.append(
                    f"model.pretrained {pretrained!r}: {name} {has}; its prompts are cut at the {takes} tokens of {encoder}"
                )
        return notes

    @classmethod
    @abstractmethod
    def text_encoders(cls, pretrained: str, absent: Collection[str] = ()) -> tuple[int, list[Any]]:
        """Tokens of a prompt, and the text encoders on the current device, by their configurations. Raises: UserError."""

    @abstractmethod
    def check_text_encoders(self, text_encoders: list[Any]) -> None:
        """Raises: UserError if the denoiser takes embeddings of another width."""

    @property
    @abstractmethod
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a latent, at the size the model was trained for."""

    @property
    def attention_tokens(self) -> int:
        """Of the largest attention: pixels of a latent, or patches and words."""
        return self.latent_shape[1] * self.latent_shape[2]

    @abstractmethod
    def denoiser_inputs(self, rows: int, device: torch.device | str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """Arguments of one call of the denoiser, zeros: `denoiser(**inputs)`; the latents first, the timesteps second."""

    def for_sampler(self, sampler: SamplerSettings) -> Family:
        """The model as a recipe or a command line samples from it. Raises: UserError for a setting that it does not have."""
        for name in ("embedded_guidance", "image_size", "max_sequence_length"):
            if (value := getattr(sampler, name)) is not None:
                raise UserError(
                    f"sampler.{name} is {value}, which model.pretrained {self.pretrained!r}, a {self.pipeline_class.__name__}, "
                    "does not have; set it null"
                )
        return self

    def call_options(self, sampler: SamplerSettings) -> dict[str, Any]:
        """Arguments of the pipeline's own call beside the prompt that sample as the recipe does, for the model card."""
        return {"num_inference_steps": sampler.num_inference_steps, "guidance_scale": sampler.guidance_scale or 1.0}

    def scheduler(self, wanted: str | None = None) -> SchedulerMixin:
        """The scheduler to sample with: `wanted`, or the model's own. Raises: UserError if the model has none that serves."""
        return load_beta_scheduler(self.pretrained, wanted)

    def schedule_options(self, num_inference_steps: int) -> dict[str, Any]:
        """What the pipeline gives to the scheduler's `set_timesteps` beside the number of steps: `mu`, `sigmas`."""
        return {}

    @cached_property
    def denoiser_parameters(self) -> int:
        """The adapter's included."""
        return count_parameters(self.counted_denoiser)

    @cached_property
    def denoiser_buffers(self) -> int:
        """Numbers that it holds beside its weights, tables of positions say."""
        return sum(buffer.numel() for buffer in self.counted_denoiser.buffers())

    @cached_property
    def trained_parameters(self) -> int:
        """The adapter's, or all."""
        return sum(parameter.numel() for parameter in self.counted_denoiser.parameters() if parameter.requires_grad)

    @cached_property
    def counted_denoiser(self) -> nn.Module:
        """A `meta_denoiser` for counting, made once: building SDXL's takes seconds."""
        return self.meta_denoiser().eval()

    def meta_denoiser(self) -> nn.Module:
        """Shapes without memory, on torch's meta device. With the adapter, if there is one; what is trained requires gradients.

        Raises: UserError if the adapter does not fit.
        """
        with torch.device("meta"):
            denoiser = self.denoiser_class.from_config(self.denoiser_config)
            if self.lora is not None:
                check_targets(denoiser, self.lora)
                add_adapter(denoiser, self.lora, seed=0)
            return denoiser

    @contextlib.contextmanager
    def fake_denoiser(self, dtype: torch.dtype) -> Iterator[nn.Module]:
        """Fake tensors of a CPU, for which torch chooses the kernels of real ones. Inside the block every new tensor is one."""
        denoiser = self.meta_denoiser()
        with FakeTensorMode():
            for module in denoiser.modules():  # a module of fake tensors can neither be cast nor moved
                for name, buffer in module.named_buffers(recurse=False):
                    kept = buffer.dtype if not buffer.is_floating_point() else dtype
                    setattr(module, name, torch.empty(buffer.shape, dtype=kept, device="cpu"))
                for name, parameter in module.named_parameters(recurse=False):
                    fake = torch.empty(parameter.shape, dtype=dtype, device="cpu")
                    setattr(module, name, nn.Parameter(fake, requires_grad=parameter.requires_grad))
            yield denoiser

    # Calling the denoiser.

    @abstractmethod
    def conditioning(self, embeddings: TextEmbeddings, *, guided: bool) -> dict[str, Any]:
        """What the denoiser is told of N prompts: (2N, ...), the empty prompt's half first, or (N, ...) if not guided."""

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
        """The denoiser's raw output.

        Args:
            latents: (N, C, H, W) float32; cast to the denoiser's dtype at its door.
            timesteps: (N,) the scheduler's timesteps: int64, or of a flow-matching model float32.
            embeddings: N rows.
            guided: every row is, or none.
            shared: the denoiser takes the latents and timesteps of a guided call once, for both of its halves.
        Returns: (2N, C, H, W) unconditional half first, or (N, C, H, W) if not guided; the denoiser's dtype.
        """
        model_input = latents.to(embeddings.prompt_embeds.dtype)
        if guided and not shared:
            model_input = torch.cat([model_input, model_input])
            timesteps = torch.cat([timesteps, timesteps])
        # Latents by position, all else by name: so do the probes, or what is compiled for the one would not serve the other.
        told = self.conditioning(embeddings, guided=guided)
        return denoiser(model_input, timestep=timesteps, **told, return_dict=False)[0]

    # With weights: what `Pipeline` asks.

    @abstractmethod
    def encode(self, whole: Any, texts: list[str], *, negative: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Embeddings and pooled embeddings (or None) by the pipeline's own `encode_prompt`.

        Args: negative: not of the texts, but of a guided call's negative prompt where none is given.
        """

    def shared_conditioning(self, whole: Any, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Further fields of `TextEmbeddings` that do not depend on the prompt."""
        return {}

    def unscaled(self, latents: torch.Tensor, vae: Any) -> torch.Tensor:
        """Final latents as the VAE decodes them."""
        return latents / vae.config.scaling_factor

    def keeps_float32_vae(self, vae: Any, dtype: torch.dtype) -> bool:
        """Whether the VAE would overflow in `dtype`."""
        return False

    @abstractmethod
    def loading_options(self) -> dict[str, Any]:
        """Of `pipeline_class.from_pretrained`: no warnings of pictures, no watermark."""

    @abstractmethod
    def saving_options(self, whole: Any) -> dict[str, Any]:
        """Of `pipeline_class(**components, **options)`, which is then saved."""

    def check(self, denoiser: Any, vae: Any) -> None:
        """Args: denoiser, vae: configurations of the loaded modules.

        Raises: UserError if a denoiser of the right class takes inputs that the family's do not.
        """
        if denoiser.in_channels != vae.latent_channels:
            raise UserError(
                f"model.pretrained {self.pretrained!r} has a {self.denoiser_title} of {denoiser.in_channels} input channels on "
                f"latents of {vae.latent_channels}; expected a text-to-image model, not one that inpaints or edits pictures"
            )


def both_halves(negative: torch.Tensor | None, own: torch.Tensor, *, guided: bool) -> torch.Tensor:
    """(2N, ...) with the empty prompt's half first, or `own` (N, ...) if not guided. negative: (1, ...), broadcast to N rows."""
    if not guided:
        return own
    assert negative is not None
    return torch.cat([negative.expand_as(own), own])


def networks_of(components: Iterable[str]) -> tuple[str, ...]:
    return tuple(name for name in components if name != "scheduler" and not name.startswith("tokenizer"))


def count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
