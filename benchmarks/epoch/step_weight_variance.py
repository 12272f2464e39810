"""The gradient's variance under weights of steps, for the samplers of flow-matching models, where everything true is known.

python -m benchmarks.epoch.step_weight_variance --output results.json

The data are Gaussian, so that the true velocity has a closed form. The policy is that velocity and a small random network, whose
weights are what is trained; the reward is a linear function of the image. Gradients of PRDP's loss are taken at the reference,
over independent epochs:

    noise       variance of g over epochs, over |expected g|^2: how many epochs have to be averaged to see the expectation
    one, mean   cosine of one epoch's gradient, on average, and of the mean over epochs, with the gradient of the expected reward,
                which is taken through the sampler's steps
    last        share of the last trained step in the sum of the steps' squared gradients
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import asdict, dataclass
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn

from benchmarks.lib import command
from benchmarks.lib.provenance import provenance
from prdp_fast.core.files import write_json
from prdp_fast.core.records import Prompt, TextEmbeddings, Trajectories
from prdp_fast.objectives import PrdpObjective
from prdp_fast.sampling.flow import SAMPLERS
from prdp_fast.sampling.policy import Policy
from prdp_fast.sampling.rollout import rollout
from prdp_fast.sampling.transitions import Transitions
from prdp_fast.training.passes import Reference, gradient_pass
from prdp_fast.training.step_weights import step_weights
from prdp_fast.training.update import EpochInputs

SHAPE, MEAN, DEVIATION = (4, 4, 4), 0.3, 0.5  # of the data
WEIGHTINGS = ("uniform", "inverse_kappa", "last left out")


@dataclass(frozen=True)
class Variance:
    sampler: str
    weighting: str
    noise: float
    one: float
    mean: float
    last: float


class Velocity(nn.Module):
    """The true velocity of N(MEAN, DEVIATION^2), and a network of a tenth of its size."""

    def __init__(self) -> None:
        super().__init__()
        channels = SHAPE[0]
        self.network = nn.Sequential(nn.Conv2d(channels + 1, 16, 3, padding=1), nn.SiLU(), nn.Conv2d(16, channels, 3, padding=1))

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        sigma = (timesteps / 1000).to(x.dtype)[:, None, None, None]
        centred = x - (1 - sigma) * MEAN
        x0 = MEAN + (1 - sigma) * DEVIATION**2 / ((1 - sigma) ** 2 * DEVIATION**2 + sigma**2) * centred
        told = torch.cat([x, sigma.expand(-1, 1, *x.shape[2:])], 1)
        return (x - x0) / sigma + 0.1 * self.network(told)


def predict(denoiser: nn.Module, latents: torch.Tensor, timesteps: torch.Tensor, *_: Any, guided: bool) -> torch.Tensor:
    return denoiser(latents, timesteps)


def reward_of(images: torch.Tensor) -> torch.Tensor:
    """A fixed linear function: (N, C, H, W) -> (N,)."""
    pattern = torch.randn(SHAPE, generator=torch.Generator().manual_seed(5), dtype=images.dtype)
    return (images * pattern).mean((1, 2, 3))


def flat(gradients: Any) -> torch.Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients]).double()


def reward_gradient(policy: Policy, denoiser: nn.Module, count: int) -> torch.Tensor:
    """Of the expected reward, through the steps of `count` trajectories."""
    table = policy.transitions
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(count, *SHAPE, generator=generator)
    for step in range(len(table)):
        timesteps, sample_coef, output_coef, std = (c[0] for c in policy.coefficients(torch.tensor([step]), x.dtype))
        noise = torch.randn(x.shape, generator=generator)
        x = sample_coef * x + output_coef * denoiser(x, timesteps.expand(count)) + std * noise
    return flat(torch.autograd.grad(reward_of(x).mean(), list(denoiser.parameters())))


def step_gradients(policy: Policy, denoiser: nn.Module, trajectories: Trajectories, weighting: str) -> torch.Tensor:
    """(S, parameters): the gradient of an epoch's loss at the reference, by step."""
    kind = "uniform" if weighting == "last left out" else weighting
    objective, sampled = PrdpObjective(1e-5, 1e-4, "torch"), trajectories.log_probs
    weights = step_weights(policy.transitions, kind, trajectories.steps)
    inputs = EpochInputs(
        objective, trajectories, reward_of(trajectories.latents[:, -1]), Reference(sampled), lambda values, how: values, weights
    )  # fmt: skip
    gradient = inputs.weighted(objective(inputs.of(sampled, sampled)).weights.reshape(sampled.shape))
    parts = []
    for number in range(sampled.shape[1]):
        found: list[torch.Tensor] = []

        def backward(loss: torch.Tensor, *, last: bool, found: list[torch.Tensor] = found) -> None:
            found.append(flat(torch.autograd.grad(loss, list(denoiser.parameters()))))

        chosen = torch.full((len(sampled), 1), number)
        gradient_pass(policy, denoiser, trajectories, gradient, len(sampled), backward, chosen=chosen)
        parts.append(sum(found, torch.zeros_like(found[0])))
    return torch.stack(parts)


def measure(sampler: str, weighting: str, *, steps: int, shift: float, epochs: int, prompts: int, images: int) -> Variance:
    torch.manual_seed(0)
    denoiser = Velocity()
    table = Transitions.from_scheduler(FlowMatchEulerDiscreteScheduler(shift=shift), steps, sampler=sampler)
    if weighting == "last left out":
        window = (0, int(table.stochastic[-2]))
        table = Transitions.from_scheduler(FlowMatchEulerDiscreteScheduler(shift=shift), steps, sampler=sampler, window=window)
    policy = Policy(table, None, predict, "torch")
    empty = TextEmbeddings(torch.zeros(prompts, 1, 1), torch.zeros(1, 1, 1))
    by_step = []
    for epoch in range(epochs):
        trajectories = rollout(
            policy, denoiser, [Prompt(number, "", {}) for number in range(prompts)], empty, images_per_prompt=images,
            latent_shape=SHAPE, batch=prompts * images, seed=0, epoch=epoch,
        )  # fmt: skip
        by_step.append(step_gradients(policy, denoiser, trajectories, weighting))
    every = torch.stack(by_step)
    gradients = every.sum(1)
    mean = gradients.mean(0)
    noise = float((gradients - mean).square().sum() / (epochs - 1))
    signal = float(mean.square().sum()) - noise / epochs
    truth = -reward_gradient(policy, denoiser, 4096)  # the loss falls where the reward rises
    squares = every.square().sum((0, 2))
    cosine = nn.functional.cosine_similarity
    return Variance(
        sampler, weighting, noise / signal if signal > 0 else math.inf,
        float(cosine(gradients, truth[None]).mean()), float(cosine(mean, truth, dim=0)),
        float(squares[-1] / squares.sum()),
    )  # fmt: skip


def table_of(results: list[Variance]) -> str:
    lines = [f"{'sampler':<13}{'weights of steps':<18}{'noise':>8}{'one':>8}{'mean':>8}{'last':>8}"]
    lines += [f"{r.sampler:<13}{r.weighting:<18}{r.noise:8.2f}{r.one:8.3f}{r.mean:8.3f}{r.last:8.3f}" for r in results]
    return "\n".join(lines)


def run(args: argparse.Namespace, words: list[str]) -> int:
    origin = provenance(__file__, words) if args.output else {}
    size = {"steps": args.steps, "shift": args.shift, "epochs": args.epochs, "prompts": args.prompts, "images": args.images}
    results = [measure(sampler, weighting, **size) for sampler in SAMPLERS for weighting in WEIGHTINGS]
    print(table_of(results))
    if args.output:
        write_json(args.output, origin | {"size": size, "variance": [asdict(result) for result in results]})
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = command.parser_of(__doc__)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--shift", type=float, default=3.0, help="of the schedule, which diffusers applies twice")
    parser.add_argument("--epochs", type=int, default=64, help="independent gradients; at least 2")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--images", type=int, default=8, help="of a prompt")
    command.add_output(parser)
    args = parser.parse_args(arguments)
    if args.epochs < 2:
        parser.error(f"--epochs is {args.epochs}; expected 2 or more, whose variance is measured")
    return command.run(lambda: run(args, command.words(arguments)))


if __name__ == "__main__":
    sys.exit(main())
