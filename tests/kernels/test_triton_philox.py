"""philox_normal by Triton against the reference, and its counter where no tensor reaches."""

from __future__ import annotations

import math

import pytest
import torch
from compare import BF16, DEVICE, LAYOUTS, assert_close, assert_same_bits, check_normals
from properties import given, settings, st

from prdp_kernels import denoise_step, layout, philox_normal
from prdp_kernels.philox import reference

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from prdp_kernels.philox.kernel import box_muller, tile_normals  # noqa: E402


# One element, a block and less, tiles with and without an edge, two programs with an edge.
@pytest.mark.parametrize("shape", [(), (1,), (3,), (4, 8, 8), (3, 5, 7), (1031, 3), (8191,), (2, 4, 33, 32)], ids=str)
def test_equals_the_reference(shape, device):
    seeds = torch.tensor([0, -1, 2**63 - 1, -(2**63)], device=device)
    for step in (0, 2**32 - 1):
        got = philox_normal(seeds, shape, step=step, backend="triton")
        assert got.shape == (4, *shape) and got.is_contiguous()
        check_normals(got, philox_normal(seeds, shape, step=step, backend="torch"))


# By the code that makes the noise: flat; planes of a multiple of four pixels, where a counter serves four neighbours; planes of
# other sizes, where every element has a counter of its own. The last plane of each is larger than a tile.
PATHS = [
    (path, (channels, *plane))
    for path, planes in {
        "flat": [(4, 6), (3, 5)],
        "aligned planes": [(4, 6), (2, 2), (34, 66)],
        "unaligned planes": [(3, 5), (7, 7), (33, 65)],
    }.items()
    for plane in planes
    for channels in (3, 4, 5, 16)
]


@pytest.mark.parametrize(("path", "shape"), PATHS, ids=str)
def test_every_path_makes_the_noise_of_the_reference(path, shape, device):
    """The step with coefficients 0 and std 1 writes its noise, sign and all; its log-prob is that of the noise, too."""
    n = 2
    seeds = torch.tensor([-5, 2**62 + 7], device=device)
    m, x = torch.ones(n, *shape, dtype=BF16, device=device), torch.ones(n, *shape, device=device)
    if path != "flat":
        m = LAYOUTS["channels_last"](m)
    tile = layout.rows([m, x], in_order=True).tile
    assert (tile.flat, tile.flat or tile.pixels % 4 == 0) == (path == "flat", path != "unaligned planes")
    zero, one = torch.zeros(n, device=device), torch.ones(n, device=device)
    noise, log_prob = denoise_step(m, x, zero, zero, one, seeds=seeds, step=3, backend="triton")
    expected = philox_normal(seeds, shape, step=3, backend="torch")
    check_normals(noise, expected)
    expected_log_prob = -0.5 * expected.double().square().flatten(1).mean(1) - 0.5 * math.log(2 * math.pi)
    assert ((log_prob.double() - expected_log_prob).abs() < 1e-5).all()


def test_steps_may_differ_by_row(device):
    seeds, steps = torch.tensor([3, 3, -7], device=device), torch.tensor([0, 49, 2**32 - 1], device=device)
    rows = philox_normal(seeds, (10,), step=steps, backend="triton")
    check_normals(rows, philox_normal(seeds, (10,), step=steps, backend="torch"))
    for i, step in enumerate(steps.tolist()):
        assert_same_bits(f"row {i}", rows[i : i + 1], philox_normal(seeds[i : i + 1], (10,), step=step, backend="triton"))
    spread = torch.stack([steps + 2**32, steps], 1)[:, 0]  # strided, and of each only the low 32 bits count
    assert_same_bits("strided steps", philox_normal(seeds, (10,), step=spread, backend="triton"), rows)
    assert_same_bits("strided seeds", philox_normal(seeds.repeat(2)[::2][:2], (5,), backend="triton")[0],
                     philox_normal(seeds[:1], (5,), backend="triton")[0])  # fmt: skip


def test_an_element_depends_on_seed_step_and_index_alone(device):
    seeds = torch.tensor([4, -9, 2**40], device=device)
    long = philox_normal(seeds, (9000,), step=5, backend="triton")
    for shape in ((1,), (3, 5, 7), (4, 16, 16), (8200,)):
        rows = philox_normal(seeds, shape, step=5, backend="triton")
        assert_same_bits(f"a row of {shape}", rows.flatten(1), long[:, : math.prod(shape)])
        for i in range(3):
            alone = philox_normal(seeds[i : i + 1], shape, step=5, backend="triton")
            assert_same_bits(f"row {i} of {shape} alone", alone, rows[i : i + 1])
    assert_same_bits("rows in reverse", philox_normal(seeds.flip(0), (9000,), step=5, backend="triton"), long.flip(0))


def test_empty(device):
    assert philox_normal(torch.zeros(0, dtype=torch.int64, device=device), (4, 2), backend="triton").shape == (0, 4, 2)
    assert philox_normal(torch.tensor([1], device=device), (0, 3), backend="triton").shape == (1, 0, 3)


@triton.jit
def noise_from(
    out_ptr, seed, step, start, pixels,
    FLAT: tl.constexpr, ALIGNED: tl.constexpr, C_BLOCK: tl.constexpr, P_BLOCK: tl.constexpr,
):  # fmt: skip
    """The tile of noise at pixel `start`, which may be any."""
    start = tl.full((), start, tl.int64)
    normals = tile_normals(
        tl.full((), seed, tl.int64), tl.full((), step, tl.int64).to(tl.uint32), start, pixels, FLAT, ALIGNED, C_BLOCK, P_BLOCK
    )
    if FLAT:
        tl.store(out_ptr + tl.arange(0, P_BLOCK), normals)
    else:
        tl.store(out_ptr + tl.arange(0, C_BLOCK)[:, None] * P_BLOCK + tl.arange(0, P_BLOCK)[None, :], normals)


# An index that needs 34 bits has block 2^32, which needs the counter's second word; 2^34 - 256 lies just before.
@pytest.mark.parametrize("start", [0, 2**32, 2**34 - 256, 2**34, 2**34 + 2**36 + 512, 2**62])
@pytest.mark.parametrize(("channels", "pixels", "aligned"), [(1, 2**62, True), (4, 2**34 + 4, True), (4, 2**33 + 1, False)])
def test_blocks_beyond_32_bits(start, channels, pixels, aligned, device):
    seed, step, block = -3, 2**32 - 2, 256 // channels
    out = torch.full((channels, block), math.nan, device=device)
    noise_from[(1,)](out, seed, step, start, pixels, channels == 1, aligned, channels, block)
    element = start + torch.arange(block) + (torch.arange(channels) * (pixels if channels > 1 else 0)).unsqueeze(1)
    counter = (*reference.split(element // 4), torch.tensor(step), torch.tensor(reference.NORMAL_STREAM))
    a, b, c, d = reference.philox_4x32_10(counter, reference.split(torch.tensor(seed)))
    four = torch.stack([*reference.box_muller(a, b), *reference.box_muller(c, d)], -1)
    check_normals(out, four.gather(-1, (element % 4).unsqueeze(-1)).squeeze(-1).to(device))


@triton.jit
def normals_of_words(x_ptr, y_ptr, out_ptr, SIZE: tl.constexpr, ROW: tl.constexpr):
    at = tl.arange(0, SIZE)
    first, second = box_muller(tl.load(x_ptr + at).to(tl.uint32), tl.load(y_ptr + at).to(tl.uint32))
    tl.store(out_ptr + at, first)
    tl.store(out_ptr + ROW + at, second)


def test_box_muller_at_the_ends_of_its_range(device):
    """u1 next to 0 and 1; angles at and beside multiples of pi / 4, where cos and sin vanish or the reduction changes sides."""
    ends = [0, 1, 2, 2**31, 2**32 - 2**8, 2**32 - 2**7 - 1, 2**32 - 2**7, 2**32 - 1]
    eighths = [min(max(k * 2**29 + d, 0), 2**32 - 1) for k in range(9) for d in (-(2**9), -1, 0, 1, 2**9)]
    x, y = (t.flatten() for t in torch.meshgrid(torch.tensor(ends), torch.tensor(eighths), indexing="ij"))
    size = triton.next_power_of_2(len(x))
    x, y = (torch.cat([t, t[:1].expand(size - len(t))]).to(device) for t in (x, y))
    out = torch.full((2, size), math.nan, device=device)
    normals_of_words[(1,)](x, y, out, size, size)
    assert out.abs().max() < 6.77
    check_normals(out, torch.stack(reference.box_muller(x, y)))


def test_box_muller_is_right_to_a_few_roundings(device):
    """Against float64, from the float32 u1 and angle that are the same everywhere. In u = 2^-24 of a normal: log 1.5, which
    the square root halves; the square root 2, as CUDA approximates it; cos and sin 2.2; the product 1. That is 6 u.

    A log-prob is a mean over thousands of squares, in which errors of one sign do not cancel: a row's mean square may be off by
    4 u, which is .12e-6 of a log-prob. One wrong digit in the logarithm of 2 made it 13 u, and no normal off by more than 13.
    """
    size, u = 2**15, 2.0**-24
    x, y = torch.randint(0, 2**32, (2, size), generator=torch.Generator().manual_seed(0))
    out = torch.full((2, size), math.nan, device=device)
    for start in range(0, size, 1024):
        normals_of_words[(1,)](x[start : start + 1024].to(device), y[start : start + 1024].to(device), out[:, start:], 1024, size)
    u1, angle = ((x.float() + 0.5) * 2.0**-32).double(), (y.float() * 2.0**-32 * (2 * math.pi)).double()
    exact = (-2 * u1.log()).sqrt() * torch.stack([angle.cos(), angle.sin()])
    assert_close("normals", out, exact.to(device), 6 * u * exact.abs().to(device))
    bias = ((out.double().square().sum() - exact.to(device).square().sum()) / exact.square().sum()).item()
    assert abs(bias) <= 4 * u, f"the mean square is off by {bias / u:.1f} roundings"


@settings(deadline=None, max_examples=25, derandomize=True)
@given(
    st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=3),
    st.lists(st.integers(1, 6), max_size=3),
    st.integers(0, 2**32 - 1),
)
def test_any_seed_shape_and_step(seeds, shape, step):
    seeds = torch.tensor(seeds, device=DEVICE)
    check_normals(
        philox_normal(seeds, shape, step=step, backend="triton"), philox_normal(seeds, shape, step=step, backend="torch")
    )
