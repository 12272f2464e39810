"""Log-prob of a stored transition, differentiable in the model output."""

from __future__ import annotations

from typing import Any

import torch

from prdp_kernels import checks, dispatch, layout
from prdp_kernels import launch as launching
from prdp_kernels.gaussian_log_prob import reference


def gaussian_log_prob(
    model_output: torch.Tensor,
    sample: torch.Tensor,
    prev_sample: torch.Tensor,
    sample_coef: torch.Tensor,
    output_coef: torch.Tensor,
    std: torch.Tensor,
    *,
    guidance_scale: float | None = None,
    reduction: str = "mean",
    backend: str = "auto",
) -> torch.Tensor:
    """log p(x_{t-1} | x_t) in nats, (N,) float32 (float64 if any of the first three arguments is).

    mu = sample_coef x_t + output_coef m,  m = m_uncond + s (m_cond - m_uncond)
    log p = mean (or sum) over C,H,W of  -(x_{t-1} - mu)^2 / (2 std^2) - log std - log(2 pi) / 2

    model_output: (N, C, H, W), or (2N, C, H, W) with the unconditional half first when `guidance_scale` is given; any float
        dtype. Gradients come back in it, to both halves; with Triton to nothing else.
    sample, prev_sample: x_t and x_{t-1}, (N, C, H, W) float32 or float64.
    sample_coef, output_coef, std: (N,) floating, rounded to the dtype of the result; std > 0.

    Raises: TypeError, ValueError for arguments of the wrong type, shape or device, and for std <= 0 on the CPU. On CUDA the
    values of std are not read, which would wait for the device: a step with std 0 has no density, and gives NaN or infinity.
    """
    op = "gaussian_log_prob"
    args = (model_output, sample, prev_sample, sample_coef, output_coef, std)
    if checks.is_guidance(guidance_scale):
        plan = launching.known("log_prob", backend, (guidance_scale is not None, reduction, True), (*args, None))
        if plan is not None and not (torch.is_grad_enabled() and any(t.requires_grad for t in args)):
            return _kernel().run(plan, (*args, None), guidance_scale)[0]
        if plan is not None and not any(t.requires_grad for t in args[1:]):
            return _LogProb.apply(*args, guidance_scale, reduction)
    _check(op, *args, guidance_scale, reduction)
    run = dispatch.choose(op, backend, sample, reference=reference.gaussian_log_prob, triton=_triton_log_prob)
    if run is _triton_log_prob and torch.is_grad_enabled() and any(t.requires_grad for t in args[1:]):
        raise NotImplementedError(f"{op}: Triton's gradient reaches model_output only; detach the others, or use backend='torch'")
    return run(*args, guidance_scale, reduction)


def gaussian_log_prob_and_grad(
    model_output: torch.Tensor,
    sample: torch.Tensor,
    prev_sample: torch.Tensor,
    sample_coef: torch.Tensor,
    output_coef: torch.Tensor,
    std: torch.Tensor,
    weights: torch.Tensor,
    *,
    guidance_scale: float | None = None,
    reduction: str = "mean",
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """(log_prob (N,), grad like model_output): `gaussian_log_prob` and the gradient of sum(weights * log_prob), in one read.

    For a gradient pass whose weights are known before it: `model_output.backward(grad)` goes on from there. Both detached.

    weights: (N,) floating, dloss/dlog_prob of each row, rounded to the dtype of the result. The rest as in `gaussian_log_prob`.
    """
    op = "gaussian_log_prob_and_grad"
    args = (model_output, sample, prev_sample, sample_coef, output_coef, std)
    if checks.is_guidance(guidance_scale) and weights is not None:
        plan = launching.known("log_prob", backend, (guidance_scale is not None, reduction, True), (*args, weights))
        if plan is not None:
            return _kernel().run(plan, (*args, weights), guidance_scale)
    _check(op, *args, guidance_scale, reduction)
    checks.tensors(op, weights=weights)
    checks.floating(op, weights=weights)
    checks.shape(op, sample.shape[:1], weights=weights)
    checks.same_device(op, sample=sample, weights=weights)
    run = dispatch.choose(op, backend, sample, reference=reference.gaussian_log_prob_and_grad, triton=_triton_and_grad)
    with torch.no_grad():
        return run(*args, weights, guidance_scale, reduction)


def _check(
    op: str,
    model_output: torch.Tensor,
    sample: torch.Tensor,
    prev_sample: torch.Tensor,
    sample_coef: torch.Tensor,
    output_coef: torch.Tensor,
    std: torch.Tensor,
    guidance_scale: float | None,
    reduction: str,
) -> None:
    checks.transition(op, model_output, sample, sample_coef, output_coef, std, guidance_scale, reduction)
    checks.tensors(op, prev_sample=prev_sample)
    checks.latent_dtype(op, prev_sample=prev_sample)
    checks.shape(op, sample.shape, prev_sample=prev_sample)
    checks.same_device(op, sample=sample, prev_sample=prev_sample)
    if checks.can_read_values(std) and not (std > 0).all():
        raise ValueError(
            f"{op}: std must be positive, got {std.min().item():g}; a deterministic step has no density, leave it out"
        )


# The Triton operators. Arguments after the tensors are those of the reference.
_TRANSITION = "Tensor model_output, Tensor sample, Tensor prev_sample, Tensor sample_coef, Tensor output_coef, Tensor std"


def _kernel() -> Any:
    from prdp_kernels.gaussian_log_prob import kernel  # imports triton

    return kernel


def _launch(*args: Any, **kwargs: Any) -> Any:
    return _kernel().launch(*args, **kwargs)


class _LogProb(torch.autograd.Function):
    """The eager road to the kernel and to its gradient; what torch.ops registers below, without its two layers of Python."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> torch.Tensor:
        ctx.save_for_backward(*args[:6])
        ctx.options = args[6:]
        return _launch(*args)[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # An autograd engine may hand over an expanded scalar, and sum() does.
        return _launch(*ctx.saved_tensors, *ctx.options, weights=upstream, want_log_prob=False)[1], *[None] * 7


def _triton_log_prob(*args: Any) -> torch.Tensor:
    if not launching.plain(args[:6]):
        return _log_prob(*args)
    return _LogProb.apply(*args)


def _triton_and_grad(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    if not launching.plain(args[:7]):
        return _log_prob_and_grad(*args)
    return _launch(*args[:6], *args[7:], weights=args[6])


def _fake_log_prob(model_output: torch.Tensor, sample: torch.Tensor, prev_sample: torch.Tensor, *_: Any) -> torch.Tensor:
    return sample.new_empty(sample.shape[0], dtype=layout.result_dtype(model_output, sample, prev_sample))


_log_prob = dispatch.define(
    f"gaussian_log_prob({_TRANSITION}, float? guidance_scale, str reduction) -> Tensor",
    launch=lambda *args: _launch(*args)[0],
    fake=_fake_log_prob,
)
_log_prob_and_grad = dispatch.define(
    f"gaussian_log_prob_and_grad({_TRANSITION}, Tensor weights, float? guidance_scale, str reduction) -> (Tensor, Tensor)",
    launch=lambda *args: _launch(*args[:6], *args[7:], weights=args[6]),
    fake=lambda *args: (_fake_log_prob(*args), layout.empty_like(args[0])),
)
_grad = dispatch.define(
    f"gaussian_log_prob_grad({_TRANSITION}, Tensor weights, float? guidance_scale, str reduction) -> Tensor",
    launch=lambda *args: _launch(*args[:6], *args[7:], weights=args[6], want_log_prob=False)[1],
    fake=lambda *args: layout.empty_like(args[0]),
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.options = inputs[6:]


def _backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    # An autograd engine may hand over an expanded scalar, and sum() does; the kernel reads it as it lies.
    return _grad(*ctx.saved_tensors, upstream, *ctx.options), *[None] * 7


torch.library.register_autograd("prdp_kernels::gaussian_log_prob", _backward, setup_context=_setup_context, lib=dispatch.LIBRARY)
