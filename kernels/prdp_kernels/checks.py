"""Argument checks shared by the host functions. They look at metadata: no allocation, no device sync."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

LATENT_DTYPES = (torch.float32, torch.float64)
REDUCTIONS = ("mean", "sum")


def tensors(op: str, **named: object) -> None:
    for name, value in named.items():
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(value).__name__}")


def floating(op: str, **named: torch.Tensor) -> None:
    for name, value in named.items():
        if not value.is_floating_point():
            raise TypeError(f"{op}: {name} must be floating point, got {value.dtype}")


def int64(op: str, **named: torch.Tensor) -> None:
    for name, value in named.items():
        if value.dtype != torch.int64:
            raise TypeError(f"{op}: {name} must be torch.int64, got {value.dtype}")


def shape(op: str, expected: Sequence[int], **named: torch.Tensor) -> None:
    for name, value in named.items():
        if value.shape != tuple(expected):
            raise ValueError(f"{op}: {name} has shape {tuple(value.shape)}, expected {tuple(expected)}")


def same_device(op: str, **named: torch.Tensor) -> None:
    first, *others = named.items()
    for name, value in others:
        if value.device != first[1].device:
            raise ValueError(f"{op}: {name} is on {value.device}, {first[0]} on {first[1].device}; they must share one device")


def step(op: str, value: int | torch.Tensor, rows: torch.Tensor) -> None:
    """`value` is an int in 0..2**32-1, or one int64 per row of `rows`."""
    if isinstance(value, torch.Tensor):
        int64(op, step=value)
        shape(op, rows.shape[:1], step=value)
        same_device(op, seeds=rows, step=value)
    elif isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{op}: step must be an int or an int64 tensor, got {type(value).__name__}")
    elif not 0 <= value < 2**32:
        raise ValueError(f"{op}: step is {value}, expected 0 <= step < 2**32")


def transition(
    op: str,
    model_output: torch.Tensor,
    sample: torch.Tensor,
    sample_coef: torch.Tensor,
    output_coef: torch.Tensor,
    std: torch.Tensor,
    guidance_scale: float | None,
    reduction: str,
) -> None:
    """The arguments that `denoise_step` and `gaussian_log_prob` share, all but the value of `std`."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"{op}: unknown reduction {reduction!r}; expected one of {', '.join(map(repr, REDUCTIONS))}")
    named = {"model_output": model_output, "sample": sample, "sample_coef": sample_coef, "output_coef": output_coef, "std": std}
    tensors(op, **named)
    floating(op, **named)
    latent_dtype(op, sample=sample)
    if sample.dim() < 2 or math.prod(sample.shape[1:]) == 0:
        raise ValueError(f"{op}: sample has shape {tuple(sample.shape)}, expected (N, C, H, W) with at least one element a row")
    n = sample.shape[0]
    if guidance_scale is None:
        shape(op, sample.shape, model_output=model_output)
    elif isinstance(guidance_scale, bool) or not isinstance(guidance_scale, (int, float)) or not math.isfinite(guidance_scale):
        raise ValueError(f"{op}: guidance_scale must be None or a finite number, got {guidance_scale!r}")
    elif model_output.shape != (2 * n, *sample.shape[1:]):
        raise ValueError(
            f"{op}: model_output has shape {tuple(model_output.shape)}, expected {(2 * n, *sample.shape[1:])}: "
            "with guidance_scale it holds the unconditional half, then the conditional one"
        )
    shape(op, (n,), sample_coef=sample_coef, output_coef=output_coef, std=std)
    same_device(op, **named)


def is_guidance(value: object) -> bool:
    """Whether `transition` takes it, at a glance: what fails here may still pass there."""
    return value is None or (type(value) in (float, int) and math.isfinite(value))  # type: ignore[arg-type]


def latent_dtype(op: str, **named: torch.Tensor) -> None:
    for name, value in named.items():
        if value.dtype not in LATENT_DTYPES:
            # A log-prob is compared to 1e-6: half-precision latents cannot carry it.
            raise TypeError(f"{op}: {name} must be float32 or float64, got {value.dtype}; convert it with .float()")


def can_read_values(t: torch.Tensor) -> bool:
    """Whether values may be looked at: not on CUDA, which would wait for the device, and not while a graph is traced."""
    return t.device.type == "cpu" and not torch.compiler.is_compiling()
