"""The loss of a batch of prompt groups, and its gradient in closed form."""

from __future__ import annotations

import math
from typing import Any

import torch

from prdp_kernels import checks, dispatch, layout
from prdp_kernels import launch as launching
from prdp_kernels.prdp_loss import reference


def prdp_loss(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    ref_log_probs: torch.Tensor,
    rewards: torch.Tensor,
    *,
    clip_range: float,
    kl_weight: float,
    backend: str = "auto",
) -> torch.Tensor:
    """Proximal reward difference prediction loss of G prompt groups of B images and T steps; a float32 scalar (float64 if any
    argument is), differentiable in `log_probs` alone (arXiv 2402.08714, Appendix G):

        lr = log_probs - ref,  old = old_log_probs - ref,  c = clip(lr, old - clip_range, old + clip_range)
        d, dc = pairwise differences of mean_t(lr), mean_t(c);  dr = pairwise differences of the rewards
        loss = mean over groups of  mean over pairs with dr > 0 of  max((d - dr / kl_weight)^2, (dc - dr / kl_weight)^2)

    log_probs, old_log_probs, ref_log_probs: (G, B, T) floating, nats, of the policy, of the snapshot it is held close to, and of
        the reference model.
    rewards: (G, B) floating. A non-finite one removes its image, log-probs and all.
    clip_range: epsilon >= 0 on the log-ratio of a step; math.inf for no clipping. kl_weight: beta > 0.

    A group without a pair contributes 0 to loss and gradient and still counts in the mean. A step exactly on a clip edge passes
    its gradient, and where both branches are equal the unclipped one is taken.
    Raises: TypeError, ValueError for arguments of the wrong type, shape, device or range.
    """
    args = (log_probs, old_log_probs, ref_log_probs, rewards)
    if _in_range(clip_range, kl_weight):
        want_grad = torch.is_grad_enabled() and getattr(log_probs, "requires_grad", False)
        plan = launching.known("prdp_loss", backend, ("backward" if want_grad else "loss",), args)
        if plan is not None:
            if want_grad:
                return _Loss.apply(*args, clip_range, kl_weight)
            return _kernel().run(plan, args, clip_range, kl_weight)[0]
    _check("prdp_loss", *args, clip_range, kl_weight)
    backend = _backend("prdp_loss", backend, log_probs)
    run = dispatch.choose("prdp_loss", backend, *args, reference=reference.prdp_loss, triton=_triton_loss)
    return run(*args, clip_range, kl_weight)


def prdp_loss_and_grad(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    ref_log_probs: torch.Tensor,
    rewards: torch.Tensor,
    *,
    clip_range: float,
    kl_weight: float,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """(loss, dloss/dlog_probs (G, B, T), stats) of `prdp_loss`, all detached. Backpropagating sum(grad * log_prob) over any
    micro-batches of (image, step) gives the exact gradient of the loss.

    stats, 0-dim tensors in the dtype of the loss, means over no element being 0:
        pairs, groups_without_pair, dropped_images   counts
        clip_fraction     share of the kept images' steps that are clipped
        clipped_pairs     share of the pairs that take the clipped branch
        mean_log_ratio    mean of lr over kept images and steps, nats
        pair_accuracy     share of the pairs where d has the sign of dr; d = 0, as before the first update, counts half
        mean_abs_target   mean of |dr / kl_weight| over the pairs, nats
    """
    args = (log_probs, old_log_probs, ref_log_probs, rewards)
    if _in_range(clip_range, kl_weight):
        plan = launching.known("prdp_loss", backend, ("all",), args)
        if plan is not None:
            return _named(_kernel().run(plan, args, clip_range, kl_weight)[:3])
    _check("prdp_loss_and_grad", *args, clip_range, kl_weight)
    backend = _backend("prdp_loss_and_grad", backend, log_probs)
    run = dispatch.choose(
        "prdp_loss_and_grad", backend, *args, reference=reference.prdp_loss_and_grad, triton=_triton_loss_and_grad
    )
    with torch.no_grad():
        return run(*args, clip_range, kl_weight)


MAX_IMAGES = 128  # of a group in the Triton kernel, one program of which holds a whole group


def _backend(op: str, backend: str, log_probs: torch.Tensor) -> str:
    if log_probs.shape[1] <= MAX_IMAGES or backend not in ("auto", "triton"):
        return backend
    if backend == "triton":
        raise ValueError(f"{op}: backend='triton' takes up to {MAX_IMAGES} images a group, got {log_probs.shape[1]}; use 'auto'")
    return "torch"


def _in_range(clip_range: object, kl_weight: object) -> bool:
    """Whether `_check` takes both numbers, at a glance: what fails here may still pass there."""
    return type(clip_range) is float and type(kl_weight) is float and clip_range >= 0 and 0 < kl_weight < math.inf


def _check(
    op: str,
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    ref_log_probs: torch.Tensor,
    rewards: torch.Tensor,
    clip_range: float,
    kl_weight: float,
) -> None:
    named = {"log_probs": log_probs, "old_log_probs": old_log_probs, "ref_log_probs": ref_log_probs, "rewards": rewards}
    checks.tensors(op, **named)
    checks.floating(op, **named)
    if log_probs.dim() != 3 or log_probs.numel() == 0:
        raise ValueError(f"{op}: log_probs has shape {tuple(log_probs.shape)}, expected (G, B, T), none of them 0")
    checks.shape(op, log_probs.shape, old_log_probs=old_log_probs, ref_log_probs=ref_log_probs)
    checks.shape(op, log_probs.shape[:2], rewards=rewards)
    checks.same_device(op, **named)
    if not clip_range >= 0:
        raise ValueError(f"{op}: clip_range is {clip_range}, expected a number >= 0 (math.inf for no clipping)")
    if not 0 < kl_weight < math.inf:
        raise ValueError(f"{op}: kl_weight is {kl_weight}, expected a finite number > 0")


# The Triton operator: (loss, gradient, statistics), of which the loss is differentiable in log_probs.
def _kernel() -> Any:
    from prdp_kernels.prdp_loss import kernel  # imports triton

    return kernel


def _launch(*args: Any) -> Any:
    return _kernel().launch(*args)[:3]


def _fake(*args: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dtype = layout.result_dtype(*args[:4])
    new = args[0].new_empty
    return new((), dtype=dtype), new(args[0].shape, dtype=dtype), new(len(reference.STATS), dtype=dtype)


_op = dispatch.define(
    "prdp_loss(Tensor log_probs, Tensor old_log_probs, Tensor ref_log_probs, Tensor rewards, float clip_range, float kl_weight) "
    "-> (Tensor, Tensor, Tensor)",
    launch=_launch,
    fake=_fake,
)


class _Loss(torch.autograd.Function):
    """The eager road to the kernel; what torch.ops registers below, without its two layers of Python.

    Where the gradient is a launch of its own it is left to the backward, which writes it with `upstream` in it: the same bits."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> torch.Tensor:
        loss, grad, _, slopes = _kernel().launch(*args, want="backward")
        ctx.waits, ctx.clip_range, ctx.dtype = grad is None, args[4], args[0].dtype
        ctx.save_for_backward(*((args[0], args[1], slopes) if ctx.waits else (grad,)))
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.waits:
            return _kernel().launch_grad(*ctx.saved_tensors, upstream, ctx.clip_range), *[None] * 5
        return _backward(ctx, upstream)


def _triton_loss(*args: Any) -> torch.Tensor:
    log_probs, *others, clip_range, kl_weight = args
    if not launching.plain(args[:4]):
        return _op(log_probs, *(t.detach() for t in others), clip_range, kl_weight)[0]
    if torch.is_grad_enabled() and log_probs.requires_grad:
        return _Loss.apply(*args)
    return _kernel().launch(*args, want="loss")[0]


def _triton_loss_and_grad(*args: Any) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    return _named((_launch if launching.plain(args[:4]) else _op)(*args))


def _named(results: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    loss, grad, stats = results
    return loss, grad, dict(zip(reference.STATS, stats.unbind(), strict=True))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.save_for_backward(output[1])
    ctx.dtype = inputs[0].dtype


def _backward(ctx: Any, upstream: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
    (grad,) = ctx.saved_tensors
    return (upstream * grad).to(ctx.dtype), *[None] * 5


torch.library.register_autograd("prdp_kernels::prdp_loss", _backward, setup_context=_setup_context, lib=dispatch.LIBRARY)
