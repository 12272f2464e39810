"""What prdp_loss by Triton has of its own: sizes, launches, statistics. Groups of more than two tiles take three launches, whose
gradient waits for the backward. The maths is in test_prdp_loss.py, for every backend.

The reference and the kernel compute in float64 from the same inputs. They differ by the order of sums, which is some 1e-15 of the
largest term; in float32 by one rounding of the result, 2^-24 = 6e-8 relative.
"""

from __future__ import annotations

import math

import pytest
import torch
from compare import BF16, DEVICE, F16, F32, F64, assert_close, assert_same_bits, unit_roundoff
from properties import given, settings, st

from prdp_kernels import prdp_loss, prdp_loss_and_grad
from prdp_kernels.prdp_loss import op
from prdp_kernels.prdp_loss.reference import STATS

pytest.importorskip("triton")

# NumPy computes for the interpreter, and warns where a GPU says nothing.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

OPTIONS = {"clip_range": 0.05, "kl_weight": 0.7}


def problem(groups: int, images: int, steps: int, *, dtype: torch.dtype = F32, spread: float = 0.05, seed: int = 0):
    """Log-probs, those of the snapshot, of the reference, and rewards with ties and one hole a group of four and more."""
    g = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=g, dtype=F64)

    lp = normal(groups, images, steps)
    rewards = normal(groups, images)
    rewards = torch.where(torch.rand(rewards.shape, generator=g) < 0.3, rewards.round(), rewards)
    if images > 3:
        rewards[:, 2] = math.nan
    args = (lp, lp + spread * normal(*lp.shape), lp + normal(*lp.shape), rewards)
    return [x.to(dtype).to(DEVICE) for x in args]


def check(args: list[torch.Tensor], options: dict[str, float], dtype: torch.dtype = F32) -> None:
    """Loss, gradient and statistics equal those of the reference in float64, to the rounding of the result."""
    loss, grad, stats = prdp_loss_and_grad(*args, **options, backend="triton")
    expected_loss, expected_grad, expected_stats = prdp_loss_and_grad(
        *(x.double().cpu() for x in args), **options, backend="torch"
    )
    assert loss.dtype == grad.dtype == dtype and grad.is_contiguous()
    one_rounding, sums = unit_roundoff(dtype), 1e-13  # 128 x 128 pairs of 1000 steps, in random walks of 2^-53
    for name, value in (("loss", loss), ("the loss alone", prdp_loss(*args, **options, backend="triton"))):
        assert_close(name, value, expected_loss, (one_rounding + sums) * expected_loss)
    assert_close("grad", grad, expected_grad, one_rounding * expected_grad.abs() + sums * expected_grad.abs().max())
    assert tuple(stats) == STATS
    # mean_abs_target is a mean of positive numbers of 1e5 and more, so that an absolute 1e-13 says nothing of it. Its roundings,
    # each at most 2^-53 of what it adds up to: 2 of a target (difference, quotient); of the kernel's sum 4 levels over 16 images,
    # 8 blocks of them, 7 levels over 128 images, 1 a group; 1 of the last quotient. Of a large group: 7 levels over 128 images, 3
    # over 8, 6 over 64 programs, 1 for every 64. As many of the reference, whose order is another. With 20 groups at most:
    # 2 (2 + 19 + 20 + 1) = 84.
    positive = 84 * unit_roundoff(F64)
    for name, value in stats.items():
        assert value.shape == () and value.dtype == dtype and value.device.type == DEVICE.type, name
        allowed = (one_rounding + (positive if name == "mean_abs_target" else 0)) * expected_stats[name].abs() + sums
        assert_close(f"stats[{name}]", value, expected_stats[name], allowed)


# Images on both sides of powers of two, steps on both sides of a tile, one tile and several, odd, even and multiples of four.
@pytest.mark.parametrize(
    ("groups", "images", "steps"),
    [
        (1, 1, 1), (2, 1, 50), (1, 2, 3), (3, 3, 7), (2, 5, 8), (1, 8, 50), (2, 13, 9), (1, 16, 130), (1, 17, 50), (1, 31, 33),
        (1, 33, 65), (1, 64, 34), (1, 65, 20), (1, 100, 16), (1, 127, 3), (1, 128, 50), (1, 2, 1000), (1, 100, 1000), (20, 4, 6),
        (3, 64, 100), (2, 7, 2100), (9, 33, 70), (1, 1, 5000), (2, 128, 33),
    ],
)  # fmt: skip
def test_sizes(groups, images, steps):
    check(problem(groups, images, steps), OPTIONS)


@pytest.mark.parametrize("dtype", [BF16, F16, F32, F64], ids=str)
def test_dtypes(dtype):
    args = problem(2, 6, 5, dtype=dtype)
    check(args, OPTIONS, F64 if dtype == F64 else F32)
    log_probs = args[0].requires_grad_()
    prdp_loss(*args, **OPTIONS, backend="triton").backward()
    assert log_probs.grad.dtype == dtype
    if dtype == F32:
        check([args[0].detach(), args[1].to(BF16), args[2].to(F16), args[3].double()], OPTIONS, F64)


@pytest.mark.parametrize("clip_range", [0.0, 1e-6, 1e-4, 0.05, math.inf])
@pytest.mark.parametrize("kl_weight", [1e-5, 3e-6, 0.7, 100.0])
def test_options(clip_range, kl_weight):
    spread = clip_range if 0 < clip_range < 1 else 0.05
    check(problem(2, 6, 5, dtype=F64, spread=spread), {"clip_range": clip_range, "kl_weight": kl_weight}, F64)
    check(problem(2, 6, 5, spread=spread), {"clip_range": clip_range, "kl_weight": kl_weight})


def test_the_branch_at_the_paper_s_beta_and_epsilon():
    """u near 1e5, its clipped change near 1e-6: the branch is seen by the sign of the product, never by the squares."""
    log_probs = torch.tensor([[[2e-6], [0.0], [0.0]]], device=DEVICE)
    zeros, options = torch.zeros_like(log_probs), {"clip_range": 1e-6, "kl_weight": 1e-5}
    for rewards, image_0 in (([1.0, 0.5, 0.5], "clipped"), ([0.0, 0.5, 0.5], "free")):
        args = [log_probs, zeros, zeros, torch.tensor([rewards], device=DEVICE)]
        check(args, options)
        grad, stats = prdp_loss_and_grad(*args, **options, backend="triton")[1:]
        # A winner that has gone up enough is clipped; a loser that went up is still pushed down.
        assert (grad[0, 0, 0].item() == 0) == (image_0 == "clipped")
        assert stats["clipped_pairs"].item() == (1.0 if image_0 == "clipped" else 0.0)
        assert stats["clip_fraction"].item() == pytest.approx(1 / 3)


def test_clip_edge_passes_its_gradient():
    for moved, passes in ((0.5, True), (-0.5, True), (0.5000001, False)):
        log_probs = torch.tensor([[[moved, 0.75], [0.0, 0.0]]], device=DEVICE)
        zeros = torch.zeros_like(log_probs)
        args = [log_probs, zeros, zeros, torch.tensor([[1.0, 0.0]], device=DEVICE)]
        check(args, {"clip_range": 0.5, "kl_weight": 1.0})
        grad = prdp_loss_and_grad(*args, clip_range=0.5, kl_weight=1.0, backend="triton")[1]
        assert (grad[0, 0, 0].item() != 0) == passes and grad[0, 0, 1].item() == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_removed_images(bad):
    for removed in ([0], [1, 5], [0, 1, 2, 3, 4], list(range(6))):
        args = problem(2, 6, 5)
        args[3] = torch.randn(2, 6, generator=torch.Generator().manual_seed(1)).to(DEVICE)
        args[3][1, removed] = bad
        for x in args[:3]:
            x[1, removed] = math.nan
        check(args, OPTIONS)


def test_groups_without_a_pair():
    args = problem(3, 4, 5)
    for rewards in ([0.3] * 4, [math.nan, 0.3, 0.3, math.inf], [math.nan] * 3 + [1.0], [math.nan] * 4):
        args[3][1] = torch.tensor(rewards, device=DEVICE)
        check(args, OPTIONS)
        assert (prdp_loss_and_grad(*args, **OPTIONS, backend="triton")[1][1] == 0).all()
    args[3][:] = 1.0
    loss, grad, stats = prdp_loss_and_grad(*args, **OPTIONS, backend="triton")
    assert loss == 0 and (grad == 0).all() and stats["groups_without_pair"] == 3 and all(v.isfinite() for v in stats.values())


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("size", [(2, 5, 9), (2, 33, 100)], ids=str)
def test_non_finite_log_prob_of_a_kept_image_shows(which, bad, size):
    args = problem(*size)
    args[3][:] = torch.arange(float(size[1]))
    args[which][1, 3, 8] = bad
    loss, grad, stats = prdp_loss_and_grad(*args, **OPTIONS, backend="triton")
    assert not loss.isfinite() and not grad[1, 3].isfinite().all() and grad[0].isfinite().all()
    assert not stats["mean_log_ratio"].isfinite() or which == 1


def test_stats_keys_and_values():
    """Each by its own number, so that no two can be in each other's place."""
    lp = torch.tensor([[[0.3, 0.0], [0.0, 0.0], [-0.2, -0.2], [9.0, 9.0]], [[0.0, 0.0]] * 4], device=DEVICE)
    zeros = torch.zeros_like(lp)
    rewards = torch.tensor([[1.0, 0.0, 0.25, math.nan], [2.0, 2.0, 2.0, 2.0]], device=DEVICE)
    stats = prdp_loss_and_grad(lp, zeros, zeros, rewards, clip_range=0.25, kl_weight=0.5, backend="triton")[2]
    # Pairs (0, 1), (0, 2), (2, 1): d = 0.15, 0.35, -0.2 and dc = 0.125, 0.325, -0.2 against 2, 1.5, 0.5.
    expected = {
        "pairs": 3, "groups_without_pair": 1, "dropped_images": 1, "clip_fraction": 1 / 14, "clipped_pairs": 2 / 3,
        "mean_log_ratio": (0.15 - 0.2) / 7, "pair_accuracy": 2 / 3, "mean_abs_target": 4 / 3,
    }  # fmt: skip
    assert list(stats) == list(expected) == list(STATS)
    for name, value in expected.items():
        assert stats[name].item() == pytest.approx(value, rel=1e-6), name


@pytest.mark.parametrize("upstream", [-2.0, 1e-3, 2.0**14])
def test_upstream_gradient(upstream):
    args = problem(2, 6, 5)
    grad = prdp_loss_and_grad(*args, **OPTIONS, backend="triton")[1]
    log_probs = args[0].clone().requires_grad_()
    (upstream * prdp_loss(log_probs, *args[1:], **OPTIONS, backend="triton")).backward()
    assert_close("grad", log_probs.grad, upstream * grad.double(), unit_roundoff(F32) * (upstream * grad).abs().double())


# In slices of one tile, of several, of rows that begin at odd numbers, one image.
@pytest.mark.parametrize("size", [(2, 64, 100), (1, 100, 1000), (2, 7, 2101), (1, 1, 5000)], ids=lambda s: "-".join(map(str, s)))
@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=str)
def test_backward_of_a_large_group_has_the_bits_of_the_scaled_gradient(size, dtype):
    """It is written in the backward, from the slopes that the forward left: rounded as a gradient that is there and then scaled.

    In float64 the compiler may fuse a product and a sum of one forward and not of the other, which is one rounding."""
    args = problem(*size, dtype=dtype, spread=0.05)
    expected_loss, grad, _ = prdp_loss_and_grad(*args, **OPTIONS, backend="triton")
    for upstream in (1.0, -2.0, 1e-3, 2.0**14):
        log_probs = args[0].clone().requires_grad_()
        loss = prdp_loss(log_probs, *args[1:], **OPTIONS, backend="triton")
        assert_close("loss", loss.detach(), expected_loss, 1e-13 * expected_loss.double())
        (upstream * loss).backward()
        assert log_probs.grad.is_contiguous() and log_probs.grad.dtype == dtype
        scaled = torch.tensor(upstream, dtype=grad.dtype) * grad
        if dtype == F32:
            assert_same_bits(f"grad, {upstream}", log_probs.grad, scaled)
        assert_close(f"grad, {upstream}", log_probs.grad, scaled, 2 * unit_roundoff(F64) * scaled.abs().double())


def test_backward_of_a_large_group_in_any_layout():
    args = problem(2, 64, 100)
    expected = prdp_loss_and_grad(*args, **OPTIONS, backend="triton")[1]
    leaf = args[0].clone().requires_grad_()
    strided = leaf.transpose(0, 2).contiguous().transpose(0, 2)
    old = torch.stack([args[1], args[1]], -1)[..., 0]
    prdp_loss(strided, old, *args[2:], **OPTIONS, backend="triton").backward()
    assert_same_bits("grad", leaf.grad, expected)


def test_a_large_group_changed_before_its_backward_is_refused():
    """The backward reads the log-probs again."""
    args = problem(2, 64, 100)
    loss = prdp_loss(args[0].requires_grad_(), *args[1:], **OPTIONS, backend="triton")
    args[1].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_equal_images_of_a_large_group_tie():
    """Their d is 0 exactly, which counts half: an image has the same mean on both sides of a pair."""
    args = problem(1, 48, 100, spread=0.05)
    for x in args[:3]:
        x[:] = x[:, :1]
    args[3] = torch.arange(48.0, device=DEVICE).reshape(1, 48)
    check(args, OPTIONS)
    assert prdp_loss_and_grad(*args, **OPTIONS, backend="triton")[2]["pair_accuracy"] == 0.5


def test_large_groups_without_a_pair_and_removed_images():
    args = problem(3, 40, 100)
    args[3][1] = 0.5
    args[3][2, [0, 7, 8, 39]] = torch.tensor([math.nan, math.inf, -math.inf, math.nan], device=DEVICE)
    for x in args[:3]:
        x[2, [0, 7, 8, 39]] = math.nan
    check(args, OPTIONS)
    _, grad, stats = prdp_loss_and_grad(*args, **OPTIONS, backend="triton")
    assert stats["groups_without_pair"] == 1 and (grad[1] == 0).all() and (grad[2, [0, 7, 8, 39]] == 0).all()
    args[3][:] = math.nan
    loss, grad, stats = prdp_loss_and_grad(*args, **OPTIONS, backend="triton")
    assert loss == 0 and (grad == 0).all() and stats["groups_without_pair"] == 3 and all(v.isfinite() for v in stats.values())


def test_only_log_probs_get_a_gradient():
    args = [x.requires_grad_() for x in problem(2, 6, 5)]
    loss = prdp_loss(*args, **OPTIONS, backend="triton")
    loss.backward()
    assert args[0].grad is not None and all(x.grad is None for x in args[1:])
    with torch.no_grad():
        assert not prdp_loss(*args, **OPTIONS, backend="triton").requires_grad
    loss, grad, stats = prdp_loss_and_grad(*args, **OPTIONS, backend="triton")
    assert not any(x.requires_grad for x in (loss, grad, *stats.values()))


def test_strided_inputs_and_inputs_left_alone():
    args = problem(2, 5, 6)
    strided = [torch.stack([x, x], -1)[..., 0] for x in args]
    strided[0] = args[0].transpose(0, 2).contiguous().transpose(0, 2)
    strided[3] = args[3].t().contiguous().t()
    copies = [x.clone() for x in strided]
    for name, got, plain in zip(
        ("loss", "grad"),
        prdp_loss_and_grad(*strided, **OPTIONS, backend="triton"),
        prdp_loss_and_grad(*args, **OPTIONS, backend="triton")[:2],
        strict=False,
    ):
        assert_same_bits(name, got, plain)
    for i, (after, before) in enumerate(zip(strided, copies, strict=True)):
        assert_same_bits(f"argument {i}", after, before)
    expanded = [args[0], args[0][:1].expand(2, -1, -1), args[2], args[3]]
    check(expanded, OPTIONS)


@pytest.mark.parametrize("size", [(4, 7, 9), (4, 33, 100)], ids=str)
def test_same_bits_twice_and_groups_do_not_see_each_other(size):
    args = problem(*size)
    results = [prdp_loss_and_grad(*args, **OPTIONS, backend="triton") for _ in range(2)]
    for name, first, second in zip(("loss", "grad"), *results, strict=False):
        assert_same_bits(name, second, first)
    for i in range(4):  # 4 is a power of two: the weight of a group is exact
        alone = prdp_loss_and_grad(*(x[i : i + 1] for x in args), **OPTIONS, backend="triton")[1]
        assert_same_bits(f"grad of group {i}", results[0][1][i : i + 1], alone / 4)


def test_more_images_than_the_kernel_takes(monkeypatch):
    args = problem(1, 129, 2)
    for function in (prdp_loss, prdp_loss_and_grad):
        with pytest.raises(ValueError, match=f"{function.__name__}: backend='triton' takes up to 128 images a group, got 129"):
            function(*args, **OPTIONS, backend="triton")
    # "auto" takes the reference, also where it would have taken Triton: on CUDA, or as if there.
    asked = []
    choose = op.dispatch.choose
    monkeypatch.setattr(
        op.dispatch, "choose", lambda name, backend, *rest, **kw: asked.append(backend) or choose(name, backend, *rest, **kw)
    )
    loss, grad, _ = prdp_loss_and_grad(*args, **OPTIONS, backend="auto")
    prdp_loss(*args, **OPTIONS, backend="auto")
    prdp_loss(*(x[:, :128] for x in args[:3]), args[3][:, :128], **OPTIONS, backend="auto")
    assert asked == ["torch", "torch", "auto"]
    expected = prdp_loss_and_grad(*args, **OPTIONS, backend="torch")
    assert_same_bits("loss", loss, expected[0])
    assert_same_bits("grad", grad, expected[1])


@st.composite
def problems(draw):
    """Eighths, exact in float64: clip edges, ties and equal branches come up as often as anything else."""
    groups, images, steps = draw(st.integers(1, 2)), draw(st.integers(1, 6)), draw(st.sampled_from([1, 2, 4, 8]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def eighths(*size: int, high: int) -> torch.Tensor:
        return torch.randint(-high, high + 1, size, generator=g).double().to(DEVICE) / 8

    lp = eighths(groups, images, steps, high=8)
    args = [lp, lp + eighths(*lp.shape, high=3), eighths(*lp.shape, high=8), eighths(groups, images, high=3)]
    for at in draw(st.lists(st.integers(0, images - 1), max_size=2)):
        args[3][0, at] = draw(st.sampled_from([math.nan, math.inf, -math.inf]))
    return args, {"clip_range": draw(st.integers(0, 4)) / 8, "kl_weight": draw(st.sampled_from([0.25, 1.0, 8.0]))}


@settings(deadline=None, max_examples=40, derandomize=True)
@given(problems())
def test_any_problem(drawn):
    check(*drawn, F64)
