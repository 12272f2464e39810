"""What random subsets of timesteps cost in variance: gradients of one epoch's loss, drawn again and again, against the whole one.

python -m benchmarks.epoch.subset_variance --output results.json

A subset's gradient g_m has the whole one g as its expectation (tests/test_update.py adds up every draw). Here its noise is
measured, the mean of |g_m - g|^2 over draws, and set beside the noise that is there anyway: the variance of whole gradients
between epochs, that is, over other prompts and trajectories, at the same weights. What counts is by how much it raises that.
The policy is trained for some epochs first: before, its log-ratio to the reference is 0 and has no variance.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import asdict, dataclass, replace

import torch

from benchmarks.epoch.workload import TINY, Workload
from benchmarks.lib import command
from benchmarks.lib.provenance import provenance
from prdp_fast.core.files import write_json
from prdp_fast.core.records import Scores, Trajectories
from prdp_fast.objectives import ObjectiveInput
from prdp_fast.sampling.draws import UPDATE_STREAM
from prdp_fast.sampling.rows import strata, stratified
from prdp_fast.training.passes import Reference, gradient_pass, reference_pass


@dataclass(frozen=True)
class Noise:
    """Mean over draws of |draw - whole|^2 / |whole|^2, and by what factor it raises the variance between epochs."""

    name: str
    rows: float  # denoiser work of update and reference pass, as a share of the whole's
    noise: float
    stderr: float
    growth: float  # (variance between epochs + this) / variance between epochs


@torch.enable_grad()
def gradient(workload: Workload, trajectories: Trajectories, weights: torch.Tensor, chosen: torch.Tensor | None) -> torch.Tensor:
    """The gradient of sum(weights * log_prob) with respect to everything that is trained, one vector."""
    denoiser = workload.trainer.engine.engine.module
    parameters = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
    total = torch.zeros(sum(parameter.numel() for parameter in parameters))

    def backward(loss: torch.Tensor, *, last: bool) -> None:
        # Not loss.backward(): DeepSpeed's hooks would collect the gradients.
        total.add_(torch.cat([part.flatten() for part in torch.autograd.grad(loss, parameters)]))

    gradient_pass(workload.policy, denoiser, trajectories, weights, workload.trainer.micro_batch, backward, chosen=chosen)
    return total


def weights_of(workload: Workload, trajectories: Trajectories, rewards: torch.Tensor, reference: Reference) -> torch.Tensor:
    shape = len(trajectories.prompts), trajectories.images_per_prompt
    log_probs = trajectories.log_probs.view(*shape, -1)
    output = workload.trainer.objective(
        ObjectiveInput(
            log_probs=log_probs, old_log_probs=log_probs, ref_log_probs=reference.log_probs.view_as(log_probs),
            rewards=rewards.view(shape), reward_mean=float(rewards.mean()), reward_std=float(rewards.std()),
        )
    )  # fmt: skip
    return output.weights.reshape(trajectories.log_probs.shape)


def square(vector: torch.Tensor) -> float:
    return float(vector.double().square().sum())


def measure(workload: Workload, *, warm_epochs: int, epochs: int, draws: int) -> list[Noise]:
    trainer = workload.trainer

    def draw(epoch: int) -> tuple[Trajectories, Scores]:
        workload.prompts = trainer.stream.epoch(epoch)
        workload.embeddings = workload.encode()
        trajectories = workload.rollout()
        return trajectories, workload.score(workload.decode(trajectories))

    for epoch in range(warm_epochs):
        trajectories, scores = draw(epoch)
        workload.update(trajectories, scores, workload.reference(trajectories))

    def whole(trajectories: Trajectories, scores: Scores) -> tuple[torch.Tensor, torch.Tensor]:
        weights = weights_of(workload, trajectories, scores.total, workload.reference(trajectories))
        return gradient(workload, trajectories, weights, None), weights

    several = [whole(*draw(warm_epochs + 1 + number))[0] for number in range(epochs)]
    mean = torch.stack(several).mean(0)
    between = sum(square(g - mean) for g in several) / (epochs - 1)

    trajectories, scores = draw(warm_epochs)
    exact, weights = whole(trajectories, scores)
    total = trajectories.log_probs.shape[1]
    results = [Noise("whole gradients of other epochs", 1.0, between / square(exact), math.nan, math.nan)]

    def add(name: str, rows: float, errors: list[float]) -> None:
        values = torch.tensor(errors, dtype=torch.float64)
        stderr = float(values.std() / math.sqrt(len(values)))
        relative = float(values.mean()) / square(exact), stderr / square(exact)
        results.append(Noise(name, rows, *relative, 1 + float(values.mean()) / between))

    for m in range(1, total):
        borders = strata(total, m)
        sizes = borders[1:] - borders[:-1]
        scale = sizes.repeat_interleave(sizes)
        errors = []
        for number in range(draws):
            chosen = stratified(trajectories.seeds + 1 + number, total, m, UPDATE_STREAM)
            errors.append(square(gradient(workload, trajectories, weights * scale, chosen) - exact))
        add(f"update at {m} of {total} steps", (1 + 3 * m / total) / 4, errors)
    for m in range(2, total):
        errors = []
        for number in range(draws):
            other = replace(trajectories, seeds=trajectories.seeds + 1 + number)
            with trainer.reference_denoiser() as frozen:
                reference = reference_pass(workload.policy, frozen, other, trainer.micro_batch, m)
            drawn = weights_of(workload, trajectories, scores.total, reference)
            errors.append(square(gradient(workload, trajectories, drawn, None) - exact))
        add(f"reference at {m} of {total} steps", (m / total + 3) / 4, errors)
    return results


def table(results: list[Noise]) -> str:
    lines = [f"{'':34}{'work':>11}{'noise':>10}{'s.e.':>9}{'growth':>9}"]
    for noise in results[1:]:
        lines.append(f"{noise.name:34}{noise.rows:11.2f}{noise.noise:10.4f}{noise.stderr:9.4f}{noise.growth:9.3f}")
    lines.append(f"{results[0].name:34}{1:11.2f}{results[0].noise:10.4f}")
    return "\n".join(lines)


def run(args: argparse.Namespace, words: list[str]) -> int:
    origin = provenance(__file__, words) if args.output else {}
    workload = Workload.build(TINY, ["performance.attention=sdpa", *args.overrides])
    results = measure(workload, warm_epochs=args.warm_epochs, epochs=args.epochs, draws=args.draws)
    print(table(results))
    if args.output:
        write_json(args.output, origin | {"noise": [asdict(noise) for noise in results]})
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = command.parser_of(__doc__)
    command.add_overrides(parser)
    parser.add_argument("--warm-epochs", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=8, help="whole gradients, for the noise between epochs; at least 2")
    parser.add_argument("--draws", type=int, default=8)
    command.add_output(parser)
    args = parser.parse_args(arguments)
    if args.epochs < 2:
        parser.error(f"--epochs is {args.epochs}; expected 2 or more, whose variance is measured")
    return command.run(lambda: run(args, command.words(arguments)))


if __name__ == "__main__":
    sys.exit(main())
