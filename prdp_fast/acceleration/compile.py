"""A denoiser's forward, compiled in place: parameter names, hooks, checkpoints and exports stay as they were."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils import _pytree as pytree

from prdp_fast.acceleration.shared_halves import halved_blocks, rows_of

# All instances of a block share one code object, and each width and resolution is compiled once.
RECOMPILE_LIMIT = 256
BACKEND = "inductor"

Forward = Callable[..., Any]


class CompiledForward:
    """A compiled forward for the batch sizes that recur. Others (the tail of an epoch) run eagerly, not after a compilation."""

    enabled: ClassVar[bool] = True

    def __init__(self, forward: Forward, rows: Iterable[int], eager: Forward | None = None) -> None:
        self.eager, self.rows = eager or forward, frozenset(rows)
        self.compiled = torch.compile(forward, dynamic=False, backend=BACKEND)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Inside another compilation the plain forward is what is wanted.
        here = self.enabled and not torch.compiler.is_compiling() and rows_of(*args, **kwargs) in self.rows
        return (self.compiled if here else self.eager)(*args, **kwargs)


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """Inside, compiled forwards run as they were before."""
    CompiledForward.enabled = False
    try:
        yield
    finally:
        CompiledForward.enabled = True


class TrainedForward:
    """The trained denoiser's forward: the same compiled code with gradients and without.

    Compilers fuse a forward whose activations are kept differently from one whose are not, and old and new log-probs are
    compared at the precision of rounding. So a pass without gradients runs as if it had them, in the memory that a pass with
    them takes, and drops them.
    """

    def __init__(self, forward: Forward) -> None:
        self.forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        with torch.enable_grad():
            result = self.forward(*args, **kwargs)
        return pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, result)


def own_forward(module: nn.Module) -> Forward:
    """The forward of the module's class, whatever has been put in its place."""
    return type(module).forward.__get__(module)


def raise_recompile_limit() -> None:
    import torch._dynamo  # half a second, only for those who compile

    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, RECOMPILE_LIMIT)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 4 * RECOMPILE_LIMIT)


def compile_blocks(denoiser: nn.Module, blocks: Collection[str], rows: Iterable[int]) -> None:
    """Args: blocks: class names of the repeated blocks."""
    rows, halved = frozenset(rows), halved_blocks(denoiser)
    for module in denoiser.modules():
        if is_one_of(module, blocks):
            recurring = rows | {count // 2 for count in rows} if module in halved else rows
            module.forward = CompiledForward(own_forward(module), recurring, module.forward)  # type: ignore[method-assign]


def is_one_of(module: nn.Module, names: Collection[str]) -> bool:
    """Whether its class or one that it was made from has one of these names."""
    return any(base.__name__ in names for base in type(module).__mro__)


def compile_trained(denoiser: nn.Module, mode: str, blocks: Collection[str], rows: Iterable[int]) -> None:
    """Compile in place what DeepSpeed calls. mode: blocks or full."""
    raise_recompile_limit()
    forward = own_forward(denoiser)
    if mode == "blocks":
        compile_blocks(denoiser, blocks, rows)
    else:
        forward = CompiledForward(forward, rows)
    denoiser.forward = TrainedForward(forward)  # type: ignore[method-assign]


def compile_frozen(denoiser: nn.Module, mode: str, blocks: Collection[str], rows: Iterable[int]) -> None:
    """Compile in place a denoiser that is never differentiated."""
    raise_recompile_limit()
    if mode == "blocks":
        compile_blocks(denoiser, blocks, rows)
    else:
        denoiser.forward = CompiledForward(own_forward(denoiser), rows)  # type: ignore[method-assign]


def take_code_of(compiled: nn.Module, frozen: nn.Module) -> None:
    """Let a frozen denoiser run what was compiled for another one of its class, where both are called without gradients.

    Weights are inputs of compiled code. Its guards look at their layout and at whether they require gradients, so a frozen
    denoiser whose weights lie alike is marked as the other is. Without gradients the mark means nothing else.
    """
    pairs = list(zip(frozen.parameters(), compiled.parameters(), strict=True))
    if all(own.stride() == other.stride() and own.dtype == other.dtype for own, other in pairs):
        for own, other in pairs:
            own.requires_grad_(other.requires_grad)


def uncompile(denoiser: nn.Module) -> None:
    """Every forward as it was before it was compiled."""
    for module in denoiser.modules():
        forward = module.__dict__.get("forward")
        while isinstance(forward, (CompiledForward, TrainedForward)):
            forward = forward.forward if isinstance(forward, TrainedForward) else forward.eager
        module.__dict__.pop("forward", None)
        if forward is not None and getattr(forward, "__func__", None) is not type(module).forward:
            module.forward = forward  # type: ignore[method-assign]
