"""gaussian_log_prob, gaussian_log_prob_and_grad and denoise_step by Triton, against float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from compare import (
    BF16,
    F16,
    F32,
    F64,
    INTERPRETED,
    LAYOUTS,
    NORMAL,
    ROUNDINGS,
    Transition,
    assert_close,
    assert_rms,
    assert_same_bits,
    check_grad,
    check_log_prob,
    column,
    exact,
    transition,
    unit_roundoff,
)
from properties import given, settings, st

from prdp_kernels import denoise_step, gaussian_log_prob, gaussian_log_prob_and_grad, philox_normal

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from prdp_kernels.tile import tile_pointers  # noqa: E402

# Where a kernel makes infinity or NaN, a GPU says nothing, and NumPy, which computes for the interpreter, warns.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

# By what decides how a row is cut: one tile with and without an edge, several tiles, several programs, the last of them short.
FLAT = {
    "one element": (1,),
    "1-D": (37,),
    "odd": (3, 5, 7),
    "a tile of 128": (4, 4, 8),
    "four tiles, one short": (1031, 3),
    "one program of a large row": (8, 41, 25),
    "nine programs, the last with one element": (16385,),
    "nine programs of four tiles, the last with one element": (65537,),
    "video": (2, 3, 5, 7),
}
PLANES = {
    "1-D": (6,),
    "odd": (3, 5, 7),
    "a multiple of 4": (4, 6, 10),
    "one program, four tiles": (5, 33, 35),  # a tile spans 8 channels and 512 pixels
    "four programs, one short": (5, 33, 105),  # and here 256 pixels, a program 1024
    "64 channels": (64, 11, 12),  # and here 32 pixels, 128 a program
    "65 channels, copied": (65, 3, 4),
    "video": (4, 3, 4, 6),
    "one channel": (1, 6, 7),
}


def weights_of(case: Transition) -> torch.Tensor:
    """Upstream gradients that keep a half-precision gradient away from its subnormals."""
    size = case.sample[0].numel() if case.reduction == "mean" and len(case.sample) else 1
    g = torch.Generator().manual_seed(5)
    return (torch.randn(len(case.sample), generator=g) * size).to(case.sample.device)


def log_prob_and_backward(case: Transition, weights: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    m = case.model_output.detach().requires_grad_()
    log_prob = gaussian_log_prob(m, *case.tensors[1:], **case.options, backend="triton")
    log_prob.backward(weights_of(case).to(log_prob.dtype) if weights is None else weights)
    return log_prob.detach(), m.grad


def both_at_once(case: Transition) -> tuple[torch.Tensor, torch.Tensor]:
    return gaussian_log_prob_and_grad(*case.tensors, weights_of(case), **case.options, backend="triton")


def step(case: Transition, **kwargs: object) -> tuple[torch.Tensor, torch.Tensor]:
    return denoise_step(*case.step_tensors, **case.options, **kwargs, backend="triton")


def check_step(
    case: Transition, noise: torch.Tensor, result: tuple[torch.Tensor, torch.Tensor], *, slack: float = 0.0, rms: bool = True
) -> None:
    """x_{t-1} = mu + std noise to rounding; the log-prob is that of the x_{t-1} which came out. slack: relative, of the noise."""
    prev, log_prob = result
    d, e = case.double(), exact(case)
    a, b, std = (column(t, d.sample) for t in (d.sample_coef, d.output_coef, d.std))
    drawn = std * noise.double()
    expected = a * d.sample + b * e.output + drawn
    unit = ROUNDINGS * unit_roundoff(case.compute)
    allowed = unit * (drawn.abs() + (b * e.output).abs() + expected.abs()) + b.abs() * e.output_slack + slack * drawn.abs()
    if case.compute == F64:
        allowed = allowed + unit * (a * d.sample).abs()
    assert prev.dtype == log_prob.dtype == case.compute
    assert_close("prev_sample", prev, expected, allowed)
    if rms and slack == 0:
        assert_rms("prev_sample", prev, expected)
    check_log_prob(replace(case, prev_sample=prev), log_prob, rms=rms)


def stores_gradients(case: Transition) -> bool:
    """Triton's interpreter makes NaN of a float64 that becomes bf16: it has no such cast, and takes the bits of an integer."""
    return not (INTERPRETED and case.compute == F64 and case.model_output.dtype == BF16)


def noise_like(t: torch.Tensor, dtype: torch.dtype = F32) -> torch.Tensor:
    return torch.randn(t.shape, generator=torch.Generator().manual_seed(9)).to(t.device, dtype)


def seeds_of(case: Transition) -> torch.Tensor:
    return torch.arange(len(case.sample), device=case.sample.device) * 7919 - 5


def check_everything(case: Transition) -> None:
    log_prob, grad = log_prob_and_backward(case)
    check_log_prob(case, log_prob)
    check_grad(case, weights_of(case), grad)
    again, at_once = both_at_once(case)
    assert_same_bits("log_prob, alone and with its gradient", again, log_prob)
    assert_same_bits("grad, by backward and with the log-prob", at_once, grad)
    noise = noise_like(case.sample)
    check_step(case, noise, step(case, noise=noise))


# On a GPU every variant of a kernel takes a fifth of a second to compile: there, some combinations stand for all of them.
@pytest.mark.parametrize("reduction", ["mean", "sum"] if INTERPRETED else ["mean"])
@pytest.mark.parametrize("guidance_scale", [None, 5.0])
@pytest.mark.parametrize("shape", FLAT.values(), ids=FLAT)
def test_contiguous(shape, guidance_scale, reduction):
    check_everything(transition(2, shape, guidance_scale=guidance_scale, reduction=reduction))


@pytest.mark.parametrize("guidance_scale", [None, 5.0])
@pytest.mark.parametrize("shape", PLANES.values(), ids=PLANES)
def test_channels_last_output(shape, guidance_scale):
    case = transition(2, shape, guidance_scale=guidance_scale, reduction="sum" if len(shape) == 4 else "mean")
    check_everything(replace(case, model_output=LAYOUTS["channels_last"](case.model_output)))


@pytest.mark.parametrize("latents", [F32, F64], ids=str)
@pytest.mark.parametrize("output", [BF16, F16, F32, F64], ids=str)
def test_dtypes(output, latents):
    for guidance_scale, shape in ((None, (3, 5, 7)), (-2.0, (4, 8, 9))):
        case = transition(2, shape, guidance_scale=guidance_scale, output=output, latents=latents)
        if stores_gradients(case):
            check_everything(case)
        check_log_prob(case, gaussian_log_prob(*case.tensors, **case.options, backend="triton"))
        noise = noise_like(case.sample, BF16 if latents == F32 else F64)
        check_step(case, noise, step(case, noise=noise))
    mixed = replace(case, prev_sample=case.prev_sample.to(F32 if latents == F64 else F64))
    check_log_prob(mixed, both_at_once(mixed)[0])


@pytest.mark.parametrize("guidance_scale", [0.0, 1.0, -3, 7.5])
def test_guidance_scales(guidance_scale):
    check_everything(transition(3, (2, 3, 4), guidance_scale=guidance_scale))


@pytest.mark.parametrize("of_output", LAYOUTS)
def test_layouts(of_output):
    """Any layout of any tensor gives the bits of contiguous ones where a result is elementwise, and a right sum."""
    case = transition(2, (3, 4, 6), guidance_scale=3.0)
    noise, names = noise_like(case.sample), list(LAYOUTS)
    plain_grad, (plain_prev, _) = log_prob_and_backward(case)[1], step(case, noise=noise)
    first = names.index(of_output)
    for i, of_sample in enumerate(names):
        if not INTERPRETED and (i + first) % 3:
            continue
        of_prev = names[(i + first) % len(names)]  # on a CPU every pair of layouts comes up
        moved = replace(
            case,
            model_output=LAYOUTS[of_output](case.model_output),
            sample=LAYOUTS[of_sample](case.sample),
            prev_sample=LAYOUTS[of_prev](case.prev_sample),
        )
        where = f"({of_output}, {of_sample}, {of_prev})"
        log_prob, grad = log_prob_and_backward(moved)
        check_log_prob(moved, log_prob)
        assert_same_bits(f"grad of {where}", grad, plain_grad)
        prev, log_prob = step(moved, noise=LAYOUTS[of_prev](noise))
        assert_same_bits(f"prev_sample of {where}", prev, plain_prev)
        check_log_prob(replace(case, prev_sample=prev), log_prob)


@pytest.mark.parametrize("of_output", ["contiguous", "channels_last", "every_other_column", "transposed"])
def test_noise_does_not_depend_on_the_layout(of_output):
    """Elements are numbered by their index, wherever they lie; sizes that are and are not a multiple of a block of four."""
    for shape in ((3, 3, 5), (4, 4, 8), (5, 33, 32)):
        case = transition(2, shape, output=BF16)
        plain = step(case, seeds=seeds_of(case), step=3)[0]
        moved = replace(case, model_output=LAYOUTS[of_output](case.model_output), sample=LAYOUTS["channels_last"](case.sample))
        result = step(moved, seeds=seeds_of(case), step=3)
        noise = philox_normal(seeds_of(case), shape, step=3, backend="torch")
        check_step(moved, noise, result, slack=NORMAL)
        check_step(case, noise, (plain, step(case, seeds=seeds_of(case), step=3)[1]), slack=NORMAL)


def test_all_channels_last_rows_are_not_numbered_by_memory():
    case = transition(2, (3, 4, 8))
    moved = replace(case, **{name: LAYOUTS["channels_last"](getattr(case, name)) for name in ("model_output", "sample")})
    prev, log_prob = step(moved, seeds=seeds_of(case))
    assert prev.is_contiguous(memory_format=torch.channels_last)
    noise = philox_normal(seeds_of(case), (3, 4, 8), backend="torch")
    check_step(moved, noise, (prev, log_prob), slack=NORMAL)


@pytest.mark.parametrize("shape", [(3, 5, 7), (4, 8, 8), (9001,)], ids=str)
def test_seeds_are_philox_noise(shape):
    case = transition(3, shape, guidance_scale=2.0)
    seeds = torch.tensor([5, -6, 2**62], device=case.sample.device)
    for number in (7, 2**32 - 1, torch.tensor([0, 3, 2**35 + 49], device=seeds.device)):
        noise = philox_normal(seeds, shape, step=number, backend="torch")
        check_step(case, noise, step(case, seeds=seeds, step=number), slack=NORMAL)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("latents", [F32, F64], ids=str)
def test_deterministic_rows(latents, reduction):
    """std 0: x_{t-1} is the mean, the log-prob a placeholder; rows beside it do not notice. In one program a row and in nine."""
    for shape in ((3, 5, 7), (17000,)):
        case = transition(3, shape, guidance_scale=2.0, latents=latents, reduction=reduction)
        noise, hole = noise_like(case.sample, latents), case.std.clone()
        hole[1] = 0
        prev, log_prob = step(replace(case, std=hole), noise=noise)
        full = step(case, noise=noise)
        without = step(case, noise=torch.zeros_like(noise))[0]
        assert log_prob[1].item() == 0
        assert_same_bits("the mean", prev[1], without[1])
        for got, expected in zip((prev, log_prob), full, strict=True):
            assert_same_bits("the other rows", got[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("guidance_scale", [None, 5.0])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_log_prob_of_a_step_has_the_bits_of_its_evaluation(reduction, guidance_scale, layout):
    for shape in ((3, 5, 7), (5, 33, 105) if layout == "channels_last" else (17000,)):
        case = transition(2, shape, guidance_scale=guidance_scale, reduction=reduction, output=BF16)
        case = replace(case, model_output=LAYOUTS[layout](case.model_output))
        prev, log_prob = step(case, seeds=seeds_of(case), step=4)
        again = gaussian_log_prob(*replace(case, prev_sample=prev).tensors, **case.options, backend="triton")
        assert_same_bits("log_prob", again, log_prob)


@pytest.mark.parametrize(
    ("shape", "layout"),
    [((3, 5, 7), "contiguous"), ((4, 9, 8), "channels_last"), ((10001,), "contiguous"), ((17001,), "contiguous")],
    ids=str,
)
def test_rows_do_not_depend_on_their_batch(shape, layout):
    case = transition(3, shape, guidance_scale=2.0, output=BF16)
    case = replace(case, model_output=LAYOUTS[layout](case.model_output))
    noise = noise_like(case.sample)
    together = (*both_at_once(case), *step(case, noise=noise), step(case, seeds=seeds_of(case), step=2)[0])
    for i in range(3):
        row = case.row(i)
        weights = weights_of(case)[i : i + 1]
        alone = (
            *gaussian_log_prob_and_grad(*row.tensors, weights, **row.options, backend="triton"),
            *step(row, noise=noise[i : i + 1]),
            step(row, seeds=seeds_of(case)[i : i + 1], step=2)[0],
        )
        for name, got, whole in zip(("log_prob", "grad", "prev_sample", "its log_prob", "by seed"), alone, together, strict=True):
            assert_same_bits(f"{name} of row {i}", got, whole[i::3] if name == "grad" else whole[i : i + 1])


def test_same_bits_twice():
    case = transition(2, (17001,), guidance_scale=2.0, output=F16)
    for call in (both_at_once, log_prob_and_backward, lambda c: step(c, seeds=seeds_of(c))):
        for first, second in zip(call(case), call(case), strict=True):
            assert_same_bits("the second time", second, first)


def test_more_partial_sums_than_one_read_takes():
    """130 programs a row: the one that comes last reads 128 sums, then two."""
    case = transition(1, (129 * 8192 + 1,))
    check_log_prob(case, gaussian_log_prob(*case.tensors, backend="triton"))


def test_no_rows():
    for guidance_scale in (None, 2.0):
        case = transition(0, (4, 8, 8), guidance_scale=guidance_scale, output=BF16)
        for log_prob, grad in (log_prob_and_backward(case), both_at_once(case)):
            assert log_prob.shape == (0,) and log_prob.dtype == F32
            assert grad.shape == case.model_output.shape and grad.dtype == BF16
        prev, log_prob = step(case, seeds=seeds_of(case))
        assert prev.shape == case.sample.shape and prev.dtype == log_prob.dtype == F32 and log_prob.shape == (0,)


def test_upstream_gradients_of_every_kind():
    case = transition(3, (4, 5), guidance_scale=2.0)
    ones = torch.ones(3, device=case.sample.device)
    for name, reduce in (("sum", torch.sum), ("mean", torch.mean), ("one row", lambda t: t[1])):
        m = case.model_output.detach().requires_grad_()
        reduce(gaussian_log_prob(m, *case.tensors[1:], **case.options, backend="triton")).backward()
        upstream = {"sum": ones, "mean": ones / 3, "one row": torch.eye(3, device=ones.device)[1]}[name]
        check_grad(case, upstream, m.grad, rms=name != "one row")
    strided = torch.randn(6, device=ones.device)[::2]
    check_grad(case, strided, log_prob_and_backward(case, strided)[1])
    assert (log_prob_and_backward(case, 0 * ones)[1] == 0).all()
    # Twice through one graph adds up.
    m = case.model_output.detach().requires_grad_()
    log_prob = gaussian_log_prob(m, *case.tensors[1:], **case.options, backend="triton")
    (grad,) = torch.autograd.grad(log_prob.sum(), m, retain_graph=True)
    log_prob.sum().backward()
    log_prob = gaussian_log_prob(m, *case.tensors[1:], **case.options, backend="triton")
    log_prob.sum().backward()
    assert_same_bits("two gradients", m.grad, 2 * grad)


def test_gradient_goes_on_through_the_model():
    """A stand-in for the U-Net: the gradient that reaches its parameter is that of plain torch."""
    case, grads = transition(2, (2, 3, 4), guidance_scale=2.0), []
    for backend, dtype in (("triton", F32), ("torch", F64)):
        c = case if dtype == F32 else case.double()
        scale = torch.tensor(0.7, dtype=dtype, device=c.sample.device, requires_grad=True)
        weights = weights_of(case).to(dtype)
        (gaussian_log_prob(c.model_output * scale.sin(), *c.tensors[1:], **c.options, backend=backend) * weights).sum().backward()
        grads.append(scale.grad)
    assert_close("the parameter's gradient", grads[0], grads[1], 1e-6 * grads[1].abs())


@pytest.mark.parametrize("spread", ["expanded", "column of a table", "float64"])
def test_coefficients(spread):
    case = transition(3, (3, 5, 7), guidance_scale=2.0)
    rows = {}
    for name in ("sample_coef", "output_coef", "std"):
        value = getattr(case, name)
        if spread == "expanded":
            value = value[:1].expand(3)
        elif spread == "float64":
            value = value.double()
        else:
            table = torch.full((3, 4), math.nan, device=value.device)
            table[:, 2] = value
            value = table[:, 2]
        rows[name] = value
    moved = replace(case, **rows)
    dense = replace(case, **{name: value.float().contiguous() for name, value in rows.items()})
    noise = noise_like(case.sample)
    check_log_prob(dense, log_prob_and_backward(dense)[0])
    for call in (both_at_once, lambda c: step(c, noise=noise)):
        for got, expected in zip(call(moved), call(dense), strict=True):
            assert_same_bits("result", got, expected)


def test_rows_may_share_memory():
    """One latent, expanded to all rows; one model output broadcast over its channels."""
    case = transition(3, (3, 4, 6))
    moved = replace(
        case, sample=case.sample[:1].expand(3, -1, -1, -1), model_output=case.model_output[:, :1].expand(-1, 3, -1, -1)
    )
    check_log_prob(moved, both_at_once(moved)[0])
    check_grad(moved, weights_of(case), both_at_once(moved)[1])
    noise = noise_like(case.sample)[:1].expand(3, -1, -1, -1)
    check_step(moved, noise, step(moved, noise=noise))


def test_inputs_are_left_alone():
    case = transition(2, (10001,), guidance_scale=2.0, output=BF16)
    noise = noise_like(case.sample)
    inputs = (*case.tensors, noise, weights_of(case), seeds_of(case))
    copies = [t.clone() for t in inputs]
    log_prob_and_backward(case, inputs[-2])
    gaussian_log_prob_and_grad(*case.tensors, inputs[-2], **case.options, backend="triton")
    step(case, noise=noise)
    step(case, seeds=inputs[-1])
    for i, (after, before) in enumerate(zip(inputs, copies, strict=True)):
        assert_same_bits(f"input {i}", after, before)


def test_non_finite_numbers_stay_visible_in_their_row():
    for where in ("model_output", "sample", "prev_sample"):
        for bad in (math.nan, math.inf):
            case = transition(2, (9000,))
            value = getattr(case, where).clone()
            value[1, 8999] = bad
            broken = replace(case, **{where: value})
            (log_prob, grad), plain = both_at_once(broken), both_at_once(case)
            assert not log_prob[1].isfinite() and not grad[1, 8999].isfinite(), f"{bad} in {where}"
            assert_same_bits("the other row's log_prob", log_prob[0], plain[0][0])
            assert_same_bits("the other elements' grad", grad[1, :8999], plain[1][1, :8999])


@triton.jit
def bytes_from_row(
    row_ptr, out_ptr, start, c_stride, p_stride: tl.constexpr, FLAT: tl.constexpr, C_BLOCK: tl.constexpr, P_BLOCK: tl.constexpr
):
    """How far from the beginning of a row the pointers of a tile are; nothing is read there."""
    start = tl.full((), start, tl.int64)
    distance = tile_pointers(row_ptr, start, c_stride, p_stride, FLAT, C_BLOCK, P_BLOCK).to(tl.int64) - row_ptr.to(tl.int64)
    if FLAT:
        tl.store(out_ptr + tl.arange(0, P_BLOCK), distance)
    else:
        tl.store(out_ptr + tl.arange(0, C_BLOCK)[:, None] * P_BLOCK + tl.arange(0, P_BLOCK)[None, :], distance)


# A tile of every kind and a stride beyond 32 bits, of channels, of pixels, and of pixels only when multiplied by a tile's.
@pytest.mark.parametrize(
    ("start", "c_stride", "p_stride", "c_block", "p_block"),
    [
        (2**33, 0, 1, 1, 2048),
        (2**31 - 2048, 0, 1, 1, 2048),
        (512, 2**33, 1, 4, 512),
        (2**31, 2**31 - 1, 64, 64, 32),
        (2**20, 1, 2**21, 1, 2048),
        (0, 1, 2**20 + 8, 1, 2048),
        (4096, 1, 2**33, 8, 256),
    ],
)
def test_offsets_beyond_32_bits(start, c_stride, p_stride, c_block, p_block, device):
    flat = c_block == 1 and p_stride == 1
    out = torch.zeros(c_block, p_block, dtype=torch.int64, device=device)
    bytes_from_row[(1,)](torch.zeros(1, device=device), out, start, c_stride, p_stride, flat, c_block, p_block)
    expected = torch.arange(c_block).unsqueeze(1) * c_stride + (start + torch.arange(p_block)) * p_stride
    assert torch.equal(out.cpu(), 4 * expected)


@st.composite
def transitions(draw):
    """Any shape of rows, layouts, dtypes, and coefficients from the whole of a schedule."""
    dims = draw(st.sampled_from([(1, 1), (1, 3), (3, 1, 1), (2, 5), (7,), (130,), (4, 4, 8), (3, 5, 7), (5, 9, 4), (2, 2, 3, 3)]))
    guidance_scale = draw(st.sampled_from([None, 0.0, 1.0, 5.0, -4.5]))
    case = transition(
        draw(st.integers(1, 3)), dims, guidance_scale=guidance_scale, reduction=draw(st.sampled_from(["mean", "sum"])),
        output=draw(st.sampled_from([F16, BF16, F32, F64])), latents=draw(st.sampled_from([F32, F32, F64])),
        seed=draw(st.integers(0, 100)),
    )  # fmt: skip
    names = ("model_output", "sample", "prev_sample")
    layouts = {name: draw(st.sampled_from(list(LAYOUTS))) for name in names}
    far = draw(st.sampled_from([0.0, 1.0, 100.0]))  # x_{t-1} this many units off its mean
    case = replace(case, prev_sample=case.prev_sample + far)
    n = len(case.std)
    number = st.floats(-2, 2, width=32).map(lambda v: 0.0 if abs(v) < 1e-3 else v)
    rows = [draw(st.lists(number, min_size=n, max_size=n)) for _ in range(2)]
    rows.append(draw(st.lists(st.floats(2.0**-10, 2, width=32), min_size=n, max_size=n)))
    a, b, std = (torch.tensor(row, device=case.sample.device) for row in rows)
    case = replace(case, sample_coef=a, output_coef=b, std=std)
    return replace(case, **{name: LAYOUTS[how](getattr(case, name)) for name, how in layouts.items()})


@settings(deadline=None, max_examples=40 if INTERPRETED else 8, derandomize=True)
@given(transitions())
def test_any_transition(case):
    # The bound of each element is its own; a tensor that is all cancellation has no small relative RMS error.
    log_prob, grad = log_prob_and_backward(case, torch.ones(len(case.std), dtype=case.compute, device=case.std.device))
    check_log_prob(case, log_prob, rms=False)
    if case.model_output.dtype != F16 and stores_gradients(case):  # a small std overflows the range of fp16
        check_grad(case, torch.ones_like(case.std), grad, rms=False)
    noise = noise_like(case.sample)
    check_step(case, noise, step(case, noise=noise), rms=False)
