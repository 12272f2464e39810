"""group_norm by Triton against float64, with its gradients.

How far a result may be off. Every float32 operation adds at most u = 2^-24 of its result, and a chain from x to a result is no
longer than ROUNDINGS. What is rounded on the way to xhat = (h - mean) rstd is of the size of (|h| + |mean|) rstd, a mean far from
zero included. From there the errors are carried on: through z = xhat weight + bias, through SiLU, whose first two derivatives are
below 1.1 and 0.5, and through the sums of the backward, as sums of what each term may be off.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from compare import (
    BF16,
    DEVICE,
    F16,
    F32,
    F64,
    INTERPRETED,
    LAYOUTS,
    ROUNDINGS,
    assert_close,
    assert_rms,
    assert_same_bits,
    unit_roundoff,
)

from prdp_kernels import group_norm

pytest.importorskip("triton")

# Where a sigmoid is 0, a GPU says nothing of the exponential before it, and NumPy, which computes for the interpreter, warns.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

NAMES = ("y", "dx", "dweight", "dbias", "dshift")

# (N, C, H, W), groups; by how a row is cut into tiles and chunks.
SHAPES = {
    "one pixel": ((1, 6, 1, 1), 2),
    "one tile": ((2, 32, 4, 4), 8),
    "odd": ((3, 40, 5, 7), 4),
    "one group": ((2, 24, 5, 3), 1),
    "a group a channel": ((2, 8, 6, 5), 8),
    "two blocks of channels, one short": ((2, 96, 3, 5), 32),
    "two chunks, one short": ((2, 64, 9, 9), 32),
    "nine chunks of two tiles, one short": ((1, 64, 33, 33), 32),
    "groups across blocks of channels": ((1, 320, 5, 4), 32),
    "groups that a tile does not hold at once": ((1, 2560, 2, 2), 32),
}


@dataclass(frozen=True)
class Case:
    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    shift: torch.Tensor | None
    upstream: torch.Tensor
    groups: int
    silu: bool
    eps: float = 1e-5

    def run(self, backend: str = "triton") -> list[torch.Tensor]:
        """y, and the gradients of sum(upstream y)."""
        given = [t if t is None else t.detach().requires_grad_() for t in (self.x, self.weight, self.bias, self.shift)]
        y = group_norm(*given[:3], self.groups, self.eps, shift=given[3], silu=self.silu, backend=backend)
        return [y.detach(), *torch.autograd.grad(y, [t for t in given if t is not None], self.upstream)]

    def double(self) -> Case:
        return replace(self, **{k: v.double() for k, v in vars(self).items() if isinstance(v, torch.Tensor)})


def case_of(shape, groups, *, shift=True, silu=True, dtype=F32, mean=0.5, seed=0) -> Case:
    g = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=g)

    n, channels = shape[:2]
    values = (mean + 2 * normal(*shape), 1 + 0.5 * normal(channels), normal(channels), normal(n, channels), normal(*shape))
    x, weight, bias, added, upstream = (t.to(DEVICE, dtype) for t in values)
    return Case(x, weight, bias, added if shift else None, upstream, groups, silu)


def exact(case: Case) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(value, how far a kernel may be off before it is stored) of everything that `run` returns, written out in float64."""
    d = case.double()
    unit = ROUNDINGS * unit_roundoff(F32) if case.x.dtype != F64 else 2 * ROUNDINGS * unit_roundoff(F64)
    n, channels = d.x.shape[:2]

    def grouped(t: torch.Tensor) -> torch.Tensor:
        return t.reshape(n, case.groups, -1)

    def of_group(t: torch.Tensor) -> torch.Tensor:
        """The mean over a group, at each of its elements."""
        return grouped(t).mean(2, keepdim=True).expand(-1, -1, grouped(t).shape[2]).reshape(t.shape)

    column = (1, channels, 1, 1)
    weight, bias = d.weight.reshape(column), d.bias.reshape(column)
    h = d.x if d.shift is None else d.x + d.shift[:, :, None, None]
    mean = of_group(h)
    rstd = (of_group((h - mean) ** 2) + case.eps).rsqrt()
    xhat = (h - mean) * rstd
    # rstd itself is a sum over the group: its error is relative, and xhat's grows with it.
    far = of_group((h.abs() + mean.abs() + (h - d.x).abs()) * rstd) + (h.abs() + mean.abs() + (h - d.x).abs()) * rstd
    xhat_slack = far + xhat.abs() * of_group(xhat.abs() * far)
    z = xhat * weight + bias
    z_slack = xhat_slack * weight.abs() + (xhat * weight).abs() + bias.abs()
    s = torch.sigmoid(z)
    if case.silu:
        y, y_slack, slope = z * s, 1.1 * z_slack + z.abs(), s * (1 + z * (1 - s))
        g, g_slack = d.upstream * slope, d.upstream.abs() * (1 + z.abs() + 0.5 * z_slack)
    else:
        y, y_slack, g, g_slack = z, z_slack, d.upstream, d.upstream.abs() * 0
    plain, scaled = g, g * xhat
    scaled_slack = g_slack * xhat.abs() + g.abs() * xhat_slack + scaled.abs()
    plain_slack = g_slack + g.abs()
    a, b = of_group(weight * plain), of_group(weight * scaled)
    a_slack, b_slack = of_group(weight.abs() * plain_slack), of_group(weight.abs() * scaled_slack)
    dx = rstd * (weight * g - a - xhat * b)
    inner = weight.abs() * plain_slack + a_slack + a.abs() + xhat_slack * b.abs() + xhat.abs() * (b_slack + b.abs())
    dx_slack = rstd * inner * (1 + of_group(xhat.abs() * far)) + dx.abs()

    def over(t: torch.Tensor, *dims: int) -> torch.Tensor:
        return t.sum(dims)

    found = [
        (y, y_slack), (dx, dx_slack), (over(scaled, 0, 2, 3), over(scaled_slack, 0, 2, 3)),
        (over(plain, 0, 2, 3), over(plain_slack, 0, 2, 3)),
    ]  # fmt: skip
    if d.shift is not None:
        found.append((over(dx, 2, 3), over(dx_slack, 2, 3)))
    return [(value, unit * slack) for value, slack in found]


def check(case: Case, got: list[torch.Tensor] | None = None) -> None:
    expected = exact(case)
    by_reference = case.double().run("torch")
    for name, result, other, (value, slack) in zip(NAMES, got or case.run(), by_reference, expected):
        assert_close(f"the reference's {name}", other, value, slack * (1 if case.x.dtype == F64 else 2**-20))
        assert result.dtype == case.x.dtype
        assert_close(name, result, value, slack)


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(shape, shift, silu):
    check(case_of(*shape, shift=shift, silu=silu))


@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64])
@pytest.mark.parametrize("name", ["odd", "two chunks, one short"])
def test_dtypes(name, dtype):
    case = case_of(*SHAPES[name], dtype=dtype)
    check(case)
    if dtype in (F32, F64):
        for what, result, (value, _) in zip(NAMES, case.run(), exact(case)):
            assert_rms(what, result, value)


def test_weights_of_another_dtype():
    """Norms kept in float32 beside a model in half precision."""
    case = case_of(*SHAPES["odd"], dtype=BF16)
    mixed = replace(case, weight=case.weight.float(), bias=case.bias.float())
    y, dx, dweight, dbias, dshift = mixed.run()
    assert (y.dtype, dx.dtype, dweight.dtype, dbias.dtype, dshift.dtype) == (BF16, BF16, F32, F32, BF16)
    for name, result, (value, slack) in zip(NAMES, (y, dx, dweight, dbias, dshift), exact(mixed)):
        assert_close(name, result, value, slack)


def test_a_mean_far_from_zero_costs_its_own_digits_only():
    case = case_of(*SHAPES["nine chunks of two tiles, one short"], mean=3000.0)
    check(case)
    y, exact_y = case.run()[0].double(), exact(case)[0][0]
    # A sum of squares about zero would be off by u mean^2 / variance, 0.1 here: nothing of the norm would be left.
    assert (y - exact_y).abs().max() < 3000 * 4 * unit_roundoff(F32) * case.weight.abs().max() * 1.1


def test_constant_groups_are_finite():
    case = case_of(*SHAPES["odd"], shift=False)
    constant = replace(case, x=torch.full_like(case.x, 7.0))
    for name, result in zip(NAMES, constant.run()):
        assert result.isfinite().all(), name
    y = torch.nn.functional.silu(case.bias.double())[None, :, None, None].expand_as(case.x)
    assert_close("y", constant.run()[0], y, 1e-6)


def test_nan_stays_in_its_group():
    case = case_of(*SHAPES["odd"])
    broken = case.x.clone()
    broken[1, 0, 2, 3] = math.nan  # row 1, group 0: channels 0 to 9
    y, dx, *_ = replace(case, x=broken).run()
    good, good_dx, *_ = case.run()
    for result, right in ((y, good), (dx, good_dx)):
        assert result[1, :10].isnan().all()
        assert_same_bits("the rest of the row", result[1, 10:], right[1, 10:])
        assert_same_bits("another row", result[2], right[2])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_have_the_same_bits(layout):
    case = case_of(*SHAPES["two chunks, one short"])
    moved = replace(case, x=LAYOUTS[layout](case.x), upstream=LAYOUTS[layout](case.upstream))
    for name, result, right in zip(NAMES, moved.run(), case.run()):
        assert_same_bits(name, result, right)


def test_results_are_channels_last():
    y, dx, *_ = case_of(*SHAPES["odd"]).run()
    assert y.is_contiguous(memory_format=torch.channels_last) and dx.is_contiguous(memory_format=torch.channels_last)


def test_a_row_has_the_same_bits_in_every_batch():
    case = case_of((3, 64, 9, 9), 32)
    y, dx, _, _, dshift = case.run()
    for i in range(3):
        one = replace(case, x=case.x[i : i + 1], shift=case.shift[i : i + 1], upstream=case.upstream[i : i + 1])
        alone = one.run()
        for name, result, whole in (("y", alone[0], y), ("dx", alone[1], dx), ("dshift", alone[4], dshift)):
            assert_same_bits(f"{name} of row {i}", result[0], whole[i])


def test_twice_the_same_bits():
    case = case_of(*SHAPES["nine chunks of two tiles, one short"])
    for name, first, second in zip(NAMES, case.run(), case.run()):
        assert_same_bits(name, first, second)


def test_no_rows():
    case = case_of((0, 8, 3, 3), 2)
    y, dx, dweight, dbias, dshift = case.run()
    assert y.shape == dx.shape == (0, 8, 3, 3) and dshift.shape == (0, 8)
    assert not dweight.any() and not dbias.any()


def test_no_gradient_is_asked_for():
    case = case_of(*SHAPES["odd"])
    with torch.no_grad():
        y = group_norm(case.x, case.weight, case.bias, case.groups, shift=case.shift, silu=True, backend="triton")
    assert not y.requires_grad
    assert_same_bits("y", y, case.run()[0])


@pytest.mark.parametrize("shift", [True, False])
def test_registered_with_torch(shift):
    case = case_of(*SHAPES["odd"], shift=shift)
    added = None if case.shift is None else case.shift.detach().requires_grad_()
    given = [t.detach().requires_grad_() for t in (case.x, case.weight, case.bias)]
    operator = torch.ops.prdp_kernels.group_norm.default
    torch.library.opcheck(operator, (*given, added, case.groups, case.eps, True))
    y = operator(*given, added, case.groups, case.eps, True)[0]
    wanted = given if added is None else [*given, added]
    for name, result, right in zip(NAMES, [y, *torch.autograd.grad(y, wanted, case.upstream)], case.run()):
        assert_same_bits(name, result, right)


@pytest.mark.skipif(INTERPRETED, reason="the reference is what a CPU runs")
def test_auto_takes_the_kernels():
    case = case_of(*SHAPES["odd"])
    for name, result, right in zip(NAMES, case.run("auto"), case.run("triton")):
        assert_same_bits(name, result, right)


def test_faults():
    case = case_of(*SHAPES["odd"])
    x, weight, bias = case.x, case.weight, case.bias
    for words, error, args, options in (
        ("x must be a torch.Tensor, got list", TypeError, ([1.0], weight, bias, 4), {}),
        ("x must be floating point, got torch.int64", TypeError, (x.long(), weight, bias, 4), {}),
        (r"x has shape \(3, 40, 35\), expected \(N, C, H, W\)", ValueError, (x.flatten(2), weight, bias, 4), {}),
        ("groups is 3, expected a divisor of the 40 channels of x", ValueError, (x, weight, bias, 3), {}),
        ("eps is 0, expected a number > 0", ValueError, (x, weight, bias, 4, 0), {}),
        (r"weight has shape \(39,\), expected \(40,\)", ValueError, (x, weight[1:], bias, 4), {}),
        (r"shift has shape \(40,\), expected \(3, 40\)", ValueError, (x, weight, bias, 4), {"shift": bias}),
        ("unknown backend 'cuda'", ValueError, (x, weight, bias, 4), {"backend": "cuda"}),
    ):
        with pytest.raises(error, match=words):
            group_norm(*args, **options)
