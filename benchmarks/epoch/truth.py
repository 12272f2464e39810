"""A job's denoisers against a float32 truth: how far off outputs, gradient and log-probs of a few rows are, and plain eager ones.

The truth is the trained denoiser's own weights in float32, called as diffusers has it. Plain is the same in the job's dtype.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from benchmarks.lib import truth
from prdp_fast.acceleration.attention import set_attention
from prdp_fast.models.lora import trained_parameters
from prdp_fast.sampling.policy import Policy
from prdp_fast.sampling.rows import MicroBatch, micro_batches

ROWS = 4  # of a micro-batch, that the truth is made of; guidance doubles them
DENOISERS = ("rollout", "reference", "update")


@dataclass
class Agreement:
    """Relative distances from the truth of a path and of plain eager code, on the same rows."""

    rows: int
    outputs: dict[str, float]  # by denoiser
    gradient: float
    plain_output: float
    plain_gradient: float
    log_probs: dict[str, float] = field(default_factory=dict)  # the largest difference from the truth's, nats; not judged

    def fault(self) -> str | None:
        """What is further off than it may be; None if nothing is."""
        for name, error in self.outputs.items():
            if line := truth.fault(f"the output of the {name}", error, self.plain_output):
                return line
        return truth.fault("the gradient", self.gradient, self.plain_gradient)

    def __str__(self) -> str:
        outputs = ", ".join(f"{name} {error:.1e}" for name, error in self.outputs.items())
        return (
            f"off by {outputs} in outputs (plain eager {self.plain_output:.1e}), {self.gradient:.1e} in the gradient "
            f"(plain eager {self.plain_gradient:.1e})"
        )


def plain_copy(workload: Any, dtype: torch.dtype) -> nn.Module:
    """The trained denoiser's weights in a model of its own, with nothing that makes it fast."""
    trainer = workload.trainer
    family, trained = trainer.job.family, trainer.engine.engine.module
    if family.lora is not None:
        module = copy.deepcopy(workload.bare_denoiser)
    else:
        with workload.device:
            module = family.denoiser_class.from_config(family.denoiser_config)
        module.load_state_dict(trained.state_dict())
    module.to(dtype)
    set_attention(module, "sdpa")
    wanted = {name for name, parameter in trained.named_parameters() if parameter.requires_grad}
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in wanted)
    return module.train()


def results(policy: Policy, denoiser: Any, part: MicroBatch, rows: int, *, weights_of: nn.Module | None = None) -> list[Any]:
    """The model's output and log-probs of the first rows of a micro-batch, which is called as the job calls it; and the gradient
    of sum(+-log_prob) over these rows by the weights of `weights_of`, if one is given."""
    with torch.set_grad_enabled(weights_of is not None):
        output = policy.predict(
            denoiser, part.latents, policy.coefficients(part.steps, part.latents.dtype)[0], part.embeddings, guided=part.guided
        )
        kept = output.unflatten(0, (-1, len(part.rows)))[:, :rows].detach().float()
        found = [kept]
        if weights_of is None:
            log_prob = policy.log_prob(
                denoiser, part.latents, part.prev_latents, part.steps, part.embeddings, guided=part.guided
            )  # fmt: skip
            return [*found, log_prob[:rows].float()]
        del output
        weights = torch.zeros(len(part.rows), device=part.latents.device)
        weights[:rows] = 1.0
        weights[1:rows:2] = -1.0
        value, log_prob = policy.weighted_log_prob(
            denoiser, part.latents, part.prev_latents, part.steps, part.embeddings, guided=part.guided, weights=weights
        )
        gradients = torch.autograd.grad(value, trained_parameters(weights_of), allow_unused=True)
    return [*found, log_prob[:rows].float(), *gradients]


def only(part: MicroBatch, rows: int, dtype: torch.dtype) -> MicroBatch:
    """The first rows of a micro-batch, for a denoiser of this dtype: a policy calls it in the dtype of the embeddings."""
    embeddings = part.embeddings.rows(slice(rows))
    cast = {
        name: value.to(dtype)
        for name, value in embeddings._asdict().items()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
    }
    return replace(
        part, rows=part.rows[:rows], count=min(part.count, rows), latents=part.latents[:rows],
        prev_latents=part.prev_latents[:rows], steps=part.steps[:rows], embeddings=embeddings._replace(**cast),
    )  # fmt: skip


def compare(workload: Any, trajectories: Any, rows: int = ROWS) -> Agreement:
    """Before the job has been trained."""
    trainer, policy = workload.trainer, workload.policy
    plainly = replace(policy, predict=trainer.job.family.predict)  # with both halves' latents, whatever the job's denoisers take
    part = next(micro_batches(policy, trajectories, trainer.micro_batch))
    rows = min(rows, len(part.rows))

    def plain(dtype: torch.dtype) -> list[Any]:
        module = plain_copy(workload, dtype)
        return results(plainly, module, only(part, rows, dtype), rows, weights_of=module)

    with truth.without_tf32():
        right = plain(torch.float32)
    eager = plain(workload.dtype)
    module = trainer.engine.engine.module
    own: dict[str, list[Any]] = {"update": results(policy, module, part, rows, weights_of=module)}
    with trainer.engine.sampling_denoiser() as denoiser:
        own["rollout"] = results(policy, denoiser, part, rows)
    if workload.needs_reference:
        with trainer.reference_denoiser() as frozen:
            own["reference"] = results(policy, frozen, part, rows)
    distance = truth.relative_distance
    return Agreement(
        rows,
        {name: distance(own[name][:1], right[:1]) for name in DENOISERS if name in own},
        distance(own["update"][2:], right[2:]),
        distance(eager[:1], right[:1]),
        distance(eager[2:], right[2:]),
        {name: float((found[1] - right[1]).abs().max()) for name, found in own.items()},
    )
