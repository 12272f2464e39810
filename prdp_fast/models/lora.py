"""LoRA: a low-rank adapter is trained, the denoiser's own weights stay as they are.

    W x + (alpha / rank) B A x,    A normal, B zero at first

So a fresh adapter changes nothing, and the denoiser with its adapter off is the reference: no second denoiser in memory.

Source: LoRA (arXiv:2106.09685), in peft's implementation, as diffusers opens it.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prdp_fast.config.recipe import LoraSettings
from prdp_fast.core.errors import UserError
from prdp_fast.core.files import write_json
from prdp_fast.core.weight_files import write_safetensors

WEIGHTS = "pytorch_lora_weights.safetensors"  # the name that `load_lora_weights` looks for
PEFT, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"  # what `PeftModel.from_pretrained` looks for
KOHYA = "kohya.safetensors"
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")  # what diffusers calls the projections of an attention layer


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
        target_modules=list(settings.targets or ATTENTION),
        init_lora_weights="gaussian",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            denoiser.add_adapter(config)
        except ValueError as error:
            raise UserError(
                f"model.lora.targets {list(settings.targets or ATTENTION)}: {' '.join(str(error).split())[:200]}; name linear "
                "layers or convolutions of the denoiser, by the end of their names, such as to_q or to_out.0"
            ) from None


def check_targets(denoiser: nn.Module, settings: LoraSettings) -> None:
    """Raises: UserError if a target is the name of no layer; peft is content if one of them is."""
    for target in settings.targets or ATTENTION:
        if not any(name == target or name.endswith(f".{target}") for name, _ in denoiser.named_modules()):
            raise UserError(
                f"model.lora.targets: the denoiser has no layer whose name ends with {target!r}; "
                "expected names such as to_q, to_k, to_v, to_out.0, proj_in, ff.net.2"
            )


def cast_frozen(denoiser: nn.Module, dtype: torch.dtype) -> None:
    """Round what is not trained, in place, as DeepSpeed would later: so a large model is never twice in memory in float32."""
    for parameter in denoiser.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


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


def export_adapter(directory: Path, component: str, denoiser: nn.Module, state: dict[str, torch.Tensor], pretrained: str) -> None:
    """Write an adapter for every loader that people use, at one and the same scale.

        WEIGHTS                 diffusers: `pipe.load_lora_weights(directory)`
        PEFT_CONFIG, PEFT       peft: `PeftModel.from_pretrained(pipe.unet, directory)`
        KOHYA                   kohya's layout with an alpha a layer, for ComfyUI and others

    Readers of the first file may know the rank alone. So its alpha is the rank, and its B is multiplied by what was alpha / rank.
    The same adapter makes the same bytes.

    Args:
        component: what the pipeline's class calls the denoiser, unet or transformer.
        denoiser: with the adapter's layers; on the meta device is enough.
        state: the adapter's weights under the names they have in the denoiser, float32 on the CPU.
        pretrained: the model that it is for. Of a directory its name alone is written down.
    """
    from peft.utils import get_peft_model_state_dict

    layers: dict[str, torch.Tensor] = get_peft_model_state_dict(denoiser, state_dict=dict(state))
    config = plain(denoiser.peft_config["default"].to_dict())
    path = Path(pretrained)
    config |= {"base_model_name_or_path": path.resolve().name if path.is_dir() else pretrained, "inference_mode": True}
    rank, alpha = config["r"], config["lora_alpha"]

    directory.mkdir(parents=True, exist_ok=True)
    folded = {
        name: (value.double() * (alpha / rank)).float() if ".lora_B." in name and alpha != rank else value
        for name, value in layers.items()
    }
    metadata = {f"{component}.{key}": value for key, value in (config | {"lora_alpha": rank}).items()}
    write_safetensors(
        directory / WEIGHTS, {f"{component}.{name}": value for name, value in folded.items()},
        {"format": "pt", "lora_adapter_metadata": json.dumps(metadata, sort_keys=True)},
    )  # fmt: skip
    write_json(directory / PEFT_CONFIG, dict(sorted(config.items())))
    write_safetensors(directory / PEFT, {f"base_model.model.{name}": value for name, value in layers.items()}, {"format": "pt"})
    write_safetensors(
        directory / KOHYA, kohya(component, layers, alpha),
        {"format": "pt", "ss_network_module": "networks.lora", "ss_network_dim": str(rank), "ss_network_alpha": str(alpha)},
    )  # fmt: skip


def kohya(component: str, layers: dict[str, torch.Tensor], alpha: float) -> dict[str, torch.Tensor]:
    """Args: layers: by peft's names, such as down_blocks.0.attentions.0.proj_in.lora_A.weight."""
    tensors = {}
    for name, value in layers.items():
        layer, _, which = name.removesuffix(".weight").rpartition(".")
        key = f"lora_{component}_{layer.replace('.', '_')}"
        tensors[f"{key}.{'lora_down' if which == 'lora_A' else 'lora_up'}.weight"] = value
        tensors[f"{key}.alpha"] = torch.tensor(float(alpha))
    return tensors


def plain(value: Any) -> Any:
    """A configuration as JSON, in an order of its own: peft keeps sets, whose order is chance."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(plain(inner) for inner in value)
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    return value.value if isinstance(value, Enum) else value
