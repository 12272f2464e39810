"""Counter-based noise: an element depends on (seed, step, its index), not on the batch around it or the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from prdp_kernels import checks, dispatch
from prdp_kernels import launch as launching
from prdp_kernels.philox import reference


def philox_normal(
    seeds: torch.Tensor, shape: Sequence[int], *, step: int | torch.Tensor = 0, backend: str = "auto"
) -> torch.Tensor:
    """Standard normals, (N, *shape) float32 on the device of `seeds`, from Philox4x32-10 and Box-Muller.

    seeds: (N,) int64, any value; the 64-bit key of its row.
    shape: of one row; only the flat index of an element matters, so (4, 8, 8) and (256,) hold the same numbers.
    step: int in 0..2**32-1, or (N,) int64 of which the low 32 bits count.

    Devices and backends agree to the float32 rounding of log, sqrt, cos and sin.
    Raises: TypeError, ValueError for arguments of the wrong type, shape or device.
    """
    op = "philox_normal"
    per_row = isinstance(step, torch.Tensor)
    if per_row or (type(step) is int and 0 <= step < 2**32):
        plan = launching.known(op, backend, tuple(shape), (seeds, step if per_row else None))
        if plan is not None:
            return _kernel().run(plan, seeds, tuple(shape), *((step, 0) if per_row else (None, step)))
    checks.tensors(op, seeds=seeds)
    checks.int64(op, seeds=seeds)
    if seeds.dim() != 1:
        raise ValueError(f"{op}: seeds has shape {tuple(seeds.shape)}, expected (N,)")
    if any(isinstance(s, bool) or not isinstance(s, int) or s < 0 for s in shape):
        raise ValueError(f"{op}: shape must be non-negative ints, got {tuple(shape)}")
    checks.step(op, step, seeds)
    return dispatch.choose(op, backend, seeds, reference=reference.philox_normal, triton=_triton)(seeds, tuple(shape), step)


def _triton(seeds: torch.Tensor, shape: Sequence[int], step: int | torch.Tensor) -> torch.Tensor:
    steps, step = (step, 0) if isinstance(step, torch.Tensor) else (None, step)
    run = _launch if launching.plain((seeds, steps)) else _op
    return run(seeds, shape, steps, step)


def _kernel() -> Any:
    from prdp_kernels.philox import kernel  # imports triton

    return kernel


def _launch(*args: Any) -> torch.Tensor:
    return _kernel().launch(*args)


_op = dispatch.define(
    "philox_normal(Tensor seeds, SymInt[] shape, Tensor? steps, int step) -> Tensor",
    launch=_launch,
    fake=lambda seeds, shape, steps, step: seeds.new_empty((seeds.shape[0], *shape), dtype=torch.float32),
)


def derive_seeds(seed: int, epoch: int, prompt: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """(N,) int64 seeds that key the noise of image `image` of prompt `prompt` in `epoch` of a run seeded `seed`.

    prompt, image: (N,) int64 on one device. A hash: different arguments give unrelated seeds, and a collision among n
    trajectories has probability n^2 / 2^65. Integers only, so every device gives the same bits.
    Raises: TypeError, ValueError for arguments of the wrong type, shape, device or beyond int64.
    """
    op = "derive_seeds"
    for name, value in (("seed", seed), ("epoch", epoch)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}")
        if not -(2**63) <= value < 2**63:
            raise ValueError(f"{op}: {name} is {value}, which does not fit int64")
    checks.tensors(op, prompt=prompt, image=image)
    checks.int64(op, prompt=prompt, image=image)
    if prompt.dim() != 1:
        raise ValueError(f"{op}: prompt has shape {tuple(prompt.shape)}, expected (N,)")
    checks.shape(op, prompt.shape, image=image)
    checks.same_device(op, prompt=prompt, image=image)
    return reference.derive_seeds(seed, epoch, prompt, image)
