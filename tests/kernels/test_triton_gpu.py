"""What only a GPU can show: tensors beyond 2^31 elements, streams, CUDA graphs, other devices, and no waiting for the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from compare import (
    BF16,
    DEVICE,
    F32,
    LAYOUTS,
    NORMAL,
    Transition,
    assert_close,
    assert_same_bits,
    check_grad,
    check_log_prob,
    check_normals,
    transition,
    unit_roundoff,
)

from prdp_kernels import denoise_step, gaussian_log_prob, gaussian_log_prob_and_grad, philox_normal, prdp_loss, prdp_loss_and_grad

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device: set PRDP_TEST_DEVICE=cuda where there is one"),
]

GUIDANCE = {"guidance_scale": 5.0}
ROW = (4, 512, 512)  # 2^20 elements


def needs(gigabytes: float) -> None:
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info(DEVICE)[0] / 1e9
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes:.0f} GB of GPU memory, {free:.0f} GB are free")


@pytest.fixture(autouse=True)
def give_memory_back():
    yield
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


def normal(*shape: int, dtype: torch.dtype = F32, seed: int = 0) -> torch.Tensor:
    """Without a float32 copy on the way."""
    return torch.empty(shape, dtype=dtype, device=DEVICE).normal_(generator=torch.Generator(DEVICE).manual_seed(seed))


def coefficients(n: int) -> list[torch.Tensor]:
    g = torch.Generator(DEVICE).manual_seed(1)
    a, b, std = (torch.rand(n, device=DEVICE, generator=g) for _ in range(3))
    return [1 + 0.1 * a, -0.05 - 0.1 * b, 0.2 + std]


def check_row(case: Transition, i: int, log_prob: torch.Tensor, grad: torch.Tensor, weights: torch.Tensor) -> None:
    """Row `i` of a large batch: right, and with the bits it has alone."""
    row, n = case.row(i), len(case.sample)
    check_log_prob(row, log_prob[i : i + 1])
    check_grad(row, weights[i : i + 1], grad[i::n])
    alone = gaussian_log_prob_and_grad(*row.tensors, weights[i : i + 1], **row.options, backend="triton")
    assert_same_bits(f"log_prob of row {i}", log_prob[i : i + 1], alone[0])
    assert_same_bits(f"grad of row {i}", grad[i::n], alone[1])


def test_more_than_2_31_elements_by_rows():
    """2049 rows of 2^20; the halves of the model output, too, lie more than 2^31 elements apart."""
    needs(45)
    n = 2049
    case = Transition(normal(2 * n, *ROW, dtype=BF16), normal(n, *ROW), normal(n, *ROW, seed=1), *coefficients(n), **GUIDANCE)
    assert case.sample.numel() > 2**31
    weights = normal(n) * 2**20
    log_prob, grad = gaussian_log_prob_and_grad(*case.tensors, weights, **case.options, backend="triton")
    for i in (0, 1, 1023, 1024, 2047, 2048):
        check_row(case, i, log_prob, grad, weights)
    del grad
    for begin in range(0, n, 64):
        rows = slice(begin, begin + 64)
        part = replace(
            case,
            model_output=torch.cat([case.model_output[:n][rows], case.model_output[n:][rows]]),
            **{name: getattr(case, name)[rows] for name in ("sample", "prev_sample", "sample_coef", "output_coef", "std")},
        )
        alone = gaussian_log_prob(*part.tensors, **part.options, backend="triton")
        assert_same_bits(f"log_prob of 64 rows from {begin}", log_prob[rows], alone)


def test_a_step_of_more_than_2_31_elements():
    needs(36)
    n = 2049
    case = Transition(
        normal(2 * n, *ROW, dtype=BF16), normal(n, *ROW), torch.zeros(n, device=DEVICE), *coefficients(n), **GUIDANCE
    )
    seeds = torch.arange(n, device=DEVICE)
    prev, log_prob = denoise_step(*case.step_tensors, seeds=seeds, step=3, **case.options, backend="triton")
    case = replace(case, prev_sample=prev)
    for i in (0, 1024, 2047, 2048):
        row = case.row(i)
        alone = denoise_step(*row.step_tensors, seeds=seeds[i : i + 1], step=3, **row.options, backend="triton")
        assert_same_bits(f"prev_sample of row {i}", prev[i : i + 1], alone[0])
        assert_same_bits(f"log_prob of row {i}", log_prob[i : i + 1], alone[1])
        check_log_prob(row, log_prob[i : i + 1])


def test_noise_of_more_than_2_31_elements():
    needs(11)
    n = 2049
    seeds = torch.arange(n, device=DEVICE)
    noise = philox_normal(seeds, ROW, step=1, backend="triton")
    for i in (0, 2047, 2048):
        expected = philox_normal(seeds[i : i + 1], ROW, step=1, backend="torch")
        assert_close(f"noise of row {i}", noise[i : i + 1], expected, NORMAL * expected.double().abs())


def test_a_row_of_more_than_2_31_elements():
    """One row: 2^18 programs and more, whose sums the last one adds up; pixels beyond 31 bits; noise blocks beyond 29."""
    needs(40)
    size = 2**31 + 8192 + 5
    m, x = normal(1, size, dtype=BF16), normal(1, size)
    a, b, std = coefficients(1)
    prev, log_prob = denoise_step(m, x, a, b, std, seeds=torch.tensor([7], device=DEVICE), backend="triton")
    again = gaussian_log_prob(m, x, prev, a, b, std, backend="triton")
    assert_same_bits("log_prob", again, log_prob)
    squares = torch.zeros((), dtype=torch.float64, device=DEVICE)
    for begin in range(0, size, 2**28):
        end = min(begin + 2**28, size)
        z = (prev[:, begin:end] - a.double() * x[:, begin:end] - b.double() * m[:, begin:end]) / std
        squares += z.square().sum()
        del z
    expected = -0.5 * squares / size - std.double().log() - 0.9189385332046727
    assert_close("log_prob", log_prob, expected, 1e-6 * (0.5 * squares / size + std.double().log().abs() + 1))
    # The very end, whose noise is that of a long row: the mean and what is left of it.
    tail = slice(size - 8192 - 5, size)
    left = (prev[:, tail] - a * x[:, tail] - b * m[:, tail]) / std
    assert abs(left.mean().item()) < 0.06 and 0.9 < left.std().item() < 1.1
    del left
    for begin, end in ((0, 2**20), (size - 2**20, size)):
        grad = gaussian_log_prob_and_grad(
            m[:, begin:end], x[:, begin:end], prev[:, begin:end], a, b, std, torch.ones_like(a), reduction="sum", backend="triton"
        )[1]
        expected = (prev[:, begin:end] - a.double() * x[:, begin:end] - b.double() * m[:, begin:end]) * (b / std**2).double()
        slack = 1e-5 * (prev[:, begin:end].double().abs() + x[:, begin:end].abs() + 1) * (b / std**2).double().abs()
        assert_close(f"grad from {begin}", grad, expected, slack)


def test_rows_of_a_trajectory_lie_beyond_2_31_elements():
    """What the engine passes: two neighbouring steps of a (rows, T + 1, C, H, W) tensor."""
    needs(16)
    trajectory = torch.empty(3, 1025, *ROW, device=DEVICE)
    assert 2 * trajectory.stride(0) > 2**31
    t = 1023
    trajectory[:, t : t + 2] = normal(3, 2, *ROW)
    case = Transition(normal(6, *ROW, dtype=BF16), trajectory[:, t], trajectory[:, t + 1], *coefficients(3), **GUIDANCE)
    weights = normal(3) * 2**20
    log_prob, grad = gaussian_log_prob_and_grad(*case.tensors, weights, **case.options, backend="triton")
    for i in range(3):
        check_row(case, i, log_prob, grad, weights)


def test_pixels_that_lie_far_apart():
    """Pixels as the slowest dimension: within one tile they span more than 2^31 elements."""
    needs(45)
    n, pixels = 2**20 + 1024, 2048
    stored = normal(pixels, n, dtype=BF16)
    m = stored.t().unsqueeze(1)  # (n, 1, pixels)
    assert m.stride(-1) * (pixels - 1) > 2**31
    x, prev = normal(n, 1, pixels), normal(n, 1, pixels, seed=1)
    rows, weights = coefficients(n), torch.full((n,), 2048.0, device=DEVICE)
    log_prob, grad = gaussian_log_prob_and_grad(m, x, prev, *rows, weights, backend="triton")
    expected_log_prob, expected_grad = gaussian_log_prob_and_grad(m.contiguous(), x, prev, *rows, weights, backend="triton")
    assert torch.equal(grad, expected_grad)
    assert_close("log_prob", log_prob, expected_log_prob, 2e-6 * (expected_log_prob.double().abs() + 4))


def test_a_loss_of_more_than_2_31_steps():
    needs(30)
    groups, images, steps = 16778, 128, 1000
    args = [normal(groups, images, steps, dtype=BF16, seed=seed) for seed in range(3)] + [normal(groups, images)]
    assert args[0].numel() > 2**31
    options = {"clip_range": 0.5, "kl_weight": 0.7}
    grad = prdp_loss_and_grad(*args, **options, backend="triton")[1]
    for i in (0, groups // 2, groups - 1):
        _, alone, _ = prdp_loss_and_grad(*(x[i : i + 1].double() for x in args), **options, backend="torch")
        alone = alone / groups
        assert_close(f"grad of group {i}", grad[i : i + 1], alone, 2 * unit_roundoff(F32) * alone.abs().max())


def small_calls(seed: int) -> dict[str, Callable[[], tuple[torch.Tensor, ...]]]:
    """Every kernel, with several programs a row where it can have them."""
    case = transition(7, (4, 64, 72), guidance_scale=5.0, output=BF16, seed=seed)  # 18,432 elements: nine programs a row
    seeds, weights = torch.arange(7, device=DEVICE) + 100 * seed, torch.ones(7, device=DEVICE)
    g = torch.Generator().manual_seed(seed)
    args = [torch.randn(33, 16, 50, generator=g).to(DEVICE) for _ in range(3)] + [torch.randn(33, 16, generator=g).to(DEVICE)]
    long = [torch.randn(5, 16, 300, generator=g).to(DEVICE) for _ in range(3)] + [torch.randn(5, 16, generator=g).to(DEVICE)]
    options = case.options | {"backend": "triton"}

    def split_loss() -> tuple[torch.Tensor, ...]:
        value, grad, stats = prdp_loss_and_grad(*long, clip_range=0.1, kl_weight=1e-3, backend="triton")
        return value, grad, *stats.values()

    def loss() -> tuple[torch.Tensor, ...]:
        value, grad, stats = prdp_loss_and_grad(*args, clip_range=0.1, kl_weight=1e-3, backend="triton")
        return value, grad, *stats.values()

    return {
        "log_prob_and_grad": lambda: gaussian_log_prob_and_grad(*case.tensors, weights, **options),
        "log_prob": lambda: (gaussian_log_prob(*case.tensors, **options),),
        "step": lambda: denoise_step(*case.step_tensors, seeds=seeds, **options),
        "noise": lambda: (philox_normal(seeds, (4, 64, 64), backend="triton"),),
        "loss": loss,
        "loss of groups in three launches": split_loss,
    }


def check_results(name: str, got: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    for i, (g, e) in enumerate(zip(got, expected, strict=True)):
        assert_same_bits(f"{name}, result {i}", g, e)


def test_two_streams_at_once():
    """Each has its own semaphores: programs of one launch must not be counted for another's."""
    calls = [small_calls(seed) for seed in range(2)]
    expected = [{name: call() for name, call in of.items()} for of in calls]
    torch.cuda.synchronize()
    streams, results = [torch.cuda.Stream() for _ in range(2)], []
    for _ in range(30):
        for which, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results += [(which, name, call()) for name, call in calls[which].items()]
    torch.cuda.synchronize()
    for which, name, got in results:
        check_results(f"{name} on stream {which}", got, expected[which][name])


def test_the_same_bits_under_load():
    """20 launches while matrix products occupy the device: programs of a row finish in another order every time."""
    calls = small_calls(0)
    expected = {name: call() for name, call in calls.items()}
    busy, matrix = torch.cuda.Stream(), normal(2048, 2048)
    torch.cuda.synchronize()
    results = []
    for _ in range(20):
        with torch.cuda.stream(busy):
            matrix = (matrix @ matrix).clamp(-1, 1)
        results += [(name, call()) for name, call in calls.items()]
    torch.cuda.synchronize()
    for name, got in results:
        check_results(name, got, expected[name])


@pytest.mark.parametrize("name", ["log_prob_and_grad", "log_prob", "step", "noise", "loss", "loss of groups in three launches"])
def test_replays_from_cuda_graphs_on_any_stream(name):
    calls = [small_calls(seed)[name] for seed in range(2)]
    expected = [call() for call in calls]  # compiled here: a capture could not
    torch.cuda.synchronize()
    graphs, captured = [torch.cuda.CUDAGraph() for _ in calls], []
    for graph, call in zip(graphs, calls, strict=True):
        with torch.cuda.graph(graph):
            captured.append(call())
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        for _ in range(3):
            for results in captured:
                for result in results:
                    result.fill_(float("nan"))
            torch.cuda.synchronize()
            with torch.cuda.stream(stream):
                graphs[0].replay()
            graphs[1].replay()  # at once with the other, where that has a stream of its own
            torch.cuda.synchronize()
            for got, right in zip(captured, expected, strict=True):
                check_results(f"{name} replayed", got, right)
    check_results(f"{name} after the replays", calls[0](), expected[0])


@pytest.mark.parametrize("output", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "shape", [(c, *plane) for c in (3, 4, 5, 16) for plane in ((128, 128), (96, 96), (65, 63), (3, 5))], ids=str
)
def test_the_sign_of_the_noise_on_every_path(shape, output):
    """Of compiled code: flat, planes of a multiple of four pixels, and odd ones. Once, one path of three had signs flipped."""
    n = 4
    m = LAYOUTS[output](torch.ones(n, *shape, dtype=BF16, device=DEVICE))
    zero, one = torch.zeros(n, device=DEVICE), torch.ones(n, device=DEVICE)
    seeds = torch.tensor([-5, 7914, 11, 2**62], device=DEVICE)
    for latents in (LAYOUTS["contiguous"], LAYOUTS["channels_last"]):
        x = latents(torch.ones(n, *shape, device=DEVICE))
        noise, _ = denoise_step(m, x, zero, zero, one, seeds=seeds, step=3, backend="triton")
        expected = philox_normal(seeds, shape, step=3, backend="torch")
        flipped = int(((noise + expected).abs() < (noise - expected).abs()).sum())
        assert not flipped, f"{flipped} of {noise.numel()} normals have the other sign"
        check_normals(noise, expected)


def test_semaphores_grow_with_the_batch():
    """More rows than the semaphores that are kept, then fewer again."""
    case = transition(5000, (16400,), output=BF16)
    together = gaussian_log_prob(*case.tensors, backend="triton")
    for rows in (slice(0, 3), slice(4998, 5000), slice(0, 4097)):
        part = Transition(*(t[rows] for t in case.tensors))
        assert_same_bits(f"rows {rows}", gaussian_log_prob(*part.tensors, backend="triton"), together[rows])
    check_log_prob(Transition(*(t[:50] for t in case.tensors)), together[:50])


def test_the_host_does_not_wait_for_the_device():
    calls = small_calls(0)
    m = transition(2, (4, 8, 8)).model_output.requires_grad_()
    case = transition(2, (4, 8, 8))
    lp = normal(2, 4, 5).requires_grad_()
    rewards = normal(2, 4)

    def backward() -> None:
        gaussian_log_prob(m, *case.tensors[1:], backend="triton").sum().backward()
        prdp_loss(lp, lp.detach(), lp.detach(), rewards, clip_range=0.1, kl_weight=1.0, backend="triton").backward()

    everything = [*calls.values(), backward]
    for call in everything:
        call()  # compiles, and makes semaphores and their pool
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for call in everything:
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_device_that_is_not_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    here = transition(3, (4, 64, 64), guidance_scale=5.0, output=BF16)
    there = replace(here, **{n: getattr(here, n).to("cuda:1") for n in (
        "model_output", "sample", "prev_sample", "sample_coef", "output_coef", "std")})  # fmt: skip
    results = []
    with torch.cuda.device(0):
        for case in (here, there):
            device = case.sample.device
            seeds, weights = torch.arange(3, device=device), torch.ones(3, device=device)
            log_probs = torch.arange(24.0, device=device).sin().reshape(2, 4, 3)
            loss = prdp_loss_and_grad(
                log_probs, log_probs, log_probs, log_probs[..., 0], clip_range=0.1, kl_weight=1.0, backend="triton"
            )
            results.append(
                (
                    *gaussian_log_prob_and_grad(*case.tensors, weights, **case.options, backend="triton"),
                    *denoise_step(*case.step_tensors, seeds=seeds, **case.options, backend="triton"),
                    philox_normal(seeds, (5, 7), backend="triton"),
                    *loss[:2],
                )
            )
            assert all(result.device == device for result in results[-1])
    check_results("on the other device", tuple(t.cpu() for t in results[1]), tuple(t.cpu() for t in results[0]))
