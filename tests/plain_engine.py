"""One epoch's updates of a small denoiser without DeepSpeed."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field

import torch

from prdp_fast.objectives import PrdpObjective
from prdp_fast.training.passes import reference_pass
from prdp_fast.training.update import run_updates

CLIP, BETA = 2e-4, 0.5
REWARDS = torch.tensor([0.3, 0.9, 0.1, 0.2, 0.2, 0.8], dtype=torch.float64)


@dataclass
class PlainEngine:
    """The engine without DeepSpeed: a plain optimizer on plain gradients."""

    denoiser: torch.nn.Module
    learning_rate: float = 1e-3
    scale: float = 1.0
    gradients: list[list[torch.Tensor]] = field(default_factory=list)
    passes_are_local: bool = True

    def __post_init__(self) -> None:
        self.denoiser.requires_grad_(True)
        self.optimizer = torch.optim.SGD(self.denoiser.parameters(), lr=self.learning_rate)

    def set_scale(self, max_weight: float) -> None:
        pass

    def accumulating(self):
        return contextlib.nullcontext()

    def discard_gradients(self) -> None:
        self.optimizer.zero_grad()

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        loss.backward()

    def step(self):
        from prdp_fast.training.engine import StepResult

        self.gradients.append([p.grad.clone() for p in self.denoiser.parameters()])
        norm = torch.nn.utils.get_total_norm(self.gradients[-1])
        self.optimizer.step()
        self.optimizer.zero_grad()
        return StepResult(float(norm), applied=True)


def no_reduce(values: list[float], op: str) -> list[float]:
    return values


def run(
    policy, engine, reference, trajectories, updates: int, micro_batch: int, objective=None, rewards=REWARDS, last_drift=None,
    timesteps=None, reference_timesteps=None, step_weights=None,
):  # fmt: skip
    """One epoch's updates; without a reference the policy is it."""
    if reference is not None:
        reference = reference_pass(policy, reference, trajectories, micro_batch, reference_timesteps, step_weights)
    return run_updates(
        policy, engine, objective or PrdpObjective(BETA, CLIP, "torch"), trajectories, rewards, reference=reference,
        updates=updates, micro_batch=micro_batch, last_drift=last_drift, reduce=no_reduce, timesteps=timesteps,
        step_weights=step_weights,
    )  # fmt: skip
