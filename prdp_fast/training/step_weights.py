"""Weights of a trajectory's steps in the mean over them.

A step's log-ratio is linear in kappa = |output_coef| / std, which may be a hundred times as large at one step as at another: then
that step decides the mean, and the gradient. The objective sees log-probs that are scaled by the weights, and what it answers is
scaled by them again, by the chain rule; neither it nor the kernels know. A clip range is one of the scaled log-ratio.
"""

from __future__ import annotations

import torch

from prdp_fast.sampling.transitions import Transitions


def step_weights(transitions: Transitions, kind: str, steps: torch.Tensor) -> torch.Tensor | None:
    """(N, S) float32 on the CPU, of mean 1 over each trajectory's steps; None: all alike.

    Args:
        kind: objective.step_weights.
        steps: (N, S) int64 on the CPU, the trajectories' stochastic steps.
    """
    if kind == "uniform":
        return None
    weights = transitions.kappa.reciprocal()[steps]
    return (weights / weights.mean(1, keepdim=True)).float()
