"""When a result is right enough to be timed.

A tensor passes if two things hold against the float64 reference, NaN passing neither:

1. relative RMS error, ||got - expected|| / ||expected||, at most 1e-6 in float32. A result that was computed to that and then
   rounded to a half-precision dtype has in addition an error of at most u |expected| in every element, u = eps / 2 being the
   unit roundoff (2^-8 in bf16, 2^-11 in fp16); so its relative RMS is at most 1e-6 + u.
2. every element within  u |expected| + 1e-4 rms(expected),  because the RMS over 10^7 elements forgives a wrong one. The second
   term is for float32's own cancellation in x' - mu: a few roundings of numbers up to 8 (6e-7 each), over std >= 0.1, is 1e-5 of
   a residual, and rows with a small gradient are measured by the RMS of all of them. It covers the subnormals of fp16 (3e-8) too.

A log-prob of a step is held to 1e-6 over its rows, though the answer is that of x' before it is rounded to float32. What rounding
does to it averages out: an x' up to 4 is off by 1e-7 at random, over std >= 0.1 that is 1e-6 of a residual's unit. The mean of
its product with 120 independent normals, the smallest row here, is below 1e-7; at 16,384 elements it is 1e-8. So is the rounding
of the mean, which both sides take from the same float32 inputs. What is left are errors of one sign:
1 / std and log std, each a rounding (6e-8 of a term near 1), and what the noise is off by in its mean square, 4 x 6e-8 at most,
of which the log-prob has half. With log-probs of .4 RMS that is at most 5e-7. A row whose log-prob happens to be near 0 changes
nothing, because the RMS is over all rows. More than 1e-6 is a fault, and once was one: a wrong digit in the noise's logarithm.

That is for the operators. The plain chains they are compared with get ten times the float32 terms (`slack`): they sum elementwise
log-probs in float32, in the order torch chooses, which costs them a good half of 1e-6.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

FLOAT32_RMS = 1e-6
FLOAT32_ELEMENT = 1e-4


@dataclass(frozen=True)
class Fault:
    """A tensor that may not be timed: which, where it is worst, and by how much."""

    tensor: str
    index: tuple[int, ...]
    got: float
    expected: float
    relative_rms: float
    tolerance: float
    reason: str = ""

    def __str__(self) -> str:
        if self.reason:
            return f"{self.tensor}: {self.reason}"
        return (
            f"{self.tensor}: worst at {list(self.index)}, got {self.got:.9g}, expected {self.expected:.9g}; "
            f"relative RMS error {self.relative_rms:.2g}, at most {self.tolerance:.2g} is right"
        )


def unit_roundoff(dtype: torch.dtype) -> float:
    """Of a half-precision dtype; 0 for wider ones, which FLOAT32_* cover."""
    return torch.finfo(dtype).eps / 2 if dtype in (torch.bfloat16, torch.float16) else 0.0


def compare(
    name: str, got: torch.Tensor, expected: torch.Tensor, *, dtype: torch.dtype | None = None, slack: float = 1.0
) -> Fault | None:
    """None if `got` may be timed. expected: float64. dtype: what `got` must have, if that matters. slack: see above."""
    if got.shape != expected.shape or (dtype is not None and got.dtype != dtype):
        reason = f"got {tuple(got.shape)} {got.dtype}, expected {tuple(expected.shape)} {dtype or 'of any float dtype'}"
        return Fault(name, (), math.nan, math.nan, math.nan, math.nan, reason)
    u = unit_roundoff(got.dtype)
    expected = expected.to(got.device, torch.float64)
    error = (got.double() - expected).abs().nan_to_num(nan=math.inf)
    norm = expected.norm().item()
    relative_rms = error.norm().item() / norm if norm > 0 else error.norm().item()
    rms = norm / math.sqrt(max(1, expected.numel()))
    excess = error - (u * expected.abs() + slack * FLOAT32_ELEMENT * (rms if norm > 0 else 1.0))
    tolerance = slack * FLOAT32_RMS + u
    if relative_rms <= tolerance and not (excess > 0).any():
        return None
    worst = int(excess.argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), expected.shape))
    return Fault(name, index, got[index].item(), expected[index].item(), relative_rms, tolerance)


def first_fault(
    got: Mapping[str, torch.Tensor],
    expected: Mapping[str, torch.Tensor],
    dtypes: Mapping[str, torch.dtype],
    *,
    slack: float = 1.0,
) -> Fault | None:
    """The first tensor of `expected` that `got` lacks or has wrong; tensors that nothing is expected of do not matter."""
    for name, right in expected.items():
        if name not in got:
            return Fault(name, (), math.nan, math.nan, math.nan, math.nan, "missing from the result")
        fault = compare(name, got[name], right, dtype=dtypes.get(name), slack=slack)
        if fault is not None:
            return fault
    return None
