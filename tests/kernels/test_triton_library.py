"""The kernels as PyTorch operators: registration, tracing, compilation, CUDA graphs."""

from __future__ import annotations

import pytest
import torch
from compare import BF16, DEVICE, F32, F64, INTERPRETED, assert_same_bits, transition

from prdp_kernels import (
    denoise_step,
    gaussian_log_prob,
    gaussian_log_prob_and_grad,
    philox_normal,
    prdp_loss,
    prdp_loss_and_grad,
)

pytest.importorskip("triton")

OPS = torch.ops.prdp_kernels
SHAPE = (2, 3, 4)


def loss_args(dtype=F32, groups=2, images=4, steps=3):
    g = torch.Generator().manual_seed(0)
    sizes = [(groups, images, steps)] * 3 + [(groups, images)]
    return [torch.randn(size, generator=g, dtype=F64).to(dtype).to(DEVICE) for size in sizes]


def samples():
    """(name, operator, arguments) of every registered operator, with and without what is optional."""
    for scale in (None, 2.0):
        for output, latents in ((F32, F32), (BF16, F32), (F64, F64)):
            case = transition(3, SHAPE, guidance_scale=scale, output=output, latents=latents)
            options, weights = (scale, "mean"), torch.ones(3, device=DEVICE)
            name = f"{output} {'guided' if scale else 'plain'}"
            m = case.model_output.detach()
            yield f"log_prob {name}", OPS.gaussian_log_prob.default, (m.clone().requires_grad_(), *case.tensors[1:], *options)
            yield f"and_grad {name}", OPS.gaussian_log_prob_and_grad.default, (m, *case.tensors[1:], weights, *options)
            yield f"grad {name}", OPS.gaussian_log_prob_grad.default, (m, *case.tensors[1:], weights, *options)
            seeds, steps = torch.arange(3, device=DEVICE), torch.arange(3, device=DEVICE)
            step_args = (m, *case.step_tensors[1:])
            yield f"step noise {name}", OPS.denoise_step.default, (*step_args, case.prev_sample, None, None, 0, *options)
            yield f"step seeds {name}", OPS.denoise_step.default, (*step_args, None, seeds, steps, 0, *options)
    m, *rest = case.tensors
    last = m.to(memory_format=torch.channels_last)
    yield "channels-last", OPS.gaussian_log_prob.default, (last.requires_grad_(), *rest, 2.0, "sum")
    yield "philox", OPS.philox_normal.default, (seeds, [2, 3], None, 5)
    yield "philox steps", OPS.philox_normal.default, (seeds, [7], steps, 0)
    for dtype in (F32, F64):
        log_probs, *others = loss_args(dtype)
        yield f"loss {dtype}", OPS.prdp_loss.default, (log_probs.requires_grad_(), *others, 0.1, 0.5)


SAMPLES = {name: (op, args) for name, op, args in samples()}


# Those of a denoiser's layers, whose own tests check their registration: test_triton_geglu.py and test_triton_group_norm.py.
OF_LAYERS = {f"prdp_kernels::{name}{part}" for name in ("geglu", "group_norm") for part in ("", "_backward")}


def test_every_operator_is_sampled():
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("prdp_kernels::")}
    assert registered == {op.name() for op, _ in SAMPLES.values()} | OF_LAYERS


@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck(name):
    op, args = SAMPLES[name]
    torch.library.opcheck(op, args)


@pytest.mark.parametrize("name", SAMPLES)
def test_fake_outputs_have_the_strides_of_real_ones(name):
    op, args = SAMPLES[name]
    real = op(*(a.detach() if isinstance(a, torch.Tensor) else a for a in args))
    mode = torch._subclasses.FakeTensorMode()
    traced = [mode.from_tensor(a.detach()) if isinstance(a, torch.Tensor) else a for a in args]
    with mode:
        fake = op(*traced)
    for r, f in zip(*((t,) if isinstance(t, torch.Tensor) else t for t in (real, fake)), strict=True):
        assert (r.shape, r.stride(), r.dtype, r.device.type) == (f.shape, f.stride(), f.dtype, f.device.type)


def everything(m, x, prev, a, b, std, seeds, log_probs, old, ref, rewards):
    """Every public function, one after the other, and a loss that reaches `m` and `log_probs`."""
    options = {"guidance_scale": 2.0, "backend": "triton"}
    noise = philox_normal(seeds, (2, 3, 4), step=3, backend="triton").to(x.dtype)
    moved, step_log_prob = denoise_step(m, x, a, b, std, noise=noise, **options)
    again, _ = denoise_step(m, x, a, b, std, seeds=seeds, step=seeds.abs(), **options)
    log_prob = gaussian_log_prob(m, x, prev, a, b, std, **options)
    at_once, grad = gaussian_log_prob_and_grad(m, x, prev, a, b, std, log_prob.detach(), reduction="sum", **options)
    settings = {"clip_range": 0.1, "kl_weight": 0.5, "backend": "triton"}
    loss = prdp_loss(log_probs, old, ref, rewards, **settings)
    value, weights, stats = prdp_loss_and_grad(log_probs, old, ref, rewards, **settings)
    total = loss + (log_prob * step_log_prob).sum() + 0.5 * (m.float() ** 2).sum()
    return total, moved, again, at_once, grad, value, weights, *stats.values()


def arguments(n, dtype=F32, output=None):
    case = transition(n, SHAPE, guidance_scale=2.0, output=output or dtype, latents=dtype)
    m, *rest = case.tensors
    log_probs, *others = loss_args(dtype)
    return [m.detach().requires_grad_(), *rest, torch.arange(n, device=DEVICE) - 1, log_probs.requires_grad_(), *others]


def compare_compiled(compiled, args):
    results = []
    for function in (everything, compiled):
        leaves = [a.detach().clone().requires_grad_(a.requires_grad) for a in args]
        out = function(*leaves)
        out[0].backward()
        results.append([*out, leaves[0].grad, leaves[7].grad])
    for i, (eager, traced) in enumerate(zip(*results, strict=True)):
        assert_same_bits(f"result {i}", traced.detach(), eager.detach())


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_compiles_into_one_graph(dtype):
    torch._dynamo.reset()
    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    compare_compiled(compiled, arguments(3, dtype))


def test_compiles_with_a_dynamic_batch():
    torch._dynamo.reset()
    graphs = []

    def counting(graph, example_inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example_inputs)

    compiled = torch.compile(everything, fullgraph=True, backend=counting)
    for n in (3, 5, 8):
        args = arguments(n, output=BF16)
        # The batch of the model output is twice the others': marking them lets the tracer find that out.
        for i in range(7):
            torch._dynamo.maybe_mark_dynamic(args[i], 0)
        leaves = [a.detach().clone().requires_grad_(a.requires_grad) for a in args]
        for i in range(7):
            torch._dynamo.maybe_mark_dynamic(leaves[i], 0)
        eager, traced = everything(*args), compiled(*leaves)
        for i, (e, t) in enumerate(zip(eager, traced, strict=True)):
            assert_same_bits(f"result {i} of {n} rows", t.detach(), e.detach())
        eager[0].backward()
        traced[0].backward()
        assert_same_bits("grad", leaves[0].grad, args[0].grad)
    assert len(graphs) == 1, f"traced {len(graphs)} times for three batch sizes"


def test_gradients_that_triton_has_not_are_refused():
    case = transition(2, SHAPE)
    for position, name in ((1, "sample"), (2, "prev_sample"), (3, "sample_coef"), (4, "output_coef"), (5, "std")):
        args = [t.clone() for t in case.tensors]
        args[position].requires_grad_()
        with pytest.raises(NotImplementedError, match=r"gaussian_log_prob: Triton's gradient reaches model_output only; detach"):
            gaussian_log_prob(*args, backend="triton")
        with torch.no_grad():
            gaussian_log_prob(*args, backend="triton")  # nothing is asked of the gradient
        assert not denoise_step(*(args[i] for i in (0, 1, 3, 4, 5)), noise=case.sample, backend="triton")[0].requires_grad, name
    args = [t.clone() for t in case.tensors]
    args[1].requires_grad_()
    assert gaussian_log_prob(*args, backend="torch").requires_grad


def test_no_gradient_is_recorded_unless_asked():
    case = transition(2, SHAPE)
    assert not gaussian_log_prob(*case.tensors, backend="triton").requires_grad
    m = case.model_output.detach().requires_grad_()
    assert gaussian_log_prob(m, *case.tensors[1:], backend="triton").requires_grad
    for result in gaussian_log_prob_and_grad(m, *case.tensors[1:], torch.ones_like(case.std), backend="triton"):
        assert not result.requires_grad


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="CUDA graphs need CUDA: set PRDP_TEST_DEVICE=cuda")
def test_replays_from_a_cuda_graph_with_new_inputs():
    args = [a.detach() for a in arguments(3)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), torch.no_grad():
        everything(*args)  # compiles, which a capture must not
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        captured = everything(*args)
    for scale in (1.0, 0.5):
        for i in (0, 1, 2):
            args[i].mul_(scale)
        graph.replay()
        with torch.no_grad():
            eager = everything(*args)
        for i, (c, e) in enumerate(zip(captured, eager, strict=True)):
            assert_same_bits(f"result {i}", c, e)
