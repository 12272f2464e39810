"""A U-Net of diffusers kept in channels-last from its first convolution to its last, with the norms and gates of `prdp_kernels`.

Tensor-core convolutions want channels-last. Moving the weights there is not enough: torch's group norm returns NCHW, diffusers
calls `contiguous()` in its transformers and shortcuts, and every convolution then converts back (measured on an H100: slower than
NCHW). Here each of those places is rewritten, module by module, with the same arithmetic:

- residual blocks: one kernel adds the time embedding and the first convolution's bias, normalises and applies SiLU;
- transformers: tokens and pixels are then views of each other, so that nothing is copied; the gated activation is one kernel;
- upsampling, `conv_in` and `conv_norm_out`, where diffusers would leave the layout.

Parameters, state dicts, hooks and modules stay as they are: only the `forward` of single instances is replaced. While a compiler
traces, the plain forward runs, which the compiler fuses itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch import nn
from torch.nn import functional

from prdp_kernels import geglu, group_norm

CHANNELS_LAST = torch.channels_last


class ChannelsLastForward:
    """In the place of one module's forward. Attributes: module, run(module, ...)."""

    def __init__(self, module: nn.Module, run: Callable[..., Any]) -> None:
        self.module, self.run = module, run

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return type(self.module).forward(self.module, *args, **kwargs)
        return self.run(self.module, *args, **kwargs)


def norm(module: nn.GroupNorm, x: torch.Tensor, *, shift: torch.Tensor | None = None, silu: bool = False) -> torch.Tensor:
    return group_norm(x, module.weight, module.bias, module.num_groups, module.eps, shift=shift, silu=silu)


def residual_block(block: ResnetBlock2D, x: torch.Tensor, temb: torch.Tensor | None, *_: Any, **__: Any) -> torch.Tensor:
    """`ResnetBlock2D.forward` of the blocks that `is_plain` lets through."""
    conv1, hidden, shift = block.conv1, norm(block.norm1, x, silu=True), None
    if block.time_emb_proj is not None and temb is not None:
        shift = block.time_emb_proj(temb if block.skip_time_act else block.nonlinearity(temb))
    if type(conv1) is nn.Conv2d and conv1.bias is not None:
        # Its bias joins the time embedding: one pass over the result less, and another for the bias's gradient.
        hidden = functional.conv2d(hidden, conv1.weight, None, conv1.stride, conv1.padding)
        bias = conv1.bias.to(hidden.dtype)
        shift = bias.expand(len(hidden), -1) if shift is None else shift + bias
    else:  # an adapter's
        hidden = conv1(hidden)
    hidden = block.conv2(block.dropout(norm(block.norm2, hidden, shift=shift, silu=True)))
    if block.conv_shortcut is not None:
        x = block.conv_shortcut(x)
    return x + hidden if block.output_scale_factor == 1.0 else (x + hidden) / block.output_scale_factor


def is_plain(block: ResnetBlock2D) -> bool:
    """Whether `residual_block` knows what this one does."""
    return (
        block.upsample is None
        and block.downsample is None
        and block.time_embedding_norm == "default"
        and isinstance(block.nonlinearity, nn.SiLU)
        and has_weights(block.norm1)
        and has_weights(block.norm2)
        and getattr(block.conv1, "padding_mode", "zeros") == "zeros"
    )


def plain_norm(module: nn.GroupNorm, x: torch.Tensor) -> torch.Tensor:
    return norm(module, x)


def norm_and_silu(module: nn.GroupNorm, x: torch.Tensor) -> torch.Tensor:
    return norm(module, x, silu=True)


def identity(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return x


def convert(module: nn.Module, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """The module's own forward, of a tensor in channels-last."""
    return type(module).forward(module, x.contiguous(memory_format=CHANNELS_LAST), *args, **kwargs)


class OutputOfTokens:
    """`Transformer2DModel._get_output_for_continuous_inputs` without its copies: tokens are pixels, in channels-last."""

    def __init__(self, module: Transformer2DModel) -> None:
        self.module = module

    def __call__(
        self, hidden_states: torch.Tensor, residual: torch.Tensor, batch_size: int, height: int, width: int, inner_dim: int
    ) -> torch.Tensor:
        module = self.module
        if torch.compiler.is_compiling():
            of_class = type(module)._get_output_for_continuous_inputs
            return of_class(module, hidden_states, residual, batch_size, height, width, inner_dim)
        if module.use_linear_projection:
            hidden_states = module.proj_out(hidden_states)
        hidden_states = hidden_states.unflatten(1, (height, width)).permute(0, 3, 1, 2)
        return residual + (hidden_states if module.use_linear_projection else module.proj_out(hidden_states))


def gated(layer: GEGLU, x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """`GEGLU.forward`: projection, then activation and product in one kernel."""
    return geglu(layer.proj(x))


def upsample(layer: Upsample2D, x: torch.Tensor, output_size: Any = None, *args: Any, **kwargs: Any) -> torch.Tensor:
    """`Upsample2D.forward` of a doubling, which torch does in NCHW for 64 rows and more."""
    if output_size is not None:
        return type(layer).forward(layer, x, output_size, *args, **kwargs)
    rows, channels, height, width = x.shape
    pixels = x.permute(0, 2, 3, 1)[:, :, None, :, None].expand(rows, height, 2, width, 2, channels)
    doubled = pixels.reshape(rows, 2 * height, 2 * width, channels).permute(0, 3, 1, 2)
    return layer.conv(doubled) if layer.use_conv else doubled


def doubles(layer: Upsample2D) -> bool:
    return not layer.use_conv_transpose and layer.interpolate and layer.norm is None and getattr(layer, "name", "") == "conv"


def has_own_forward(module: nn.Module) -> bool:
    """Whether something else has replaced it, as joined upsampling does in a decoder."""
    return not isinstance(module.__dict__.get("forward", None), (ChannelsLastForward, type(None)))


def has_weights(module: object) -> bool:
    return isinstance(module, nn.GroupNorm) and type(module) is nn.GroupNorm and module.affine


def has_norm(module: nn.Module) -> bool:
    """Whether it is a transformer over the pixels of an image, which normalises them first."""
    found = getattr(module, "norm", None)
    return isinstance(module, Transformer2DModel) and has_weights(found)


def rewrites(denoiser: nn.Module) -> Iterator[tuple[nn.Module, Callable[..., Any]]]:
    """Every module that gets another forward, and which."""
    conv_in, act = getattr(denoiser, "conv_in", None), getattr(denoiser, "conv_act", None)
    norm_out = getattr(denoiser, "conv_norm_out", None)
    if isinstance(conv_in, nn.Module):
        yield conv_in, convert
    if isinstance(norm_out, nn.Module) and has_weights(norm_out):
        if isinstance(act, nn.SiLU):
            yield norm_out, norm_and_silu
            yield act, identity
        else:
            yield norm_out, plain_norm
    for module in denoiser.modules():
        if isinstance(module, ResnetBlock2D) and is_plain(module):
            yield module, residual_block
        elif has_norm(module):
            yield module.norm, plain_norm
        elif type(module) is GEGLU:
            yield module, gated
        elif isinstance(module, Upsample2D) and doubles(module) and not has_own_forward(module):
            yield module, upsample


def enable(denoiser: nn.Module) -> int:
    """Rewrite in place what has to be, and lay out frozen weights. Returns: how many residual blocks.

    Trained weights stay as they are: DeepSpeed keeps them in flat buffers, and every convolution converts its own in passing.
    """
    count = 0
    for module, run in rewrites(denoiser):
        module.forward = ChannelsLastForward(module, run)  # type: ignore[method-assign]
        count += run is residual_block
    for module in denoiser.modules():
        if has_norm(module):
            module._get_output_for_continuous_inputs = OutputOfTokens(module)  # type: ignore[assignment]
    lay_out_frozen(denoiser, CHANNELS_LAST)
    return count


def disable(denoiser: nn.Module) -> None:
    for module in denoiser.modules():
        if isinstance(module.__dict__.get("forward"), ChannelsLastForward):
            del module.forward
        module.__dict__.pop("_get_output_for_continuous_inputs", None)
    lay_out_frozen(denoiser, torch.contiguous_format)


def lay_out_frozen(denoiser: nn.Module, memory_format: torch.memory_format) -> None:
    for parameter in denoiser.parameters():
        if not parameter.requires_grad and parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=memory_format)
