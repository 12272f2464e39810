"""Which rows of an epoch a pass evaluates, a row being one stochastic step of one trajectory, and in what micro-batches.

Every micro-batch of a pass makes the same number of denoiser rows, so that nothing recompiles and no kernel changes between them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from prdp_fast.core.records import TextEmbeddings, Trajectories
from prdp_fast.sampling.draws import uniform_integers
from prdp_fast.sampling.policy import Policy


@dataclass(frozen=True)
class MicroBatch:
    """n rows. The last rows of a pass may repeat a row to fill up; only the first `count` count."""

    rows: torch.Tensor  # (n,) int64, trajectory * S + number among its S stochastic steps
    count: int
    guided: bool
    latents: torch.Tensor  # (n, C, H, W) float32, x_t
    prev_latents: torch.Tensor  # (n, C, H, W) float32, x_{t-1}
    steps: torch.Tensor  # (n,) int64, numbers of the steps
    embeddings: TextEmbeddings  # n rows


class RowCounts(NamedTuple):
    """Of a pass: what `micro_batches` divides."""

    guided: int
    plain: int


def count_rows(policy: Policy, trajectories: Trajectories, chosen: torch.Tensor | None = None) -> RowCounts:
    """Of this rank. chosen: as in `micro_batches`."""
    guided = policy.guided[trajectories.steps if chosen is None else trajectories.steps.gather(1, chosen)]
    return RowCounts(int(guided.sum()), int((~guided).sum()))


def micro_batches(
    policy: Policy,
    trajectories: Trajectories,
    size: int,
    chosen: torch.Tensor | None = None,
    counts: RowCounts | None = None,
) -> Iterator[MicroBatch]:
    """The rows of a pass, each once, trajectory-major; with a guidance interval the guided ones first.

    Args:
        size: at most this many rows at a time. Steps that are not guided, where guided ones are, come two for one.
        chosen: (N, m) int64 on the CPU, which of its S stochastic steps each trajectory has in the pass; None for all.
        counts: the largest of all ranks, which then have the same number of micro-batches; None: this rank's.
    """
    total, stochastic = trajectories.steps.shape
    numbers = torch.arange(stochastic).expand(total, -1) if chosen is None else chosen
    every_row = (torch.arange(total)[:, None] * stochastic + numbers).flatten()
    guided_rows = policy.guided[trajectories.steps.flatten()[every_row]]
    counts = counts or count_rows(policy, trajectories, chosen)
    device = trajectories.latents.device
    steps_of_rows = trajectories.steps.flatten().to(device)
    for guided, rows_here in ((True, counts.guided), (False, counts.plain)):
        if not rows_here:
            continue
        rows = every_row[guided_rows == guided]
        most = size if guided or policy.guidance_scale is None else 2 * size
        batches = -(-rows_here // most)
        even = -(-rows_here // batches)
        filler = rows[-1:] if len(rows) else every_row[-1:]
        padded = torch.cat([rows, filler.expand(batches * even - len(rows))]).to(device)
        for start in range(0, len(padded), even):
            part = padded[start : start + even]
            trajectory = torch.div(part, stochastic, rounding_mode="floor")
            steps = steps_of_rows[part]
            yield MicroBatch(
                part, max(0, min(even, len(rows) - start)), guided, trajectories.latents[trajectory, steps],
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
        stream: of `draws`.
    """
    borders = strata(total, count)
    return borders[:-1] + uniform_integers(seeds, borders[1:] - borders[:-1], stream)
