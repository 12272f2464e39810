"""LoRA: a low-rank adapter is trained, the denoiser's own weights stay as they are.

    W x + (alpha / rank) B A x,    A normal, B zero at first

So a fresh adapter changes nothing, and the denoiser with its adapter off is the reference: no second denoiser in memory.

Source: LoRA (arXiv:2106.09685), in peft's implementation, as diffusers opens it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from prdp_fast.config.recipe import LoraSettings
from prdp_fast.core.errors import UserError

WEIGHTS = "pytorch_lora_weights.safetensors"  # the name that `load_lora_weights` looks for


def add_adapter(denoiser: nn.Module, settings: LoraSettings, seed: int) -> None:
    """Put an adapter into the denoiser, in place: it alone requires gradients, in the dtype and on the device of its layers.

    Args: seed: of A, drawn on the CPU: the same on every rank and device. Torch's own generator is left as it was.
    Raises: UserError if peft is missing or no layer has a name in settings.targets.
    """
    denoiser.requires_grad_(False)
    try:
        from peft import LoraConfig
    except ImportError:
        raise UserError("model.lora needs peft, which is not installed; run pip install 'prdp-fast[lora]'") from None

    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.rank if settings.alpha is None else settings.alpha,
        target_modules=list(settings.targets),
        init_lora_weights="gaussian",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            denoiser.add_adapter(config)
        except ValueError as error:
            raise UserError(
                f"model.lora.targets {list(settings.targets)}: {' '.join(str(error).split())[:200]}; name linear layers or "
                "convolutions of the U-Net, by the end of their names, such as to_q or to_out.0"
            ) from None


def check_targets(denoiser: nn.Module, settings: LoraSettings) -> None:
    """Raises: UserError if a target is the name of no layer; peft is content if one of them is."""
    for target in settings.targets:
        if not any(name == target or name.endswith(f".{target}") for name, _ in denoiser.named_modules()):
            raise UserError(
                f"model.lora.targets: the U-Net has no layer whose name ends with {target!r}; "
                "expected names such as to_q, to_k, to_v, to_out.0, proj_in, ff.net.2"
            )


def trained_parameters(denoiser: nn.Module) -> list[nn.Parameter]:
    """What an update moves: what requires gradients, and everything if nothing does."""
    parameters = list(denoiser.parameters())
    return [parameter for parameter in parameters if parameter.requires_grad] or parameters


def has_adapter(denoiser: nn.Module) -> bool:
    return any(True for _ in _layers(denoiser))


@contextlib.contextmanager
def adapter_off(denoiser: nn.Module) -> Iterator[nn.Module]:
    """Inside, the denoiser computes as it did before it was given an adapter.

    peft's own switch also turns `requires_grad` off and on, which is ZeRO's to mind.
    """
    layers = list(_layers(denoiser))
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield denoiser
    finally:
        for layer in layers:
            layer._disable_adapters = False


def _layers(denoiser: nn.Module) -> Iterator[Any]:
    return (module for module in denoiser.modules() if hasattr(module, "lora_A"))


def export_adapter(
    directory: Path, whole: DiffusionPipeline, component: str, denoiser: nn.Module, state: dict[str, torch.Tensor]
) -> None:
    """Write what `load_lora_weights(directory)` of a pipeline of the same class opens.

    Args:
        whole: the pipeline that was trained.
        component: what its class calls the denoiser, denoiser or transformer.
        denoiser: with the adapter's layers; on the meta device is enough.
        state: the adapter's weights under the names they have in the denoiser, float32.
    """
    from peft.utils import get_peft_model_state_dict

    layers = get_peft_model_state_dict(denoiser, state_dict=dict(state))
    own = {
        f"{component}_lora_layers": layers,
        # alpha, which is taken for the rank without it
        f"{component}_lora_adapter_metadata": denoiser.peft_config["default"].to_dict(),
    }
    type(whole).save_lora_weights(directory, weight_name=WEIGHTS, safe_serialization=True, **own)
