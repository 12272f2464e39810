"""A forward as a CUDA graph: its kernels launched by one call, with no work on the host between them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils import _pytree as pytree

from prdp_fast.acceleration.shared_halves import rows_of

Forward = Callable[..., Any]


class CudaGraphForward:
    """A forward as a CUDA graph, for each batch size that recurs.

    A graph reads the weights at the addresses it was captured with, so optimizer steps in place are seen, and a denoiser whose
    weights move (the gathered copy of ZeRO-3 goes to the host between rollouts) cannot be captured.
    """

    WARMUPS = 3  # allocations and kernel choices have to be over before a capture

    def __init__(self, forward: Forward, rows: Iterable[int]) -> None:
        self.forward, self.rows = forward, frozenset(rows)
        self.graphs: dict[Any, tuple[torch.cuda.CUDAGraph, list[torch.Tensor], Any]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() or rows_of(*args, **kwargs) not in self.rows:
            return self.forward(*args, **kwargs)
        leaves, tree = pytree.tree_flatten((args, kwargs))
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
