"""Fast paths of a denoiser against the plain one: the same result on the job's own shapes, and how long each takes."""

from __future__ import annotations

import contextlib
import logging
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Protocol

import torch
from torch import nn

# A default is left for what is faster by more than this share. Two runs should round alike, which a toss between equals breaks,
# and a CPU is shared with whatever else runs.
MARGIN = {"cuda": 0.03, "cpu": 0.1}
ROUNDS = 5
# ||fast - plain|| / ||plain|| of a whole denoiser's output or gradient. Kernels sum in different orders: seen 1e-6 in float32; in
# 16 bits every layer rounds to 2**-8 (bf16) or 2**-11 (fp16).
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
TF32_TOLERANCE = 1e-2


class DenoiserShapes(Protocol):
    """What this room asks of a model's family, `Family` of models/."""

    repeated_blocks: ClassVar[tuple[str, ...]]

    @property
    def attention_tokens(self) -> int: ...
    def denoiser_inputs(self, rows: int, device: torch.device | str, dtype: torch.dtype = ...) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Decision:
    value: str
    reason: str
    milliseconds: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        times = ", ".join(
            f"{name} {value:.1f} ms" if value < 1e4 else f"{name} {value / 1e3:.0f} s"
            for name, value in self.milliseconds.items()
        )
        return f"{self.value:9} {self.reason}" + (f" ({times})" if times else "")


class Unsuitable(RuntimeError):
    """A fast path that gives another result than the plain one."""


@dataclass(frozen=True)
class Probe:
    """One denoiser call of the job's shapes on fixed random inputs; with gradients for the trained denoiser."""

    denoiser: nn.Module
    shapes: DenoiserShapes
    rows: int
    device: torch.device
    dtype: torch.dtype
    gradients: bool
    shared: bool = False  # latents and timesteps are given once for both halves of the rows

    def inputs(self) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(0)

        def fill(value: Any, name: str = "") -> Any:
            if isinstance(value, dict):
                return {key: fill(inner, key) for key, inner in value.items()}
            if not isinstance(value, torch.Tensor):
                return value
            if value.is_floating_point():
                return torch.randn(value.shape, generator=generator).to(value)
            return torch.randint(0, 1000, value.shape, generator=generator).to(value)

        inputs = fill(self.shapes.denoiser_inputs(self.rows, self.device, self.dtype))
        once = [name for name, _ in zip(inputs, range(2))] if self.shared else []  # the latents and the timesteps
        return inputs | {name: inputs[name][: self.rows // 2] for name in once}

    def run(self, inputs: dict[str, Any], call: Callable[..., Any] | None = None) -> list[torch.Tensor]:
        """Output, and gradients of its sum of squares: by weights, or for a frozen denoiser by its input.

        Not `backward`: gradients must not land on the weights, where DeepSpeed waits for them.
        """
        call = call or self.denoiser
        if not self.gradients:
            with torch.no_grad():
                return [self._call(call, inputs)]
        wanted = [parameter for parameter in self.denoiser.parameters() if parameter.requires_grad]
        if not wanted:
            latents = next(iter(inputs))
            inputs = inputs | {latents: inputs[latents].clone().requires_grad_(True)}
            wanted = [inputs[latents]]
        with torch.enable_grad():
            output = self._call(call, inputs)
            return [output.detach(), *torch.autograd.grad(output.float().square().sum(), wanted, allow_unused=True)]

    @staticmethod
    def _call(call: Callable[..., Any], inputs: dict[str, Any]) -> torch.Tensor:
        # As the policy calls: latents by position.
        (_, latents), *named = inputs.items()
        return call(latents, **dict(named))[0]

    def check(self, result: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
        """Raises: Unsuitable if the output or the gradient as a whole is further off than rounding."""
        tf32 = self.dtype == torch.float32 and self.device.type == "cuda" and torch.backends.cudnn.allow_tf32
        tolerance = TF32_TOLERANCE if tf32 else TOLERANCE[self.dtype]
        for what, own, plain in (("output", result[:1], expected[:1]), ("gradient", result[1:], expected[1:])):
            error = distance(own, plain)
            if not error <= tolerance:
                raise Unsuitable(f"its {what} is off by {error:.1e} of the plain model's, more than rounding ({tolerance:.0e})")

    def room(self) -> float:
        """Bytes that a try may take: an eighth of what is free on a GPU, so that it cannot take a job down. No bound on a CPU."""
        return torch.cuda.mem_get_info(self.device)[0] / 8 if self.device.type == "cuda" else math.inf

    def time(self, calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
        """Median milliseconds of each call, taken in turns: another process's burst then hits all of them.

        On a CPU it is the time this process was given, since a busy machine stretches the clock on the wall.
        """
        clock = time.perf_counter if self.device.type == "cuda" else time.process_time
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(ROUNDS):
            for name, call in calls.items():
                self._wait()
                start = clock()
                call()
                self._wait()
                seconds[name].append(clock() - start)
        return {name: round(statistics.median(values) * 1000, 2) for name, values in seconds.items()}

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def distance(values: list[Any], expected: list[Any]) -> float:
    """||values - expected|| / ||expected|| over all tensors; 0 for none."""
    squares = [
        ((value.detach().float() - other.detach().float()).square().sum().item(), other.detach().float().square().sum().item())
        for value, other in zip(values, expected, strict=True)
        if value is not None and other is not None
    ]
    if not squares:
        return 0.0
    return math.sqrt(sum(own for own, _ in squares)) / max(math.sqrt(sum(norm for _, norm in squares)), 1e-30)


def first_line(error: BaseException) -> str:
    error = getattr(error, "inner_exception", error)  # torch's compiler wraps what its backend raised
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Whatever a library logs or warns of while it is tried is not shown: a fault is told as one reason."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def fastest(milliseconds: dict[str, float], default: str, margin: float) -> str:
    best = min(milliseconds, key=lambda name: milliseconds[name])
    return best if milliseconds[best] < milliseconds[default] * (1 - margin) else default


def choose_variant(
    probe: Probe, variants: dict[str, Callable[[], None]], default: str
) -> tuple[str, dict[str, float], dict[str, str]]:
    """The fastest of several states of one denoiser, which it is left in.

    Args: variants: name to what puts the denoiser into that state. The default's result is what others are compared with.
    Returns: (name, milliseconds of those that work, reasons of those that do not).
    """
    inputs = probe.inputs()
    variants[default]()
    expected = probe.run(inputs)
    works, faults = {default: variants[default]}, {}
    for name, apply in variants.items():
        if name != default:
            try:
                with quiet():
                    apply()
                    probe.check(probe.run(inputs), expected)
                works[name] = apply
            except Exception as error:  # kernels refuse in every way there is; what they say is the reason that is logged
                faults[name] = first_line(error)
    times: dict[str, float] = {}
    if len(works) > 1:

        def run(apply: Callable[[], None]) -> list[torch.Tensor]:
            apply()
            return probe.run(inputs)

        with quiet():
            times = probe.time({name: partial(run, apply) for name, apply in works.items()})
    chosen = fastest(times, default, MARGIN.get(probe.device.type, 0.1)) if times else default
    variants[chosen]()
    return chosen, times, faults
