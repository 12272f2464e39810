"""What transformers of flow matching have in common: a T5 that reads the prompts, a VAE with a shift, a schedule of sigmas."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from diffusers import SchedulerMixin
from transformers import T5Config, T5EncoderModel

from prdp_fast.config.recipe import SamplerSettings
from prdp_fast.core.errors import UserError
from prdp_fast.core.records import TextEmbeddings
from prdp_fast.models.configs import T5Keys, read_config
from prdp_fast.models.families.base import Family, both_halves, describing
from prdp_fast.models.schedulers import load_flow_scheduler

LONGEST = 512  # tokens that the pipelines take
PATCH = 2  # pixels of a latent's side that are one token of the transformer


@dataclass(frozen=True)
class FlowTransformer(Family):
    components: ClassVar[tuple[str, ...]] = (
        "transformer", "vae", "scheduler", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2",
    )  # fmt: skip
    denoiser_component = "transformer"
    denoiser_title = "transformer"
    default_sequence: ClassVar[int]  # tokens of T5 that the pipeline's call takes where it is told nothing
    # As the pipeline's own module computes the shift of a schedule: tokens of a picture, then the scheduler's four numbers.
    shift_of: ClassVar[Callable[..., float]]
    max_shift: ClassVar[float]  # that the pipeline takes where the scheduler has none

    image_size: tuple[int, int] | None = None  # pixels, height and width; None: what the pipeline paints
    max_sequence_length: int | None = None
    embedded_guidance: float | None = None

    # Shapes.

    @property
    @abstractmethod
    def own_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a latent at the size that the pipeline paints if it is told none."""

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        if self.image_size is None:
            return self.own_shape
        height, width = (side // self.vae_scale for side in self.image_size)
        return self.own_shape[0], height, width

    @property
    def image_tokens(self) -> int:
        return (self.latent_shape[1] // PATCH) * (self.latent_shape[2] // PATCH)

    @property
    def attention_tokens(self) -> int:
        return self.image_tokens + self.text_length

    @property
    def sequence(self) -> int:
        """Tokens of T5."""
        return self.max_sequence_length or self.default_sequence

    # Settings.

    def for_sampler(self, sampler: SamplerSettings) -> Family:
        size, tokens = sampler.image_size, sampler.max_sequence_length
        side = PATCH * self.vae_scale
        if isinstance(size, int):
            size = (size, size)
        if size is not None and any(length < side or length % side for length in size):
            raise UserError(
                f"sampler.image_size is {sampler.image_size}; expected multiples of {side} pixels: a latent's pixel is "
                f"{self.vae_scale}, and the transformer's patches are {PATCH} x {PATCH} of them"
            )
        if tokens is not None and tokens > LONGEST:
            raise UserError(f"sampler.max_sequence_length is {tokens}; expected at most {LONGEST}, which its pipeline takes")
        self.check_guidance(sampler)
        family = replace(
            self, image_size=size, max_sequence_length=tokens, embedded_guidance=sampler.embedded_guidance,
            text_length=self.text_length - self.sequence + (tokens or self.default_sequence),
        )  # fmt: skip
        family.check_size()
        return family

    def check_guidance(self, sampler: SamplerSettings) -> None:
        """Raises: UserError if the model takes no guidance of such a kind."""
        if sampler.embedded_guidance is not None:
            raise UserError(
                f"sampler.embedded_guidance is {sampler.embedded_guidance:g}, but model.pretrained {self.pretrained!r} is not "
                "told its guidance (no guidance_embeds in transformer/config.json): set it null, and use sampler.guidance_scale"
            )

    def check_size(self) -> None:
        """Raises: UserError if the transformer has no positions for pictures of this size."""

    def call_options(self, sampler: SamplerSettings) -> dict[str, Any]:
        options = super().call_options(sampler)
        if self.image_size is not None:
            options |= {"height": self.image_size[0], "width": self.image_size[1]}
        if self.max_sequence_length is not None:
            options["max_sequence_length"] = self.max_sequence_length
        return options

    # The schedule.

    def scheduler(self, wanted: str | None = None) -> SchedulerMixin:
        return load_flow_scheduler(self.pretrained, wanted)

    def schedule_options(self, num_inference_steps: int) -> dict[str, Any]:
        config = self.scheduler().config
        if not config.use_dynamic_shifting:
            return {}
        wanted = (("base_image_seq_len", 256), ("max_image_seq_len", 4096), ("base_shift", 0.5), ("max_shift", self.max_shift))
        return {"mu": type(self).shift_of(self.image_tokens, *(config.get(name, default) for name, default in wanted))}

    # Texts and pictures.

    @classmethod
    def read_t5(cls, pretrained: str, component: str) -> Any:
        """On the current device, by its configuration. Raises: UserError."""
        file = f"{component}/config.json"
        _, content = read_config(pretrained, file, T5Keys)
        with describing(pretrained, file, "a T5 text encoder"):
            return T5EncoderModel(T5Config(**content))

    def check_width(self, what: str, width: int, key: str) -> None:
        """Raises: UserError if the transformer takes embeddings of another width than `what` makes."""
        if width != (takes := self.denoiser_config.get(key)):
            raise UserError(
                f"model.pretrained {self.pretrained!r} has {what} of width {width} and a transformer of {key} {takes}; their "
                "config.json are of two models"
            )

    def conditioning(self, embeddings: TextEmbeddings, *, guided: bool) -> dict[str, Any]:
        assert embeddings.pooled_prompt_embeds is not None
        negative = embeddings.negative_pooled_prompt_embeds
        return {
            "encoder_hidden_states": both_halves(embeddings.negative_prompt_embeds, embeddings.prompt_embeds, guided=guided),
            "pooled_projections": both_halves(negative, embeddings.pooled_prompt_embeds, guided=guided),
        }

    def unscaled(self, latents: torch.Tensor, vae: Any) -> torch.Tensor:
        return latents / vae.config.scaling_factor + vae.config.shift_factor

    def loading_options(self) -> dict[str, Any]:
        return dict.fromkeys(self.absent)

    def saving_options(self, whole: Any) -> dict[str, Any]:
        return {}

    def check_vae(self, vae: Any) -> None:
        """Raises: UserError if the pipeline's own arithmetic would fail with this VAE."""
        if vae.shift_factor is None:
            raise UserError(
                f"model.pretrained {self.pretrained!r}: vae/config.json has no shift_factor, which a "
                f"{self.pipeline_class.__name__} adds to its latents; expected a number: 0.0 if there is none"
            )
