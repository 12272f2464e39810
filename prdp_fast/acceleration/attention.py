"""Attention kernels of a denoiser, through diffusers' own dispatcher.

`UNet2DConditionModel.set_attention_backend` does nothing by itself: its layers are diffusers' older `Attention`, whose processor
calls torch's scaled_dot_product_attention and knows no backend; so do the joint layers of some transformers. The processors here
are the same arithmetic, sent through the dispatcher; `sdpa` leaves diffusers' own processor where it was. Its newer layers go
through the dispatcher by themselves, and are told the kernel.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, JointAttnProcessor2_0
from torch import nn

# Our names and the dispatcher's. Several kernels can answer to one name; the first that works does.
BACKENDS: dict[str, tuple[str, ...]] = {
    "sdpa": ("native",),
    "math": ("_native_math",),
    "efficient": ("_native_efficient",),
    "flash": ("flash", "_native_flash"),
    "cudnn": ("_native_cudnn",),
    "xformers": ("xformers",),
}
FUSED = ("to_qkv", "to_kv")  # the names diffusers gives the fused projections


class DispatchedAttention(AttnProcessor2_0):
    """`AttnProcessor2_0` with a choice of kernel, and with one product for q, k and v where the layer has been fused."""

    _attention_backend: AttentionBackendName | None = None  # the attribute that `set_attention_backend` sets

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        if attention_mask is not None or hidden_states.ndim != 3 or not is_plain(attn):
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **kwargs)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if getattr(attn, "fused_projections", False) and hasattr(attn, "to_qkv"):
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        elif getattr(attn, "fused_projections", False) and hasattr(attn, "to_kv"):
            query, (key, value) = attn.to_q(hidden_states), attn.to_kv(context).chunk(2, dim=-1)
        elif self._attention_backend == AttentionBackendName._NATIVE_MATH:
            query, key, value = joined_projections(attn, hidden_states, encoder_hidden_states)
        else:
            query, key, value = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        query, key, value = (x.unflatten(-1, (attn.heads, -1)) for x in (query, key, value))
        # (rows, tokens, heads, head size), in and out: the dispatcher's layout
        if self._attention_backend == AttentionBackendName._NATIVE_MATH:
            result = plain_attention(query, key, value)
        else:
            result = dispatch_attention_fn(query, key, value, backend=self._attention_backend)
        result = attn.to_out[1](attn.to_out[0](result.flatten(-2).to(query.dtype)))
        if attn.residual_connection:
            result = result + hidden_states
        return result / attn.rescale_output_factor


class DispatchedJointAttention(JointAttnProcessor2_0):
    """`JointAttnProcessor2_0`, pixels and words in one attention, with a choice of kernel."""

    _attention_backend: AttentionBackendName | None = None

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        joint = self.projections(attn, hidden_states, ("to_q", "to_k", "to_v"), (attn.norm_q, attn.norm_k, None))
        if encoder_hidden_states is not None:
            words = self.projections(
                attn, encoder_hidden_states, ("add_q_proj", "add_k_proj", "add_v_proj"),
                (attn.norm_added_q, attn.norm_added_k, None),
            )  # fmt: skip
            joint = [torch.cat(pair, dim=1) for pair in zip(joint, words, strict=True)]
        query, key, value = joint
        if self._attention_backend == AttentionBackendName._NATIVE_MATH:
            result = plain_attention(query, key, value)
        else:
            result = dispatch_attention_fn(query, key, value, backend=self._attention_backend)
        result = result.flatten(-2).to(query.dtype)
        pixels, words = result[:, : hidden_states.shape[1]], result[:, hidden_states.shape[1] :]
        pixels = attn.to_out[1](attn.to_out[0](pixels))
        if encoder_hidden_states is None:
            return pixels
        return pixels, words if attn.context_pre_only else attn.to_add_out(words)

    @staticmethod
    def projections(attn: Attention, tokens: torch.Tensor, names: tuple[str, ...], norms: tuple[Any, ...]) -> list[torch.Tensor]:
        """Query, key and value, (rows, tokens, heads, head size) each."""
        made = [getattr(attn, name)(tokens).unflatten(-1, (attn.heads, -1)) for name in names]
        return [x if norm is None else norm(x) for x, norm in zip(made, norms, strict=True)]


OWN = {AttnProcessor2_0: DispatchedAttention, JointAttnProcessor2_0: DispatchedJointAttention}
PLAIN = {dispatched: plain for plain, dispatched in OWN.items()}


def joined_projections(
    attn: Attention, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor | None
) -> tuple[torch.Tensor, ...]:
    """Query, key and value by products as wide as can be, of weights put together at every call, so that they stay trainable.

    Narrow products are slow on a CPU: the embedded model's compiled forward is a tenth shorter so.
    """
    own = [attn.to_q, attn.to_k, attn.to_v] if encoder_hidden_states is None else [attn.to_k, attn.to_v]
    if any(type(layer) is not nn.Linear or layer.bias is not None for layer in own):  # adapters, say
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        return attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
    weight = torch.cat([layer.weight for layer in own])
    if encoder_hidden_states is None:
        return nn.functional.linear(hidden_states, weight).chunk(3, dim=-1)
    return attn.to_q(hidden_states), *nn.functional.linear(encoder_hidden_states, weight).chunk(2, dim=-1)


def plain_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """softmax(q k' / sqrt(d)) v written out, for compilers: the dispatcher's math kernel asks for it by a context manager, which
    a trace leaves again before torch chooses, so that compiled code would hold the opaque CPU kernel after all.

    Args: (rows, tokens, heads, head size) each. Returns: the same, in the dtype of `value`.
    """
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    weights = torch.softmax((query @ key.transpose(-1, -2)).float() * query.shape[-1] ** -0.5, dim=-1)
    return (weights.to(value.dtype) @ value).transpose(1, 2)


def is_plain(attn: Attention) -> bool:
    """Whether a layer has nothing between its inputs and the three projections, as in the blocks of Stable Diffusion."""
    if type(attn.processor) not in (AttnProcessor2_0, DispatchedAttention):
        return False
    extras = (attn.spatial_norm, attn.group_norm, attn.norm_cross, attn.norm_q, attn.norm_k)
    return all(extra is None or extra is False for extra in extras)


def attention_layers(denoiser: nn.Module) -> Iterator[Any]:
    """The layers whose processor is diffusers' standard one or ours, or goes through the dispatcher by itself. Adapters' and
    others' are left alone."""
    for module in denoiser.modules():
        processor = getattr(module, "processor", None)
        if type(processor) in (*OWN, *PLAIN) or hasattr(processor, "_attention_backend"):
            yield module


def set_attention(denoiser: Any, name: str) -> None:
    """Give every layer the kernel `name` of BACKENDS. Raises: RuntimeError or ImportError if its library is missing."""
    layers = list(attention_layers(denoiser))
    plain = name == "sdpa" and not any(getattr(layer, "fused_projections", False) for layer in layers)
    replacements = PLAIN if plain else OWN
    for layer in layers:
        if (other := replacements.get(type(layer.processor))) is not None:
            layer.set_processor(other())
    if plain and not any(hasattr(layer.processor, "_attention_backend") for layer in layers):
        return
    faults = []
    for backend in BACKENDS[name]:
        try:
            denoiser.set_attention_backend(backend)
            return
        except (RuntimeError, ImportError) as error:
            faults.append(str(error))
    raise RuntimeError(faults[0])


def candidates(device: torch.device) -> tuple[str, ...]:
    """What may work on this device. Whether it does on this model's shapes and dtype, only a try shows."""
    return ("sdpa", "math") if device.type != "cuda" else tuple(BACKENDS)


def math_bytes(denoiser: nn.Module, rows: int, tokens: int) -> int:
    """What `math` holds at once at this many tokens: the matrix of all pairs, float32, its softmax, and the gradient of it."""
    heads = max((layer.heads for layer in attention_layers(denoiser)), default=0)
    return 3 * 4 * rows * heads * tokens**2


def xformers_fault() -> str | None:
    """Why an installed xformers cannot load here, and what mends it; None if nothing is known against it.

    Its wheels are built for CUDA 12. Beside a torch for CUDA 13 they find no CUDA 12 runtime.
    """
    if torch.version.cuda is None or torch.version.cuda.startswith("12.") or find_spec("xformers") is None:
        return None
    try:
        ctypes.CDLL("libcudart.so.12")
    except OSError:
        return (
            f"xformers is built for CUDA 12 and finds no libcudart.so.12 beside a torch for CUDA {torch.version.cuda}; "
            "pip install nvidia-cuda-runtime-cu12 and add its lib folder to LD_LIBRARY_PATH"
        )
    return None


def fuse_qkv(denoiser: nn.Module) -> None:
    """One product for q, k and v (self-attention) or k and v (cross-attention). The weights are copied: for frozen models."""
    for layer in attention_layers(denoiser):
        if not is_plain(layer):
            continue
        if not any(hasattr(layer, name) for name in FUSED):
            layer.fuse_projections(fuse=True)
            for name in FUSED:
                if hasattr(layer, name):
                    getattr(layer, name).requires_grad_(False)
        layer.fused_projections = True


def unfuse_qkv(denoiser: nn.Module, *, forget: bool = False) -> None:
    """Back to three products. forget: drop the copied weights too."""
    for layer, name in itertools.product(attention_layers(denoiser), FUSED):
        layer.fused_projections = False
        if forget and hasattr(layer, name):
            delattr(layer, name)
