"""A U-Net's forward, compiled or captured, in place: parameter names, hooks, checkpoints and exports stay as they were."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils import _pytree as pytree

# diffusers' own choice (`_repeated_blocks`) leaves out the residual blocks, half of a U-Net's time.
REPEATED_BLOCKS = ("BasicTransformerBlock", "ResnetBlock2D")
# All instances of a block share one code object, and each width and resolution is compiled once.
RECOMPILE_LIMIT = 256
BACKEND = "inductor"

Forward = Callable[..., Any]


class ForRows:
    """A compiled forward for the batch sizes that recur. Others (the tail of an epoch) run eagerly, not after a compilation."""

    enabled: ClassVar[bool] = True

    def __init__(self, eager: Forward, rows: Iterable[int]) -> None:
        self.eager, self.rows = eager, frozenset(rows)
        self.compiled = torch.compile(eager, dynamic=False, backend=BACKEND)

    def __call__(self, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # Inside another compilation the plain forward is what is wanted.
        here = len(sample) in self.rows and self.enabled and not torch.compiler.is_compiling()
        return (self.compiled if here else self.eager)(sample, *args, **kwargs)


@contextlib.contextmanager
def plainly() -> Iterator[None]:
    """Inside, compiled U-Nets run as if they were not."""
    ForRows.enabled = False
    try:
        yield
    finally:
        ForRows.enabled = True


class OneGraph:
    """The trained U-Net's forward, the same compiled code with gradients and without.

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


def compile_blocks(unet: nn.Module, rows: Iterable[int]) -> None:
    for module in unet.modules():
        if type(module).__name__ in REPEATED_BLOCKS:
            module.forward = ForRows(own_forward(module), rows)  # type: ignore[method-assign]


def compile_trained(unet: nn.Module, mode: str, rows: Iterable[int]) -> None:
    """Compile in place what DeepSpeed calls. mode: blocks or full."""
    raise_recompile_limit()
    forward = own_forward(unet)
    if mode == "blocks":
        compile_blocks(unet, rows)
    else:
        forward = ForRows(forward, rows)
    unet.forward = OneGraph(forward)  # type: ignore[method-assign]


def compile_frozen(unet: nn.Module, mode: str, rows: Iterable[int]) -> None:
    """Compile in place a U-Net that is never differentiated."""
    raise_recompile_limit()
    if mode == "blocks":
        compile_blocks(unet, rows)
    else:
        unet.forward = ForRows(own_forward(unet), rows)  # type: ignore[method-assign]


def undo(unet: nn.Module) -> None:
    for module in unet.modules():
        module.__dict__.pop("forward", None)


class Captured:
    """A forward as a CUDA graph, for each batch size that recurs.

    A graph reads the weights at the addresses it was captured with, so optimizer steps in place are seen, and a U-Net whose
    weights move (the gathered copy of ZeRO-3 goes to the host between rollouts) cannot be captured.
    """

    WARMUPS = 3  # allocations and kernel choices have to be over before a capture

    def __init__(self, forward: Forward, rows: Iterable[int]) -> None:
        self.forward, self.rows = forward, frozenset(rows)
        self.graphs: dict[Any, tuple[torch.cuda.CUDAGraph, list[torch.Tensor], Any]] = {}

    def __call__(self, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if len(sample) not in self.rows or torch.is_grad_enabled():
            return self.forward(sample, *args, **kwargs)
        leaves, tree = pytree.tree_flatten(((sample, *args), kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        key = tuple((tuple(x.shape), x.dtype) for x in tensors)
        if key not in self.graphs:
            self.graphs[key] = self._capture(leaves, tree)
        graph, inputs, outputs = self.graphs[key]
        for static, given in zip(inputs, tensors, strict=True):
            static.copy_(given)
        graph.replay()
        return pytree.tree_map_only(torch.Tensor, torch.Tensor.clone, outputs)  # the next replay writes over its outputs

    def _capture(self, leaves: list[Any], tree: Any) -> tuple[torch.cuda.CUDAGraph, list[torch.Tensor], Any]:
        leaves = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(leaves, tree)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(self.WARMUPS):
                self.forward(*args, **kwargs)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = self.forward(*args, **kwargs)
        return graph, [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)], outputs
