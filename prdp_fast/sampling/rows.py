"""Which rows of an epoch a pass evaluates, a row being one stochastic step of one trajectory, and in what micro-batches.

Every micro-batch of a pass makes the same number of denoiser rows, so that nothing recompiles and no kernel changes between them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from prdp_fast.core.records import TextEmbeddings, Trajectories
from prdp_fast.sampling.policy import Policy
from prdp_kernels import philox_normal

# Third counter word of the draws below: beyond every step of a rollout, whose noise has the same keys.
UPDATE_STREAM = 2**31
REFERENCE_STREAM = 2**31 + 1


@dataclass(frozen=True)
class MicroBatch:
    """n rows. The last rows of a pass may repeat a row to fill up; only the first `count` count."""

    rows: torch.Tensor  # (n,) int64, trajectory * S + number of the stochastic step
    count: int
    guided: bool
    latents: torch.Tensor  # (n, C, H, W) float32, x_t
    prev_latents: torch.Tensor  # (n, C, H, W) float32, x_{t-1}
    steps: torch.Tensor  # (n,) int64, numbers of the steps
    embeddings: TextEmbeddings  # n rows


def micro_batches(
    policy: Policy, trajectories: Trajectories, size: int, chosen: torch.Tensor | None = None
) -> Iterator[MicroBatch]:
    """The rows of a pass, each once, trajectory-major; with a guidance interval the guided ones first.

    Args:
        size: at most this many rows at a time. Steps that are not guided, where guided ones are, come two for one.
        chosen: (N, m) int64 on the CPU, the stochastic steps of each trajectory; None for all S.
    """
    stochastic = policy.transitions.stochastic
    total = len(trajectories.latents)
    numbers = torch.arange(len(stochastic)).expand(total, -1) if chosen is None else chosen
    every_row = (torch.arange(total)[:, None] * len(stochastic) + numbers).flatten()
    guided_rows = policy.guided[stochastic[numbers.flatten()]]
    device = trajectories.latents.device
    stochastic = stochastic.to(device)
    for guided in (True, False):
        rows = every_row[guided_rows == guided]
        if not len(rows):
            continue
        most = size if guided or policy.guidance_scale is None else 2 * size
        batches = -(-len(rows) // most)
        even = -(-len(rows) // batches)
        padded = torch.cat([rows, rows[-1:].expand(batches * even - len(rows))]).to(device)
        for start in range(0, len(padded), even):
            part = padded[start : start + even]
            trajectory = torch.div(part, len(stochastic), rounding_mode="floor")
            steps = stochastic[part % len(stochastic)]
            yield MicroBatch(
                part, min(even, len(rows) - start), guided, trajectories.latents[trajectory, steps],
                trajectories.latents[trajectory, steps + 1], steps, trajectories.embedding_rows(trajectory),
            )  # fmt: skip


def strata(total: int, count: int) -> torch.Tensor:
    """(count + 1,) int64: the borders of `count` runs of consecutive steps that cover 0..total-1, as equal as can be."""
    return torch.arange(count + 1) * total // count


def stratified(seeds: torch.Tensor, total: int, count: int, stream: int) -> torch.Tensor:
    """(N, count) int64 on the CPU: one step of each stratum for each trajectory, uniform, independent of everything else.

    The sum over all steps of any f is, in expectation, the sum over the chosen ones of (size of the stratum) f.

    Args:
        seeds: (N,) int64, the trajectories' noise keys: the same draw whatever the ranks, and again on resuming.
        stream: keeps draws of one trajectory independent of each other and of its noise.
    """
    borders = strata(total, count)
    normals = philox_normal(seeds.cpu(), (count,), step=stream, backend="torch").double()
    uniforms = torch.special.ndtr(normals)
    sizes = borders[1:] - borders[:-1]
    offsets = torch.minimum((uniforms * sizes).long(), sizes - 1)
    return borders[:-1] + offsets
