"""Which implementation of an operator runs, and the registration of the Triton ones with PyTorch.

Registered under `torch.ops.prdp_kernels`, with the shapes of their outputs known to the tracer, the kernels are nodes of a graph
for torch.compile and can be captured in a CUDA graph.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch

BACKENDS = ("auto", "triton", "torch")
LIBRARY = torch.library.Library("prdp_kernels", "DEF")


def _has_triton() -> bool:
    try:
        return importlib.util.find_spec("triton") is not None
    except ValueError:  # a stub without a spec stands in sys.modules
        return False


HAS_TRITON = _has_triton()

F = TypeVar("F", bound=Callable[..., object])


def choose(op: str, backend: str, *tensors: torch.Tensor, reference: F, triton: F) -> F:
    """The implementation of `op` to call: `reference` (plain torch) or `triton`.

    "auto" takes Triton when every one of `tensors` is on CUDA and Triton is installed, else torch.
    Raises: ValueError for an unknown backend; RuntimeError for "triton" where it cannot run.
    """
    if backend not in BACKENDS:
        raise ValueError(f"{op}: unknown backend {backend!r}; expected one of {', '.join(map(repr, BACKENDS))}")
    if backend == "torch":
        return reference
    elsewhere = [t.device for t in tensors if not t.is_cuda]
    if backend == "auto":
        return triton if not elsewhere and HAS_TRITON else reference
    if not HAS_TRITON:
        raise RuntimeError(f"{op}: backend='triton' needs the package triton, which is not installed; use backend='torch'")
    if elsewhere and not torch.compiler.is_compiling() and not interpreted():
        raise RuntimeError(
            f"{op}: backend='triton' needs CUDA tensors, got {elsewhere[0]}; use backend='torch', or start Python with "
            "TRITON_INTERPRET=1 to run the kernels, slowly, on a CPU"
        )
    return triton


def interpreted() -> bool:
    """Whether Triton kernels run in its CPU interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


def define(schema: str, launch: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Register an operator and return it. `launch` runs it on the CPU (interpreter) and CUDA, `fake` makes empty outputs."""
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, launch, key)
    torch.library.register_fake(f"prdp_kernels::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.prdp_kernels, name).default
