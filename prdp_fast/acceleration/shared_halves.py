"""One computation for both halves of a guided U-Net call, up to its first cross-attention.

Classifier-free guidance evaluates N latents twice: told of the empty prompt, and of their own. Until the text is first looked at,
both halves hold the same numbers. That is the first convolution, the time embedding, the residual blocks before the first
transformer, and that transformer's norm, input projection and self-attention. An enabled U-Net takes N latents and timesteps
with 2N text embeddings, doubles the hidden states where the text comes in, and returns 2N rows. Autograd adds the gradients of
the two halves there, so the gradient is exact too.

The `forward` of diffusers' U-Net stays. What has to be doubled is told by its number of rows where it is used. So the same
happens in a recomputation under gradient checkpointing, in a compiler's trace and in a CUDA graph.

- The first transformer and its first block become the subclasses below, which double.
- The residual blocks behind them double the time embedding.
- The blocks of the way up double the skip tensors that were made before.

A call with as many latents as embeddings is computed as before: without guidance, or outside a guidance interval.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_blocks import (
    CrossAttnDownBlock2D,
    CrossAttnUpBlock2D,
    DownBlock2D,
    UNetMidBlock2DCrossAttn,
    UpBlock2D,
)
from torch import nn

KNOWN_BLOCKS = (CrossAttnDownBlock2D, DownBlock2D, UNetMidBlock2DCrossAttn, CrossAttnUpBlock2D, UpBlock2D)


def twice(x: torch.Tensor) -> torch.Tensor:
    """(N, ...) -> (2N, ...), for both halves."""
    return torch.cat([x, x])


def doubling(denoiser: Callable[..., Any]) -> Callable[..., Any]:
    """The plain call of what a shared one computes: latents and timesteps are doubled at the denoiser's door."""

    def call(latents: torch.Tensor, timestep: torch.Tensor, **named: Any) -> Any:
        return denoiser(twice(latents), timestep=twice(timestep), **named)

    return call


def rows_of(*args: Any, **kwargs: Any) -> int:
    """Rows of a call's result: of its latents or hidden states, or, where these are shared and half as many, of the texts.

    By name other things are given too, positions say, which are longer and have no rows.
    """
    given = (*args, kwargs.get("hidden_states"), kwargs.get("encoder_hidden_states"))
    return max((len(x) for x in given if isinstance(x, torch.Tensor) and x.ndim), default=0)


def is_shared(hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor | None) -> bool:
    return encoder_hidden_states is not None and len(encoder_hidden_states) == 2 * len(hidden_states)


class SharedTransformer(Transformer2DModel):
    """The first transformer: N images and the embeddings of 2N texts in, 2N images out."""

    def forward(
        self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        if not is_shared(hidden_states, encoder_hidden_states):
            return Transformer2DModel.forward(self, hidden_states, encoder_hidden_states, *args, **kwargs)
        check_nothing_else(*args, **{name: value for name, value in kwargs.items() if name != "return_dict"})
        residual, (height, width) = hidden_states, hidden_states.shape[2:]
        hidden_states, inner_dim = self._operate_on_continuous_inputs(hidden_states)
        for block in self.transformer_blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states, None, encoder_hidden_states)
            else:
                hidden_states = block(hidden_states, encoder_hidden_states=encoder_hidden_states)
        output = self._get_output_for_continuous_inputs(
            hidden_states=hidden_states, residual=twice(residual), batch_size=len(hidden_states), height=height, width=width,
            inner_dim=inner_dim,
        )  # fmt: skip
        return (output,)  # as a U-Net's blocks ask for by return_dict=False


class SharedBlock(BasicTransformerBlock):
    """Its first block: (N, tokens, width) in; cross-attention, which sees the 2N texts, and all behind it are of 2N rows."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        if not is_shared(hidden_states, encoder_hidden_states):
            return BasicTransformerBlock.forward(
                self, hidden_states, attention_mask, encoder_hidden_states, *args, **kwargs
            )  # fmt: skip
        check_nothing_else(attention_mask, *args, **kwargs)
        hidden_states = twice(self.attn1(self.norm1(hidden_states)) + hidden_states)
        hidden_states = self.attn2(self.norm2(hidden_states), encoder_hidden_states=encoder_hidden_states) + hidden_states
        return self.ff(self.norm3(hidden_states)) + hidden_states


def check_nothing_else(*args: Any, **kwargs: Any) -> None:
    """Raises: NotImplementedError for an input of diffusers' blocks beside hidden states and text, which would be ignored."""
    if given := [name for name, value in (*enumerate(args), *kwargs.items()) if value is not None]:
        raise NotImplementedError(
            f"a U-Net call with shared halves has the further block inputs {given}; expected hidden states and text embeddings "
            "alone: call it with as many latents as embeddings"
        )


def double_embedding(resnet: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Before `ResnetBlock2D(hidden_states, temb)`."""
    hidden_states, temb, *rest = args
    return None if temb is None or len(temb) == len(hidden_states) else (hidden_states, twice(temb), *rest)


def double_skips(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Before a block of the way up, which diffusers calls by names."""
    rows, skips = len(kwargs["hidden_states"]), kwargs["res_hidden_states_tuple"]
    doubled = tuple(skip if len(skip) == rows else twice(skip) for skip in skips)
    return args, kwargs | {"res_hidden_states_tuple": doubled}


def beginning(denoiser: Any) -> tuple[list[nn.Module], nn.Module | None]:
    """The residual blocks before the first transformer of the way down, and that transformer; None if there is none."""
    resnets: list[nn.Module] = []
    for block in denoiser.down_blocks:
        if getattr(block, "has_cross_attention", False):
            return [*resnets, block.resnets[0]], block.attentions[0]
        resnets.extend(block.resnets)
    return resnets, None


def fault(denoiser: nn.Module) -> str | None:
    """Why this denoiser's halves cannot be shared, or would be by code that knows less than diffusers'; None if they can."""
    if type(denoiser) is not UNet2DConditionModel:
        return f"a {type(denoiser).__name__} is not known to it, a UNet2DConditionModel is"
    config: Any = denoiser.config
    if config.addition_embed_type is not None or denoiser.class_embedding is not None:
        return "the time embedding differs between the halves"
    if denoiser.encoder_hid_proj is not None or config.time_cond_proj_dim is not None:
        return "the U-Net is told more than a timestep and text"
    blocks = [*denoiser.down_blocks, *([] if denoiser.mid_block is None else [denoiser.mid_block]), *denoiser.up_blocks]
    if unknown := {type(block).__name__ for block in blocks if type(block) not in KNOWN_BLOCKS}:
        return f"its blocks {', '.join(sorted(unknown))} are not known to it"
    if any(isinstance(module, nn.Dropout) and module.p > 0 for module in denoiser.modules()):
        return "dropout draws for every row"
    _, transformer = beginning(denoiser)
    if not isinstance(transformer, Transformer2DModel) or not transformer.is_input_continuous:
        return "the way down has no transformer over pixels"
    first: Any = transformer.transformer_blocks[0]
    plain = (
        first.norm_type == "layer_norm"
        and first.attn2 is not None
        and first.pos_embed is None
        and first._chunk_size is None
        and not (first.only_cross_attention or first.double_self_attention or hasattr(first, "fuser"))
    )
    return None if plain else "the first transformer block has more than self-attention, cross-attention and a feed-forward layer"


def enable(denoiser: Any) -> None:
    """Let a U-Net without `fault` take N latents and timesteps with 2N embeddings. Weights, names and hooks stay."""
    disable(denoiser)
    _, transformer = beginning(denoiser)
    assert transformer is not None
    # A class and not a `forward` of the instance: what is compiled is the forward of a module's class.
    transformer.__class__ = SharedTransformer
    transformer.transformer_blocks[0].__class__ = SharedBlock  # type: ignore[union-attr, index]
    for module in denoiser.modules():
        if isinstance(module, ResnetBlock2D):
            module.register_forward_pre_hook(double_embedding)
    for block in denoiser.up_blocks:
        block.register_forward_pre_hook(double_skips, with_kwargs=True)


def disable(denoiser: nn.Module) -> None:
    for module in denoiser.modules():
        if isinstance(module, SharedTransformer):
            module.__class__ = Transformer2DModel
        elif isinstance(module, SharedBlock):
            module.__class__ = BasicTransformerBlock
        for key, hook in list(module._forward_pre_hooks.items()):
            if hook in (double_embedding, double_skips):
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)


def halved_blocks(denoiser: nn.Module) -> set[nn.Module]:
    """The residual blocks that have half of a shared call's rows; none if the denoiser is not enabled."""
    if not any(isinstance(module, SharedTransformer) for module in denoiser.modules()):
        return set()
    return set(beginning(denoiser)[0])
