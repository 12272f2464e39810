"""geglu by Triton against float64, with its gradient.

Allowed errors: ROUNDINGS roundings, each u = 2^-24 of what was rounded. The error function is good to some ulps of 1, and 1 + erf
cancels for negative gates: c is off by u of 1, not of itself. The same of the slope, c + gate times a density of at most 0.4.
"""

from __future__ import annotations

import math

import pytest
import torch
from compare import BF16, DEVICE, F16, F32, F64, LAYOUTS, ROUNDINGS, assert_close, assert_same_bits, unit_roundoff

from prdp_kernels import geglu

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

SHAPES = [(2,), (6,), (1, 1, 2), (3, 5, 26), (2, 7, 256), (2, 17, 264), (1, 3, 2560)]


def tensors(shape, dtype=F32, scale=2.0):
    g = torch.Generator().manual_seed(0)
    half = (*shape[:-1], shape[-1] // 2)
    return (scale * torch.randn(shape, generator=g)).to(DEVICE, dtype), torch.randn(half, generator=g).to(DEVICE, dtype)


def run(x, upstream, backend="triton"):
    x = x.detach().requires_grad_()
    y = geglu(x, backend=backend)
    return y.detach(), torch.autograd.grad(y, x, upstream)[0]


def check(x, upstream):
    y, dx = run(x, upstream)
    assert y.dtype == dx.dtype == x.dtype
    (h, gate), up = x.double().chunk(2, -1), upstream.double()
    share = 0.5 * (1 + torch.erf(gate / math.sqrt(2)))
    slope = share + gate * torch.exp(-gate * gate / 2) / math.sqrt(2 * math.pi)
    unit = 2 * ROUNDINGS * unit_roundoff(F64) if x.dtype == F64 else ROUNDINGS * unit_roundoff(F32)
    by_reference = run(x.double(), up, "torch")
    expected = h * gate * share, torch.cat([up * gate * share, up * h * slope], -1)
    for name, value, other in zip(("y", "dx"), expected, by_reference, strict=True):
        assert_close(f"the reference's {name}", other, value, 1e-13 * (1 + value.abs().max().item()))
    assert_close("y", y, expected[0], unit * (h * gate).abs())
    allowed = [(up * gate).abs(), (up * h).abs() * (1 + gate.abs() * (1 + gate * gate))]
    assert_close("dx", dx, expected[1], unit * torch.cat(allowed, -1))


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape):
    check(*tensors(shape))


@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64])
def test_dtypes(dtype):
    check(*tensors((3, 5, 26), dtype))
    check(*tensors((2, 7, 256), dtype))


def test_large_gates_open_and_close():
    x = torch.tensor([[3.0, -2.0, 5.0, 30.0, -30.0, -1e4]], device=DEVICE)
    y, dx = run(x, torch.ones(1, 3, device=DEVICE))
    assert_close("y", y, torch.tensor([[90.0, 0.0, 0.0]], device=DEVICE).double(), 1e-5)
    assert_close("dx", dx, torch.tensor([[30.0, 0.0, 0.0, 3.0, 0.0, 0.0]], device=DEVICE).double(), 1e-5)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "every_other_column"])
def test_layouts_have_the_same_bits(layout):
    x, upstream = tensors((2, 5, 26))
    for name, result, right in zip(
        ("y", "dx"), run(LAYOUTS[layout](x), LAYOUTS[layout](upstream)), run(x, upstream), strict=True
    ):
        assert_same_bits(name, result, right)


def test_registered_with_torch():
    x, upstream = tensors((3, 5, 26))
    leaf = x.detach().requires_grad_()
    operator = torch.ops.prdp_kernels.geglu.default
    torch.library.opcheck(operator, (leaf,))
    y = operator(leaf)
    for name, result, right in zip(("y", "dx"), (y, torch.autograd.grad(y, leaf, upstream)[0]), run(x, upstream), strict=True):
        assert_same_bits(name, result, right)


def test_nothing_to_do_and_faults():
    assert geglu(torch.zeros(0, 4, device=DEVICE), backend="triton").shape == (0, 2)
    for x, error, words in (
        (torch.zeros(2, 3), ValueError, r"x has shape \(2, 3\), expected \(..., 2 width\)"),
        (torch.zeros(2, 4, dtype=torch.int32), TypeError, "x must be floating point, got torch.int32"),
        (None, TypeError, "x must be a torch.Tensor, got NoneType"),
    ):
        with pytest.raises(error, match=words):
            geglu(x)
