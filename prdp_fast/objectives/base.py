"""The one interface every objective goes through.

The loss of a group is not separable over its steps, but once dL/dlog_prob is known it is a constant: the update backpropagates
sum(weights * log_prob) in micro-batches of any size, which is exactly the gradient of the whole loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

FLOAT32_MAX = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class ObjectiveInput:
    """G prompts of this rank, B trajectories each, S stochastic steps."""

    log_probs: torch.Tensor  # (G, B, S) float32, of the policy as it is now
    old_log_probs: torch.Tensor  # (G, B, S) float32, of the policy at the start of the epoch
    ref_log_probs: torch.Tensor | None  # (G, B, S) float32, of the reference; None if `needs_reference` is False
    rewards: torch.Tensor  # (G, B) float32; NaN removes an image
    reward_mean: float  # over the finite rewards of all ranks
    reward_std: float  # likewise, population
    elements: int = 1  # C * H * W: log-probs are means over them
    seeds: torch.Tensor | None = None  # (G, B) int64, the Philox keys of the trajectories; for draws that ranks agree on
    statistics: torch.Tensor | None = None  # (G, 2) float32, mean and deviation of what the run has seen of each prompt


@dataclass(frozen=True)
class ObjectiveOutput:
    loss: torch.Tensor  # scalar, mean over this rank's prompts
    weights: torch.Tensor  # (G, B, S), dloss/dlog_probs
    metrics: dict[str, torch.Tensor]  # 0-dim, left on their device: reading one would wait for it


class Objective(Protocol):
    name: str
    needs_reference: bool  # log-probs under the reference, in every epoch

    def __call__(self, batch: ObjectiveInput) -> ObjectiveOutput: ...

    def outside_clip(self, log_ratio: torch.Tensor) -> torch.Tensor | None:
        """Where a log-ratio to the start of the epoch is out of the clip range, bool of its shape; None without a range."""
        ...

    def too_large(self, spread: float, largest: float, images: int) -> str | None:
        """What float32 cannot hold with such rewards, and which setting is to be changed; None if it holds everything.

        Args:
            spread: the largest difference of two rewards of one prompt.
            largest: the largest absolute reward.
            images: of a prompt.
        """
        ...

    def weight_error(self, batch: ObjectiveInput, drift: float) -> float:
        """Relative error of the weights if every log-prob were wrong by `drift` nats; decides whether the rollout's own
        log-probs are good enough for the free first pass."""
        ...
