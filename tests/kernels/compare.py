"""When a Triton result is right, and tensors to try: bounds derived from the roundings a kernel makes, and layouts.

An element may be off by ROUNDINGS unit roundoffs of everything that was rounded on the way to it (forward error analysis: each
float32 operation adds at most u = 2^-24 of its own result), and by one rounding to the dtype it is stored in. The longest chain,
a guided gradient, is 12 operations: guidance 2, residual 2, reciprocal 1 (used twice), slope 4, product, guidance factor 2.
Sixteen leaves the rest to Triton's float32 division, which may be two ulps off. Sums of positive squares add a rounding a level,
15 at most, of random sign. And as ROUNDINGS u is 0.95e-6, a tensor that is not all cancellation has a relative RMS error of less
than 1e-6: in practice some 1e-7, because roundings are random and not all at their worst.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

DEVICE = torch.device(os.environ.get("PRDP_TEST_DEVICE", "cpu"))
INTERPRETED = DEVICE.type == "cpu"
ROUNDINGS = 16
RMS = 1e-6  # relative, in float32

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


def unit_roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def storage_roundoffs(dtype: torch.dtype) -> float:
    """Relative error of storing a number as `dtype`. Triton's interpreter cuts off the bits that bf16 lacks."""
    return unit_roundoff(dtype) * (2 if INTERPRETED and dtype == BF16 else 1)


def assert_close(name: str, got: torch.Tensor, exact: torch.Tensor, allowed: torch.Tensor | float) -> None:
    """|got - exact| <= allowed in every element, with room for storing it in the dtype of `got`. NaN is never close."""
    assert got.shape == exact.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    if got.numel() == 0:
        return
    exact = exact.to(got.device, F64)
    smallest = torch.finfo(got.dtype).smallest_normal * torch.finfo(got.dtype).eps  # subnormals are this far apart
    room = torch.as_tensor(allowed, dtype=F64, device=got.device) + storage_roundoffs(got.dtype) * exact.abs() + smallest
    error = (got.double() - exact).abs()
    excess = (error - room).nan_to_num(nan=math.inf)
    if (excess > 0).any():
        at, room = _index(excess), room.expand_as(exact)
        raise AssertionError(
            f"{name}: {int((excess > 0).sum())} of {got.numel()} elements wrong, worst at {list(at)}: got {got[at].item():.9g}, "
            f"expected {exact[at].item():.9g}, error {error[at].item():.3g}, allowed {room[at].item():.3g}"
        )


def assert_rms(name: str, got: torch.Tensor, exact: torch.Tensor) -> None:
    """Relative RMS error below 1e-6, and the rounding to a half-precision dtype."""
    exact = exact.to(got.device, F64)
    error = (got.double() - exact).abs().nan_to_num(nan=math.inf)
    limit = RMS * 2.0**-29 if got.dtype == F64 else RMS
    if got.dtype in (F16, BF16):
        limit += storage_roundoffs(got.dtype)
    relative = (error.norm() / exact.norm()).item()
    if not relative <= limit:
        at = _index(error)
        raise AssertionError(
            f"{name}: relative RMS error {relative:.3g}, allowed {limit:.3g}; worst at {list(at)}: got {got[at].item():.9g}, "
            f"expected {exact[at].item():.9g}, error {error[at].item():.3g}"
        )


def assert_same_bits(name: str, got: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal in every bit; NaN equals itself, which `torch.equal` does not say."""
    assert got.dtype == expected.dtype, f"{name}: {got.dtype}, expected {expected.dtype}"
    assert got.shape == expected.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    differs = ~((got == expected) | (got.isnan() & expected.isnan()))
    if differs.any():
        at = _index(differs.double())
        raise AssertionError(
            f"{name}: {int(differs.sum())} of {got.numel()} elements differ, first at {list(at)}: {got[at].item():.9g} and "
            f"{expected[at].item():.9g}, {abs(got[at].item() - expected[at].item()):.3g} apart"
        )


def _index(score: torch.Tensor) -> tuple[int, ...]:
    """Where `score` is largest."""
    return tuple(int(i) for i in torch.unravel_index(score.argmax().cpu(), score.shape))


@dataclass(frozen=True)
class Transition:
    """The arguments of a transition, and what is exact about it."""

    model_output: torch.Tensor
    sample: torch.Tensor
    prev_sample: torch.Tensor
    sample_coef: torch.Tensor
    output_coef: torch.Tensor
    std: torch.Tensor
    guidance_scale: float | None = None
    reduction: str = "mean"

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.model_output, self.sample, self.prev_sample, self.sample_coef, self.output_coef, self.std

    @property
    def step_tensors(self) -> tuple[torch.Tensor, ...]:
        """Those that `denoise_step` takes."""
        return self.model_output, self.sample, self.sample_coef, self.output_coef, self.std

    @property
    def options(self) -> dict[str, object]:
        return {"guidance_scale": self.guidance_scale, "reduction": self.reduction}

    def double(self) -> Transition:
        names = ("model_output", "sample", "prev_sample", "sample_coef", "output_coef", "std")
        return replace(self, **{name: getattr(self, name).detach().double().contiguous() for name in names})

    def row(self, i: int) -> Transition:
        n = len(self.sample)
        halves = self.model_output[i::n] if self.guidance_scale is not None else self.model_output[i : i + 1]
        names = ("sample", "prev_sample", "sample_coef", "output_coef", "std")
        return replace(self, model_output=halves, **{name: getattr(self, name)[i : i + 1] for name in names})

    @property
    def compute(self) -> torch.dtype:
        return F64 if any(t.dtype == F64 for t in (self.model_output, self.sample, self.prev_sample)) else F32


def transition(
    n: int, shape: tuple[int, ...], *, guidance_scale: float | None = None, reduction: str = "mean", output: torch.dtype = F32,
    latents: torch.dtype = F32, seed: int = 0,
) -> Transition:  # fmt: skip
    """Random, of the sizes that occur: x_{t-1} lies near its mean, which is near x_t. On DEVICE."""
    g = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=g)

    m = normal(2 * n if guidance_scale is not None else n, *shape).to(output)
    x = normal(n, *shape).to(latents)
    # b m is at most some tens of std: what it cancels of the residual's digits is what a schedule costs, not more.
    a, b = 1 + 0.05 * normal(n), -0.05 - 0.1 * torch.rand(n, generator=g)
    std = 0.2 + torch.rand(n, generator=g)
    column = (-1, *[1] * len(shape))
    out = m.float() if guidance_scale is None else m[:n].float() + guidance_scale * (m[n:].float() - m[:n].float())
    prev = a.reshape(column) * x.float() + b.reshape(column) * out + std.reshape(column) * normal(n, *shape)
    values = (m, x, prev.to(latents), a, b, std)
    return Transition(*(t.to(DEVICE) for t in values), guidance_scale=guidance_scale, reduction=reduction)


@dataclass(frozen=True)
class Exact:
    """Of a transition, in float64, with how far a kernel may be from it."""

    output: torch.Tensor  # m, guided
    output_slack: torch.Tensor  # what is rounded in m
    residual: torch.Tensor
    residual_slack: torch.Tensor
    log_prob: torch.Tensor
    log_prob_slack: torch.Tensor


def column(t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return t.reshape(-1, *[1] * (like.dim() - 1))


def exact(case: Transition) -> Exact:
    """Written out a second time, not taken from the reference, which it checks in passing."""
    from prdp_kernels import gaussian_log_prob

    d, s = case.double(), case.guidance_scale
    n, x = len(d.sample), d.sample
    if s is None:
        output, output_slack = d.model_output, torch.zeros_like(x)
    else:
        uncond, difference = d.model_output[:n], d.model_output[n:] - d.model_output[:n]
        output = uncond + s * difference
        output_slack = (s * difference).abs() + output.abs()
    a, b, std = (column(t, x) for t in (d.sample_coef, d.output_coef, d.std))
    moved = d.prev_sample - a * x
    residual = moved - b * output
    residual_slack = moved.abs() + (b * output_slack).abs() + residual.abs()
    # Without exact products, as in the reference, in this very function, and in the interpreter's float64:
    unfused_slack = residual_slack + d.prev_sample.abs() + (a * x).abs() + (b * output).abs()
    z, size = (residual / std).flatten(1), x[0].numel() if n else 1
    count = size if case.reduction == "mean" else 1
    constant = d.std.log() + 0.5 * math.log(2 * math.pi)
    log_prob = (-0.5 * z.square().sum(1) - size * constant) / count

    def log_prob_slack(slack: torch.Tensor) -> torch.Tensor:
        return ((z.abs() * (slack / std).flatten(1)).sum(1) + size * (d.std.log().abs() + 1)) / count

    by_reference = gaussian_log_prob(*d.tensors, **d.options, backend="torch")
    double = 2 * ROUNDINGS * unit_roundoff(F64)
    assert_close("the reference's log_prob", by_reference, log_prob, double * log_prob_slack(unfused_slack))
    if case.compute == F64:
        residual_slack, unit = unfused_slack, double
    else:
        unit = ROUNDINGS * unit_roundoff(F32)
    slack = log_prob_slack(residual_slack)
    return Exact(output, unit * output_slack, residual, unit * residual_slack, log_prob, unit * slack)


def exact_grad(case: Transition, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(gradient of sum(weights log_prob), how far a kernel may be from it before it is stored), like model_output."""
    e, d, s = exact(case), case.double(), case.guidance_scale
    x = d.sample
    slope = weights.double() * d.output_coef / d.std**2 / (x[0].numel() if case.reduction == "mean" and len(x) else 1)
    slope = column(slope, x)
    grad, slack = slope * e.residual, slope.abs() * e.residual_slack
    if s is None:
        return grad, slack
    return torch.cat([(1 - s) * grad, s * grad]), torch.cat([abs(1 - s) * slack, abs(s) * slack])


def check_log_prob(case: Transition, log_prob: torch.Tensor, *, rms: bool = True) -> None:
    e = exact(case)
    assert log_prob.dtype == case.compute
    assert_close("log_prob", log_prob, e.log_prob, e.log_prob_slack)
    if rms and case.sample[0].numel() >= 64:  # the square of one element may cancel most of log std
        assert_rms("log_prob", log_prob, e.log_prob)


def check_grad(case: Transition, weights: torch.Tensor, grad: torch.Tensor, *, rms: bool = True) -> None:
    expected, slack = exact_grad(case, weights)
    assert grad.dtype == case.model_output.dtype
    assert_close("grad", grad, expected, slack)
    if rms:
        assert_rms("grad", grad, expected)


# Two computations of one normal differ by at most this, relative. Words, u1 and the angle have equal bits: words are integers,
# the others one rounding each. Then log is off by an ulp, or 2 u, which the square root halves to u; the square root adds an ulp,
# 2 u (CUDA's approximation keeps to that); cos and sin two ulps, 4 u; the product u. That makes 8 u on either side.
NORMAL = 16 * unit_roundoff(F32)


def check_normals(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.dtype == F32
    assert_close("normals", got, expected, NORMAL * expected.double().abs())


# Layouts: functions that give the same values in another place. What lies around them is NaN, which shows when it is read.


def surrounded(shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    return torch.full(shape, math.nan, dtype=like.dtype, device=like.device)


def contiguous(t: torch.Tensor) -> torch.Tensor:
    return t.clone(memory_format=torch.contiguous_format)


def channels_last(t: torch.Tensor) -> torch.Tensor:
    """Also of rows that are no images: the first dimension of a row is the fastest."""
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


def of_trajectory(t: torch.Tensor) -> torch.Tensor:
    stored = surrounded((t.shape[0], 3, *t.shape[1:]), t)
    stored[:, 1] = t
    return stored[:, 1]


def of_halves(t: torch.Tensor) -> torch.Tensor:
    return torch.cat([surrounded(tuple(t.shape), t), t]).chunk(2)[1]


def every_other_row(t: torch.Tensor) -> torch.Tensor:
    stored = surrounded((2 * t.shape[0] + 1, *t.shape[1:]), t)
    stored[1::2] = t
    return stored[1::2]


def every_other_column(t: torch.Tensor) -> torch.Tensor:
    """Strided inside, with rows and columns that still merge into planes."""
    stored = surrounded((*t.shape[:-1], 2 * t.shape[-1]), t)
    stored[..., ::2] = t
    return stored[..., ::2]


def cropped(t: torch.Tensor) -> torch.Tensor:
    """Gaps between columns and rows: no planes."""
    stored = surrounded((*t.shape[:-1], t.shape[-1] + 3), t)
    stored[..., 1:-2] = t
    return stored[..., 1:-2]


def transposed(t: torch.Tensor) -> torch.Tensor:
    return t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.dim() > 2 else t.clone()


def off_by_one(t: torch.Tensor) -> torch.Tensor:
    """Begins at no multiple of 16 bytes."""
    stored = surrounded((t.numel() + 1,), t)
    stored[1:] = t.flatten()
    return stored[1:].view(t.shape)


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    f.__name__: f
    for f in (
        contiguous, channels_last, of_trajectory, of_halves, every_other_row, every_other_column, cropped, transposed, off_by_one,
    )
}  # fmt: skip
