"""gaussian_log_prob and denoise_step against ddpo-pytorch's DDIM step, finite differences and each other."""

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from compare import DEVICE
from properties import given, settings, st

from prdp_kernels import denoise_step, gaussian_log_prob, philox_normal
from prdp_kernels.gaussian_log_prob import reference

ORACLE = np.load(Path(__file__).parents[1] / "data" / "ddim_eta1.npz")


def coefficients(prediction, alpha, alpha_prev):
    """DDIM with eta 1, from its textbook form: x0 and eps are linear in (x, m), mu = sqrt(a') x0 + sqrt(1 - a' - var) eps."""
    variance = (1 - alpha_prev) / (1 - alpha) * (1 - alpha / alpha_prev)
    root, noise = alpha.sqrt(), (1 - alpha).sqrt()
    if prediction == "epsilon":
        x0, eps = (1 / root, -noise / root), (0.0, 1.0)
    else:  # v_prediction
        x0, eps = (root, -noise), (noise, root)
    a, b = alpha_prev.sqrt(), (1 - alpha_prev - variance).sqrt()
    return a * x0[0] + b * eps[0], a * x0[1] + b * eps[1], variance.sqrt()


def oracle(prediction, steps, precision):
    case = {
        name: torch.from_numpy(ORACLE[f"{prediction}_T{steps}_{precision}_{name}"])
        for name in ("model_output", "x_t", "x_prev", "mean", "std", "log_prob", "grad_model_output", "t", "prev_t_used")
    }
    alphas = torch.from_numpy(ORACLE[f"{prediction}_T{steps}_f64_alphas_cumprod"])
    table = coefficients(prediction, alphas[case["t"]], alphas[case["prev_t_used"]])
    case["coefficients"] = [c.to(case["x_t"].dtype) for c in table]
    return case


CASES = [(p, t, prec) for p in ("epsilon", "v_prediction") for t in (10, 50) for prec in ("f64", "f32")]
BACKENDS = ["torch", "triton"] if importlib.util.find_spec("triton") else ["torch"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("prediction", "steps", "precision"), CASES)
def test_log_prob_and_gradient_equal_ddpo(prediction, steps, precision, backend):
    case = oracle(prediction, steps, precision)
    where = DEVICE if backend == "triton" else "cpu"
    tolerance = {"f64": 1e-12, "f32": 1e-5}[precision]
    m = case["model_output"].clone().to(where).requires_grad_()
    mean = reference.transition_mean(case["model_output"], case["x_t"], *case["coefficients"][:2], None)
    arguments = (x.to(where) for x in (case["x_t"], case["x_prev"], *case["coefficients"]))
    log_prob = gaussian_log_prob(m, *arguments, backend=backend)
    log_prob.sum().backward()
    assert log_prob.dtype == case["log_prob"].dtype
    torch.testing.assert_close(case["coefficients"][2], case["std"], atol=tolerance, rtol=0)
    torch.testing.assert_close(mean, case["mean"], atol=tolerance, rtol=0)
    torch.testing.assert_close(log_prob.cpu(), case["log_prob"], atol=tolerance, rtol=0)
    torch.testing.assert_close(m.grad.cpu(), case["grad_model_output"], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("prediction", "steps", "precision"), CASES)
def test_step_equals_ddpo_with_its_noise(prediction, steps, precision, backend):
    case = oracle(prediction, steps, precision)
    where = DEVICE if backend == "triton" else "cpu"
    tolerance = {"f64": 1e-12, "f32": 1e-5}[precision]
    noise = (case["x_prev"] - case["mean"]) / case["std"].reshape(-1, 1, 1, 1)
    arguments = (x.to(where) for x in (case["model_output"], case["x_t"], *case["coefficients"]))
    prev, log_prob = (x.cpu() for x in denoise_step(*arguments, noise=noise.to(where), backend=backend))
    torch.testing.assert_close(prev, case["x_prev"], atol=tolerance, rtol=0)
    torch.testing.assert_close(log_prob, case["log_prob"], atol=tolerance, rtol=0)


def batch(n=3, shape=(2, 3, 2), *, guided=False, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    m = torch.randn((2 * n if guided else n, *shape), generator=g, dtype=dtype)
    x, prev = (torch.randn((n, *shape), generator=g, dtype=dtype) for _ in range(2))
    sample_coef, output_coef = (torch.randn(n, generator=g, dtype=dtype) for _ in range(2))
    return m, x, prev, sample_coef, output_coef, torch.rand(n, generator=g, dtype=dtype) + 0.05


@pytest.mark.parametrize("guidance_scale", [None, 0.0, 1.0, 5.0, -2])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_formula_element_by_element(guidance_scale, reduction):
    m, x, prev, a, b, std = batch(guided=guidance_scale is not None)
    got = gaussian_log_prob(m, x, prev, a, b, std, guidance_scale=guidance_scale, reduction=reduction)
    for i in range(len(x)):
        terms = []
        for at in np.ndindex(*x.shape[1:]):
            out = m[(i, *at)].item()
            if guidance_scale is not None:
                out += guidance_scale * (m[(len(x) + i, *at)].item() - out)
            residual = prev[(i, *at)].item() - a[i].item() * x[(i, *at)].item() - b[i].item() * out
            terms.append(-(residual**2) / (2 * std[i].item() ** 2) - math.log(std[i].item()) - 0.5 * math.log(2 * math.pi))
        expected = sum(terms) / (len(terms) if reduction == "mean" else 1)
        assert got[i].item() == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("guidance_scale", [None, 5.0])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradcheck(guidance_scale, reduction):
    m, *rest = batch(guided=guidance_scale is not None)
    weights = torch.tensor([-3.0, 0.5, 1e3], dtype=torch.float64)

    def weighted(m):
        return weights * gaussian_log_prob(m, *rest, guidance_scale=guidance_scale, reduction=reduction)

    assert torch.autograd.gradcheck(weighted, m.requires_grad_())


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 5),
    st.lists(st.integers(1, 7), min_size=1, max_size=4),
    st.one_of(st.none(), st.floats(-10, 10)),
    st.sampled_from(["mean", "sum"]),
    st.integers(0, 1000),
)
def test_any_shape_gradient_in_closed_form(n, shape, guidance_scale, reduction, seed):
    m, x, prev, a, b, std = batch(n, tuple(shape), guided=guidance_scale is not None, seed=seed)
    upstream = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    log_prob = gaussian_log_prob(m.requires_grad_(), x, prev, a, b, std, guidance_scale=guidance_scale, reduction=reduction)
    log_prob.backward(upstream)
    column = [-1] + [1] * len(shape)
    with torch.no_grad():
        out = m if guidance_scale is None else m[:n] + guidance_scale * (m[n:] - m[:n])
        scale = (upstream * b / std**2).reshape(column) / (math.prod(shape) if reduction == "mean" else 1)
        grad = scale * (prev - a.reshape(column) * x - b.reshape(column) * out)
    if guidance_scale is not None:
        grad = torch.cat([(1 - guidance_scale) * grad, guidance_scale * grad])
    torch.testing.assert_close(m.grad, grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("guidance_scale", [None, 5.0])
def test_half_precision_output_is_widened_first(dtype, guidance_scale):
    m, *rest = batch(guided=guidance_scale is not None, dtype=torch.float32)
    half = m.to(dtype).requires_grad_()
    wide = half.detach().float().requires_grad_()
    results = []
    for output in (half, wide):
        results.append(gaussian_log_prob(output, *rest, guidance_scale=guidance_scale))
        results[-1].sum().backward()
    assert results[0].dtype == torch.float32 and torch.equal(*results)
    assert half.grad.dtype == dtype and torch.equal(half.grad, wide.grad.to(dtype))
    x, _, a, b, std = rest
    steps = [denoise_step(o, x, a, b, std, noise=x, guidance_scale=guidance_scale) for o in (half, wide)]
    for low, high in zip(*steps, strict=True):
        assert low.dtype == torch.float32 and torch.equal(low, high)


def test_float32_matches_float64_at_latent_size():
    m, x, prev, a, b, std = batch(2, (4, 64, 64), guided=True, dtype=torch.float32)
    for reduction, rel in (("mean", 1e-6), ("sum", 1e-6)):
        single = gaussian_log_prob(m, x, prev, a, b, std, guidance_scale=5.0, reduction=reduction)
        double = gaussian_log_prob(*(v.double() for v in (m, x, prev, a, b, std)), guidance_scale=5.0, reduction=reduction)
        assert single.dtype == torch.float32 and double.dtype == torch.float64
        torch.testing.assert_close(single.double(), double, rtol=rel, atol=1e-6)


def test_rows_do_not_depend_on_their_batch():
    m, x, prev, a, b, std = batch(6, (4, 16, 16), dtype=torch.float32)
    together = gaussian_log_prob(m, x, prev, a, b, std)
    for i in range(6):
        assert torch.equal(together[i : i + 1], gaussian_log_prob(*(v[i : i + 1] for v in (m, x, prev, a, b, std))))


def test_coefficients_are_rounded_to_the_compute_dtype():
    m, x, prev, a, b, std = batch(dtype=torch.float32)
    wide = gaussian_log_prob(m, x, prev, a.double(), b.double(), std.double())
    assert wide.dtype == torch.float32 and torch.equal(wide, gaussian_log_prob(m, x, prev, a, b, std))


@pytest.mark.parametrize("guidance_scale", [None, 5.0])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_step_log_prob_is_that_of_the_stored_sample(guidance_scale, reduction):
    m, x, _, a, b, std = batch(guided=guidance_scale is not None, dtype=torch.float32)
    options = {"guidance_scale": guidance_scale, "reduction": reduction}
    prev, log_prob = denoise_step(m, x, a, b, std, seeds=torch.tensor([1, 2, 3]), step=7, **options)
    assert torch.equal(log_prob, gaussian_log_prob(m, x, prev, a, b, std, **options))


def test_seeds_are_philox_noise():
    m, x, _, a, b, std = batch(dtype=torch.float32)
    seeds, steps = torch.tensor([5, -6, 2**62]), torch.tensor([0, 3, 49])
    for step in (7, steps):
        noise = philox_normal(seeds, x.shape[1:], step=step)
        for by_seed, by_noise in zip(
            denoise_step(m, x, a, b, std, seeds=seeds, step=step), denoise_step(m, x, a, b, std, noise=noise), strict=True
        ):
            assert torch.equal(by_seed, by_noise)
    prev, _ = denoise_step(*(v.double() for v in (m, x, a, b, std)), seeds=seeds, step=steps)
    assert prev.dtype == torch.float64


def test_step_mean_and_spread():
    n = 4
    zeros, ones = torch.zeros(n, 4, 32, 32), torch.ones(n)
    prev, log_prob = denoise_step(zeros + 3, zeros + 2, 0.5 * ones, -1 * ones, 0.25 * ones, seeds=torch.arange(n))
    assert prev.mean().item() == pytest.approx(-2, abs=4 * 0.25 / math.sqrt(prev.numel()))
    assert prev.std().item() == pytest.approx(0.25, rel=0.03)
    entropy = 0.5 + math.log(0.25) + 0.5 * math.log(2 * math.pi)
    assert log_prob.mean().item() == pytest.approx(-entropy, abs=0.03)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_deterministic_rows(dtype):
    m, x, _, a, b, std = batch(dtype=dtype)
    noise, hole = torch.randn_like(x), std.clone()
    hole[1] = 0
    prev, log_prob = denoise_step(m, x, a, b, hole, noise=noise)
    full_prev, full_log_prob = denoise_step(m, x, a, b, std, noise=noise)
    assert torch.equal(prev[1], reference.transition_mean(m, x, a, b, None)[1]) and log_prob[1] == 0
    assert torch.equal(prev[[0, 2]], full_prev[[0, 2]]) and torch.equal(log_prob[[0, 2]], full_log_prob[[0, 2]])
    with pytest.raises(ValueError, match="std must be positive, got 0; a deterministic step has no density"):
        gaussian_log_prob(m, x, prev, a, b, hole)


def test_step_records_no_gradient():
    m, x, _, a, b, std = batch()
    assert not any(r.requires_grad for r in denoise_step(m.requires_grad_(), x, a, b, std, noise=x))


def test_inputs_are_left_alone():
    args = batch(guided=True)
    copies = [v.clone() for v in args]
    m, x, _, a, b, std = args
    gaussian_log_prob(*args, guidance_scale=2.0)
    denoise_step(m, x, a, b, std, noise=x, guidance_scale=2.0)
    assert all(map(torch.equal, args, copies))


def test_noncontiguous_inputs():
    m, x, prev, a, b, std = batch()
    strided = [v.to(memory_format=torch.channels_last) for v in (m, x, prev)]
    torch.testing.assert_close(gaussian_log_prob(*strided, a, b, std), gaussian_log_prob(m, x, prev, a, b, std))
    # The index of an element is its place in the shape, not in memory.
    first, _ = denoise_step(*strided[:2], a, b, std, seeds=torch.arange(3))
    second, _ = denoise_step(m, x, a, b, std, seeds=torch.arange(3))
    torch.testing.assert_close(first, second)


def test_no_rows():
    assert gaussian_log_prob(*batch(0)).shape == (0,)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"model_output": torch.zeros(6, 2, 3, 2)}, ValueError, "model_output has shape"),
        ({"guidance_scale": 5.0}, ValueError, "unconditional half, then"),
        ({"guidance_scale": float("nan")}, ValueError, "finite number"),
        ({"guidance_scale": torch.tensor(5.0)}, ValueError, "finite number"),
        ({"sample": torch.zeros(3)}, ValueError, "sample has shape"),
        ({"sample": torch.zeros(3, 0, 2, 2)}, ValueError, "at least one element"),
        ({"sample": torch.zeros(3, 2, 3, 2, dtype=torch.bfloat16)}, TypeError, "sample must be float32 or float64"),
        ({"model_output": torch.zeros(3, 2, 3, 2, dtype=torch.int64)}, TypeError, "model_output must be floating point"),
        ({"sample_coef": torch.ones(3, 1)}, ValueError, "sample_coef has shape"),
        ({"output_coef": torch.ones(2)}, ValueError, "output_coef has shape"),
        ({"output_coef": 1.0}, TypeError, "output_coef must be a torch.Tensor, got float"),
        ({"std": torch.ones(())}, ValueError, "std has shape"),
        ({"std": torch.tensor([1.0, -1.0, 1.0])}, ValueError, "std must"),
        ({"std": torch.tensor([1.0, float("nan"), 1.0])}, ValueError, "std must"),
        ({"std": torch.ones(3, device="meta")}, ValueError, "std is on meta, model_output on cpu"),
        ({"reduction": "none"}, ValueError, "unknown reduction 'none'; expected one of 'mean', 'sum'"),
    ],
)
def test_validation(change, error, match):
    m, x, prev, a, b, std = batch(dtype=torch.float32)
    args = {"model_output": m, "sample": x, "sample_coef": a, "output_coef": b, "std": std} | change
    with pytest.raises(error, match=f"gaussian_log_prob: {match}|gaussian_log_prob: .*{match}"):
        gaussian_log_prob(prev_sample=prev, **args)
    with pytest.raises(error, match=f"denoise_step: .*{match}"):
        denoise_step(noise=prev, **args)


def test_validation_of_what_differs():
    m, x, prev, a, b, std = batch(dtype=torch.float32)
    with pytest.raises(ValueError, match="prev_sample has shape"):
        gaussian_log_prob(m, x, prev[:2], a, b, std)
    with pytest.raises(TypeError, match="prev_sample must be float32"):
        gaussian_log_prob(m, x, prev.half(), a, b, std)
    seeds = torch.arange(3)
    for kwargs, error, match in (
        ({}, ValueError, "exactly one of noise and seeds, got neither"),
        ({"noise": prev, "seeds": seeds}, ValueError, "got both"),
        ({"noise": prev[:1]}, ValueError, "noise has shape"),
        ({"noise": prev.long()}, TypeError, "noise must be floating"),
        ({"seeds": seeds[:2]}, ValueError, "seeds has shape"),
        ({"seeds": seeds.float()}, TypeError, "seeds must be torch.int64"),
        ({"seeds": seeds, "step": torch.arange(2)}, ValueError, "step has shape"),
        ({"seeds": seeds, "step": -1}, ValueError, "step is -1"),
    ):
        with pytest.raises(error, match=match):
            denoise_step(m, x, a, b, std, **kwargs)
