"""Random choices of steps, which follow from a trajectory's noise key: the same whatever the batch, the ranks and the device, and
again on resuming."""

from __future__ import annotations

import torch

from prdp_kernels import philox_normal

# Third counter word of the draws: beyond every step of a rollout, whose noise has the same keys. Draws of one trajectory on
# different streams are independent of each other and of its noise.
UPDATE_STREAM = 2**31
REFERENCE_STREAM = 2**31 + 1
WINDOW_STREAM = 2**31 + 2


def uniform_integers(seeds: torch.Tensor, sizes: torch.Tensor, stream: int) -> torch.Tensor:
    """(N, m) int64 on the CPU, uniform in 0..sizes-1.

    Args:
        seeds: (N,) int64, the trajectories' noise keys.
        sizes: (m,) int64, at least 1.
    """
    normals = philox_normal(seeds.cpu(), (len(sizes),), step=stream, backend="torch").double()
    return torch.minimum((torch.special.ndtr(normals) * sizes).long(), sizes - 1)
