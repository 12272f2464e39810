"""The diffusers pipeline taken apart: the denoiser that is trained, and everything that stays frozen."""

from __future__ import annotations

import copy
import errno
import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, SchedulerMixin
from safetensors import SafetensorError
from torch import nn

from prdp_fast.core.errors import UserError
from prdp_fast.core.files import naming
from prdp_fast.core.memory import smaller_on_oom
from prdp_fast.core.records import TextEmbeddings
from prdp_fast.models.configs import read_json
from prdp_fast.models.families import read_family
from prdp_fast.models.families.base import Family
from prdp_fast.models.files import INDEX, quiet_loading, resolve
from prdp_fast.models.finite import first_nonfinite, wider
from prdp_fast.models.lora import export_adapter
from prdp_fast.models.tokenizers import check_tokenizers
from prdp_fast.models.upsampling import join_upsampling
from prdp_fast.models.weights import check_weights, find_weights

# Images that the VAE decodes at once, and latents of all of them: 16 images of 512 pixels, whose tensors take 12 GiB in float32.
# Of the embedded model's 32 pixels more than 32 are no faster on a CPU.
DECODED, DECODED_LATENTS = 32, 16 * 64 * 64
LIBRARIES = ("diffusers", "transformers")  # whose networks are loaded


@dataclass
class Pipeline:
    """A model's weights on one device. Only `denoiser` is ever trained."""

    family: Family
    denoiser: nn.Module  # float32; DeepSpeed takes it over
    vae: AutoencoderKL
    scheduler: SchedulerMixin
    whole: DiffusionPipeline  # as it was loaded; its own encode_prompt makes the embeddings
    source: Path | None = None  # the directory that it was loaded from
    decoded: int | None = None  # images that were decoded at once, where the memory was too small for more

    @classmethod
    def load(
        cls, model: str | Family, device: torch.device, frozen_dtype: torch.dtype, scheduler: str | None = None, *,
        texts: bool = True,
    ) -> Pipeline:  # fmt: skip
        """Load every component.

        Args:
            model: a family that was read, or what `read_family` reads.
            frozen_dtype: of text encoders and VAE; the denoiser is loaded in float32 and cast by DeepSpeed. A VAE that
                overflows in float16 stays in float32, as in its pipeline.
            scheduler: the class to sample with, as `Family.scheduler` takes it.
            texts: False leaves the text encoders where they lie: their embeddings are stored.
        Raises: UserError if it is no pipeline of a known family, one that takes other inputs than its family's, or one with a
            weight that is not finite.
        """
        family = read_family(model) if isinstance(model, str) else model
        sampled_with = family.scheduler(scheduler)
        quiet_loading()
        directory = fetch(family)
        left_out = () if texts else tuple(name for name in family.networks() if name.startswith("text_encoder"))
        networks = {name: None if name in left_out else load_network(family, directory, name) for name in family.networks()}
        try:
            whole = family.pipeline_class.from_pretrained(
                directory, feature_extractor=None, dtype=torch.float32, **networks, **family.loading_options()
            )
        except Exception as error:  # of tokenizers and settings: diffusers and transformers raise all kinds
            raise UserError(does_not_load(family, f"a {family.pipeline_class.__name__}", error)) from None
        denoiser, vae = getattr(whole, family.denoiser_component), whole.vae
        family.check(denoiser.config, vae.config)
        pipeline = cls(family, denoiser, vae, sampled_with, whole, directory)
        for module in (vae, denoiser, *pipeline.text_encoders.values()):
            module.requires_grad_(False).eval()
        if device.type == "cpu":  # where it is measured; cuDNN may like its own 3 x 3 kernels better
            join_upsampling(vae.decoder)
        vae_dtype = torch.float32 if family.keeps_float32_vae(vae, frozen_dtype) else frozen_dtype
        # Convolutions alone: channels-last decodes a fifth faster on a CPU, and is what tensor cores want.
        vae.to(device, vae_dtype, memory_format=torch.channels_last)
        denoiser.to(device)
        for module in pipeline.text_encoders.values():
            cast(module.to(device), frozen_dtype)
        check_tokenizers(family, whole, directory)
        pipeline.check_weights()
        return pipeline

    def check_weights(self) -> None:
        """Raises: UserError naming the first weight that is NaN or infinite."""
        fault = first_nonfinite({self.family.denoiser_component: self.denoiser, "vae": self.vae} | self.text_encoders)
        if fault is not None:
            mend = f"fetch the model again, or {wider(torch.float16)}" if "(torch.float16)" in fault else "fetch the model again"
            raise UserError(f"model.pretrained {self.family.pretrained!r}: {fault}; expected finite weights: {mend}")

    @property
    def text_encoders(self) -> dict[str, nn.Module]:
        """By component."""
        components = self.whole.components.items()
        return {name: module for name, module in components if name.startswith("text_encoder") and module is not None}

    def release_text_encoders(self) -> None:
        """Free their memory, once every embedding is there. An export reads them again."""
        for name in self.text_encoders:
            setattr(self.whole, name, None)

    def explain(self, denoiser: nn.Module, embeddings: TextEmbeddings, *, latents: bool, trained: bool = False) -> str:
        """Why latents or pictures may not be finite, and what to do. It waits for the device: called when it is so.

        Args:
            denoiser: that made them, its weights whole.
            latents: whether it is the latents; else only the pictures are not finite.
            trained: whether updates have changed the denoiser.
        """
        if latents and not all(value.isfinite().all() for value in embeddings if value is not None):
            dtype = embeddings.prompt_embeds.dtype
            fault = first_nonfinite(self.text_encoders)
            if fault is not None:
                return f"{fault}: fetch the model again"
            return f"the text embeddings are not finite in {dtype}: {wider(dtype)}; if they are stored, run 'prdp embed' again"
        name, network = (self.family.denoiser_component, denoiser) if latents else ("vae", self.vae)
        fault = first_nonfinite({name: network})
        if fault is not None and latents and trained:
            return f"{fault}: training has driven it out of range; lower optimizer.learning_rate"
        if fault is not None:
            return f"{fault}: fetch the model again"
        dtype = next((value.dtype for value in network.parameters()), torch.float32)
        return f"every weight of the {name} is finite, so what it computes has left the range of {dtype}: {wider(dtype)}"

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.family.latent_shape

    def frozen_denoiser(self, dtype: torch.dtype) -> nn.Module:
        """A frozen copy of the denoiser as it is now: the reference of a run."""
        return copy.deepcopy(self.denoiser).to(dtype).requires_grad_(False).eval()

    def decode(self, latents: torch.Tensor, batch: int | None = None) -> torch.Tensor:
        """The images of `decode_checked` alone."""
        return self.decode_checked(latents, batch)[0]

    @torch.no_grad()
    def decode_checked(
        self, latents: torch.Tensor, batch: int | None = None, say: Callable[[str], None] = print
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Images of final latents.

        Args:
            latents: (N, C, H, W) float32, x_0.
            batch: images at once, fewer if the memory is too small; None: 16 of 512 x 512 pixels, fewer of larger ones, at most
                32.
            say: tells the user that the memory was.
        Returns: (N, 3, H, W) uint8 on the CPU, rounded exactly as diffusers rounds on its way to PIL; (N,) bool on the CPU, False
            for a picture with NaN or infinity, which is black.
        """
        if batch is None:
            batch = max(1, min(DECODED, DECODED_LATENTS // latents[0, 0].numel())) if len(latents) else 1

        def attempt(size: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
            images, peaks = [], []
            for part in latents.split(size):
                scaled = self.family.unscaled(part.to(self.vae.dtype), self.vae).contiguous(memory_format=torch.channels_last)
                pixels = self.vae.decode(scaled, return_dict=False)[0].float()
                peaks.append(torch.linalg.vector_norm(pixels, math.inf, dim=(1, 2, 3)))
                images.append(((pixels / 2 + 0.5).clamp(0, 1).nan_to_num(0) * 255).round().to(torch.uint8))
            return images, peaks

        most = max(1, min(batch, self.decoded or batch, len(latents)))
        (images, peaks), size = smaller_on_oom(
            attempt, most, phase="decoding", say=say, advice="use a GPU with more memory, or fewer ranks on it"
        )
        if size < most:
            self.decoded = size
        # One wait for all of them.
        return torch.cat(images).contiguous().cpu(), torch.cat(peaks).isfinite().cpu()

    def export(self, directory: Path, state: dict[str, torch.Tensor]) -> list[str]:
        """Write a directory of the pipeline's own class, or of an adapter to one, with the scheduler that it was sampled with.

        Every network of it is float32, and so opens in any one dtype. What was not trained is to the bit what was loaded.

        Args: state: the trained weights: the denoiser's, or its adapter's.
        Returns: what the user should know, a line each.
        Raises: OSError.
        """
        try:
            with naming(directory):
                return self._export(directory, state)
        except SafetensorError as error:  # what safetensors makes of a full disk
            raise OSError(errno.EIO, " ".join(str(error).split())[:160], str(directory)) from error

    def _export(self, directory: Path, state: dict[str, torch.Tensor]) -> list[str]:
        family = self.family
        if family.lora is not None:
            write_adapter(directory, family, self.scheduler, state)
            return []
        denoiser = family.denoiser_class.from_config(self.denoiser.config)
        denoiser.load_state_dict(state)
        frozen, notes = self.frozen_networks()
        components = self.whole.components | frozen | {family.denoiser_component: denoiser, "scheduler": self.scheduler}
        options = family.saving_options(self.whole)
        type(self.whole)(**components, **options).save_pretrained(directory, safe_serialization=True)
        return notes

    def frozen_networks(self) -> tuple[dict[str, nn.Module], list[str]]:
        """VAE and text encoders in float32 as they were loaded, where the ones in memory are rounded: read again, on the CPU.

        Returns: them by component, and a line for each whose file is no longer what was loaded; that is the rounded one.
        """
        networks: dict[str, nn.Module] = {}
        notes = []
        for name in self.family.networks():
            own = getattr(self.whole, name)
            if name == self.family.denoiser_component:
                continue
            if own is not None and {value.dtype for value in own.parameters()} <= {torch.float32}:
                continue
            try:
                if self.source is None:
                    raise UserError("it was loaded from no directory")
                again = load_network(self.family, self.source, name)
                changed = own is not None and not rounds_to(again, own)
                reason = f"{self.source / name} has other weights than when the run started" if changed else None
            except UserError as error:
                reason = str(error)
            if own is None and reason is not None:
                notes.append(f"warning: the exported pipeline is without its {name}: {reason}")
                continue
            if reason is not None:
                again = copy.deepcopy(own).to("cpu", torch.float32)
                notes.append(f"warning: the exported {name} is rounded to {own.dtype}, as it was used: {reason}")
            networks[name] = again.requires_grad_(False).eval()
        return networks, notes


def write_adapter(directory: Path, family: Family, scheduler: SchedulerMixin, state: dict[str, torch.Tensor]) -> None:
    """An adapter for every loader, with the scheduler that it was sampled with. No weight of the base is needed.

    Args: state: the adapter's weights by their names in the denoiser, float32 on the CPU.
    """
    export_adapter(directory, family.denoiser_component, family.meta_denoiser(), state, family.pretrained)
    scheduler.save_pretrained(directory / "scheduler")


def cast(encoder: nn.Module, dtype: torch.dtype) -> None:
    """In place, but for the layers that transformers keeps in float32 beside float16, which would overflow."""
    encoder.to(dtype)
    kept = (getattr(encoder, "_keep_in_fp32_modules", None) or ()) if dtype == torch.float16 else ()
    for name, module in encoder.named_modules():
        if name.rpartition(".")[2] in kept:
            module.float()


def rounds_to(network: nn.Module, rounded: nn.Module) -> bool:
    """Whether casting the one gives the other."""
    own = network.state_dict()
    return own.keys() == rounded.state_dict().keys() and all(
        torch.equal(own[name].to(value.dtype), value.cpu()) for name, value in rounded.state_dict().items()
    )


def fetch(family: Family) -> Path:
    """The directory of a model, from the hub if it is none. Raises: UserError if the hub does not give it."""
    pretrained = resolve(family.pretrained)
    if Path(pretrained).is_dir():
        return Path(pretrained)
    leave_out = {"feature_extractor": None, **family.loading_options()}
    error: Exception | None = None
    for variant in (None, "fp16"):  # some repositories have nothing but the variant
        try:
            directory = Path(family.pipeline_class.download(pretrained, variant=variant, **leave_out))
        except Exception as fault:  # of the hub, the network, the disk
            error = error or fault
            continue
        if all(find_weights(directory / name) for name in family.networks()):
            return directory
    if error is not None:
        raise UserError(does_not_load(family, f"a {family.pipeline_class.__name__}", error))
    return directory  # and `load_network` says what is missing


def load_network(family: Family, directory: Path, name: str) -> nn.Module:
    """One component of a pipeline, in float32 on the CPU. Raises: UserError if its files are not that component's."""
    library, class_name = read_json(str(directory), INDEX)[name]
    weights = check_weights(family.pretrained, directory, name)
    if weights is None:
        raise UserError(
            f"model.pretrained {family.pretrained!r} has no weights of its {name}; expected {directory / name}/*.safetensors; "
            "fetch them, or save the whole pipeline with save_pretrained"
        )
    network_class: Any = getattr(importlib.import_module(library), class_name, None) if library in LIBRARIES else None
    if not hasattr(network_class, "from_pretrained"):
        raise UserError(
            f"model.pretrained {family.pretrained!r}: {INDEX}: {name} is {library}.{class_name}; expected a network of "
            f"{' or '.join(LIBRARIES)}"
        )
    try:
        network, found = network_class.from_pretrained(
            directory, subfolder=name, dtype=torch.float32, variant=weights.variant, output_loading_info=True
        )
    except Exception as error:  # diffusers, transformers and safetensors raise all kinds
        raise UserError(does_not_load(family, f"{name}, a {class_name}", error)) from None
    # What is left over elsewhere is often harmless: a head, a table of positions. A block too many is another model's.
    more = [key for key in found["unexpected_keys"] if "block" in key]
    for verb, keys in (("lacks", sorted(found["missing_keys"])), ("has further layers,", sorted(more))):
        if keys:
            some = ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
            raise UserError(
                f"model.pretrained {family.pretrained!r}: {weights.files[0]} {verb} {some}; expected the {class_name} that its "
                "config.json describes; fetch both again"
            )
    return network


def does_not_load(family: Family, what: str, error: Exception) -> str:
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    return f"model.pretrained {family.pretrained!r} did not load as {what}: {reason}"
