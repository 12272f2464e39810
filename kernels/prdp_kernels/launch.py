"""Launches of the Triton kernels. What depends on metadata alone is worked out once and kept.

A call is described by a key: the operator, its options, and of every tensor type, shape, strides, dtype and device. Under the key
lies a plan: grid, strides, constants, which tensors need a copy. A plan is made after the arguments have been checked, and the
checks look at nothing else but the key (and at values, on the CPU): where there is a plan, there is nothing left to check.

Triton's own launcher looks at every argument of every call to find the compiled kernel. A plan keeps the compiled kernel, under
the one thing that is not in the key: which pointers are multiples of 16 bytes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch

LIMIT = 512  # plans that are kept; a job needs a dozen
ALIGNMENTS = 32  # compiled kernels of one plan: which pointers are aligned decides, and nearly always all are


class Bounded(dict):
    """A dictionary that forgets its oldest entry when it would hold more than `limit`."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key, value)
        while len(self) > self.limit:
            self.pop(next(iter(self)), None)


PLANS = Bounded(LIMIT)


def key_of(op: str, options: tuple[Any, ...], tensors: Sequence[torch.Tensor | None]) -> tuple[Any, ...]:
    """All that a plan may depend on. Raises AttributeError for what is no tensor."""
    return op, options, tuple([None if t is None else (type(t), t.shape, t.stride(), t.dtype, t.device) for t in tensors])


def known(op: str, backend: str, options: tuple[Any, ...], tensors: Sequence[Any]) -> Any:
    """The plan of a call that was made before, by these backends, with the same metadata; None: check the arguments, say what
    is wrong with them, and find the implementation. Nothing but plain eager CUDA tensors is ever known."""
    if backend != "auto" and backend != "triton":
        return None
    try:
        if not LAUNCHER.drives(tensors[0]) or not eager():
            return None
        return PLANS.get(key_of(op, options, tensors))
    except (AttributeError, TypeError, RuntimeError):  # no tensors, options that do not hash, a layout without strides
        return None


def eager() -> bool:
    """Whether nobody watches: no tracing, no mode, no functorch transform. Else a call has to go through torch.ops."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
    )


def plain(tensors: Sequence[torch.Tensor | None]) -> bool:
    """Whether a kernel may be launched without torch.ops: eager, and nothing but ordinary tensors."""
    return eager() and all(t is None or type(t) in (torch.Tensor, torch.nn.Parameter) for t in tensors)


class Prepared:
    """A kernel and everything of its launch that does not change from call to call.

    The kernel's parameters are pointers, then scalars, then `numbers`, then `constants`, in this order. numbers: the integers
    that follow from shapes and strides. constants: its constexprs, by name. options: of the compiler (num_warps, maxnreg).
    """

    __slots__ = ("constants", "device", "grid", "handles", "kernel", "numbers", "options", "values")

    def __init__(
        self,
        kernel: Any,
        grid: int,
        numbers: tuple[int, ...],
        constants: dict[str, Any],
        options: dict[str, int],
        device: torch.device,
    ) -> None:
        self.kernel, self.grid, self.numbers, self.constants, self.options = kernel, grid, numbers, constants, options
        self.values = tuple(constants.values())
        self.device = device.index
        self.handles: Bounded = Bounded(ALIGNMENTS)

    def launch(self, tensors: Sequence[torch.Tensor], scalars: tuple[Any, ...]) -> None:
        LAUNCHER.launch(self, tensors, scalars)

    def through_triton(self, tensors: Sequence[torch.Tensor], scalars: tuple[Any, ...]) -> Any:
        """Compile if need be, launch, and return the compiled kernel."""
        return self.kernel[(self.grid,)](*tensors, *scalars, *self.numbers, **self.constants, **self.options)


class Launcher:
    """Launches on CUDA, and in Triton's interpreter. Tests and `benchmarks/kernels/host_launch.py` put others in its place."""

    direct = os.environ.get("PRDP_KERNELS_DIRECT", "1") != "0"  # whether compiled kernels are called without Triton's launcher

    def drives(self, t: torch.Tensor) -> bool:
        """Whether a call with this tensor may take a kept plan. Not on the CPU: values are checked there in every call."""
        return t.is_cuda

    def launch(self, prepared: Prepared, tensors: Sequence[torch.Tensor], scalars: tuple[Any, ...]) -> None:
        if not tensors[0].is_cuda:
            prepared.through_triton(tensors, scalars)
        elif self.current_device() == prepared.device:
            self.launch_here(prepared, tensors, scalars)
        else:  # Triton launches on the current device, wherever its arguments are
            with torch.cuda.device(prepared.device):
                self.launch_here(prepared, tensors, scalars)

    def launch_here(self, prepared: Prepared, tensors: Sequence[torch.Tensor], scalars: tuple[Any, ...]) -> None:
        pointers = [t.data_ptr() for t in tensors]
        alignment = alignment_of(pointers)
        handle = prepared.handles.get(alignment)
        if handle is None or not self.direct:
            prepared.handles[alignment] = self.compile(prepared, tensors, scalars)
            return
        try:
            self.run(handle, prepared, pointers, scalars)
        except (
            TypeError,
            AttributeError,
        ):  # another Triton calls them otherwise; nothing was launched
            self.direct = False
            self.compile(prepared, tensors, scalars)

    def current_device(self) -> int:
        return torch._C._cuda_getDevice()

    def compile(self, prepared: Prepared, tensors: Sequence[torch.Tensor], scalars: tuple[Any, ...]) -> Any:
        """The first launch with this alignment, by Triton's own launcher, and the compiled kernel that it found or made."""
        return prepared.through_triton(tensors, scalars)

    def run(self, handle: Any, prepared: Prepared, pointers: list[int], scalars: tuple[Any, ...]) -> None:
        """What `CompiledKernel.__getitem__` does, without the launch hooks, which profilers set and tools read."""
        stream = torch._C._cuda_getCurrentRawStream(prepared.device)
        handle.run(
            prepared.grid, 1, 1, stream, handle.function, handle.packed_metadata, None, None, None,
            *pointers, *scalars, *prepared.numbers, *prepared.values,
        )  # fmt: skip


def alignment_of(pointers: list[int]) -> Any:
    """Which of them are multiples of 16: 0 if all are."""
    low = 0
    for pointer in pointers:
        low |= pointer
    return tuple([pointer & 15 == 0 for pointer in pointers]) if low & 15 else 0


LAUNCHER = Launcher()
