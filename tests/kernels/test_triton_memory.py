"""What kernels write: every element of their outputs, nothing beside them, and semaphores back to zero."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from compare import BF16, DEVICE, LAYOUTS, assert_same_bits, transition

from prdp_kernels import (
    denoise_step,
    gaussian_log_prob,
    gaussian_log_prob_and_grad,
    group_norm,
    philox_normal,
    prdp_loss,
    prdp_loss_and_grad,
    workspace,
)

pytest.importorskip("triton")

GUARD = 8192  # elements before and after: more than the largest tile, which is what a kernel without masks would write


class Poison:
    """Stands for `torch.empty` and its kind: what it hands out holds NaN, and lies between guards that hold another number."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.given: list[tuple[torch.Tensor, int]] = []
        self.real = torch.empty
        monkeypatch.setattr(torch, "empty", self.empty)
        monkeypatch.setattr(torch, "empty_like", self.empty_like)
        monkeypatch.setattr(torch.Tensor, "new_empty", self.new_empty())

    def empty(self, *shape, dtype=None, device=None, memory_format=torch.contiguous_format):
        shape = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        if not (dtype or torch.float32).is_floating_point or 0 in shape:
            return self.real(shape, dtype=dtype, device=device, memory_format=memory_format)
        strides = self.real(shape, dtype=dtype, device="meta", memory_format=memory_format).stride()
        size = math.prod(shape)
        buffer = self.real(size + 2 * GUARD, dtype=dtype, device=device).fill_(-777.0)
        buffer[GUARD : GUARD + size] = math.nan
        self.given.append((buffer, size))
        return buffer.as_strided(shape, strides, GUARD)

    def empty_like(self, t, *, dtype=None, memory_format=torch.preserve_format):
        return self.empty(tuple(t.shape), dtype=dtype or t.dtype, device=t.device, memory_format=memory_format)

    def new_empty(self):
        def method(t, *shape, dtype=None, device=None):
            return self.empty(*shape, dtype=dtype or t.dtype, device=device or t.device)

        return method

    def check_guards(self) -> None:
        assert self.given, "nothing was allocated through torch.empty: the poison is not where the kernels allocate"
        for i, (buffer, size) in enumerate(self.given):
            for side, guard in (("before its beginning", buffer[:GUARD]), ("past its end", buffer[GUARD + size :])):
                assert (guard == -777.0).all(), f"allocation {i}, of {size} elements: something was written {side}"


def of_transition(shape, layout):
    case = transition(2, shape, guidance_scale=2.0, output=BF16)
    case = replace(case, model_output=LAYOUTS[layout](case.model_output))
    weights, seeds = torch.tensor([1.0, -2.0], device=DEVICE), torch.tensor([5, -6], device=DEVICE)
    options = case.options | {"backend": "triton"}

    def backward():
        m = case.model_output.detach().requires_grad_()
        gaussian_log_prob(m, *case.tensors[1:], **options).sum().backward()
        return (m.grad,)

    return {
        "log_prob": lambda: (gaussian_log_prob(*case.tensors, **options),),
        "log_prob backward": backward,
        "log_prob_and_grad": lambda: gaussian_log_prob_and_grad(*case.tensors, weights, **options),
        "step by noise": lambda: denoise_step(*case.step_tensors, noise=case.prev_sample, **options),
        "step by seed": lambda: denoise_step(*case.step_tensors, seeds=seeds, **options),
        "philox": lambda: (philox_normal(seeds, shape, backend="triton"),),
    }


def calls():
    """One tile with an edge, several programs with one (nine, of one element the last); flat and in planes; every operator."""
    found = {}
    for (*shape,), layout in (
        ((3, 5, 7), "contiguous"),
        ((16385,), "contiguous"),
        ((3, 5, 7), "channels_last"),
        ((5, 33, 105), "channels_last"),
    ):
        found |= {f"{name} {tuple(shape)} {layout}": call for name, call in of_transition(tuple(shape), layout).items()}
    for size in ((3, 5, 7), (1, 17, 100), (2, 100, 50)):  # one tile; two; three launches
        g = torch.Generator().manual_seed(0)
        args = [torch.randn(size, generator=g).to(DEVICE) for _ in range(3)] + [torch.randn(size[:2], generator=g).to(DEVICE)]
        options = {"clip_range": 0.1, "kl_weight": 0.5, "backend": "triton"}

        def loss(args=args, options=options):
            value, grad, stats = prdp_loss_and_grad(*args, **options)
            leaf = args[0].clone().requires_grad_()
            prdp_loss(leaf, *args[1:], **options).backward()
            return value, grad, *stats.values(), prdp_loss(*args, **options), leaf.grad

        found[f"loss {size}"] = loss
    for size in ((2, 40, 5, 7), (1, 64, 33, 33)):  # one chunk; nine, and a program that adds them up
        g = torch.Generator().manual_seed(0)
        shapes = (size, size[1:2], size[1:2], size[:2])
        x, weight, bias, shift = (torch.randn(shape, generator=g).to(DEVICE) for shape in shapes)

        def norm(x=x, weight=weight, bias=bias, shift=shift):
            given = [t.detach().requires_grad_() for t in (x, weight, bias, shift)]
            y = group_norm(*given[:3], 8, shift=given[3], silu=True, backend="triton")
            return (y.detach(), *torch.autograd.grad(y, given, x))

        found[f"group_norm {size}"] = norm
    return found


CALLS = calls()


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_all_of_the_output_and_nothing_else_is_written(call, monkeypatch):
    counters = []
    semaphores = workspace.semaphores
    with monkeypatch.context() as patch:
        patch.setattr(workspace, "semaphores", lambda *args: counters.append(semaphores(*args)) or counters[-1])
        poison = Poison(patch)
        got = call()  # first: a kernel that writes where it should not does so here, between guards
    poison.check_guards()
    expected = call()
    for i, (result, right) in enumerate(zip(got, expected, strict=True)):
        assert not result.isnan().any(), f"result {i}: {int(result.isnan().sum())} elements were never written"
        assert_same_bits(f"result {i}", result, right)
    for counter in counters:
        assert not counter.any(), f"semaphores are {counter.nonzero().flatten().tolist()} after the launch"


def test_the_calls_above_use_semaphores(monkeypatch):
    """Or the last assertion above would hold of nothing."""
    counted = []
    semaphores = workspace.semaphores
    monkeypatch.setattr(workspace, "semaphores", lambda *args: counted.append(args) or semaphores(*args))
    for name in (
        "log_prob (16385,) contiguous",
        "step by seed (5, 33, 105) channels_last",
        "loss (2, 100, 50)",
        "group_norm (1, 64, 33, 33)",
    ):
        before = len(counted)
        CALLS[name]()
        assert len(counted) > before, name


def test_a_dirty_semaphore_would_show(monkeypatch):
    """The row that nobody finishes keeps what its memory held.

    The semaphore begins above every number that could be the last arrival's. One that begins at 1 makes the last program but one
    finish the row: where programs run side by side, all partial sums may be there by then, and the log-prob comes out right.
    """
    case = transition(2, (16385,))
    monkeypatch.setattr(workspace, "semaphores", lambda count, device: torch.tensor([0, 99], dtype=torch.int32, device=device))
    Poison(monkeypatch)
    log_prob = gaussian_log_prob(*case.tensors, backend="triton")
    assert log_prob[0].isfinite() and not log_prob[1].isfinite()
