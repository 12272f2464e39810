"""The same job at other sizes: fewer prompts, more images of each, more steps, without building it again."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.workload import Workload
from prdp_fast.sampling.policy import build_policy
from prdp_fast.sampling.transitions import Transitions


def resized(
    workload: Workload, *, prompts: int | slice | None = None, images_per_prompt: int | None = None, steps: int | None = None
) -> Workload:
    """A view of `workload`: engine, models and rewards are shared.

    Args:
        prompts: the first so many of its prompts, or a slice of them.
        images_per_prompt: B.
        steps: T; for the embedded model, whose scheduler is at hand.
    Raises: ValueError if it has fewer prompts, or another model's steps are to change.
    """
    part = slice(prompts) if isinstance(prompts, int) else prompts or slice(None)
    if isinstance(prompts, int) and prompts > len(workload.prompts):
        raise ValueError(f"resized: prompts is {prompts}, expected at most {len(workload.prompts)}; build a larger workload")
    policy = workload.policy
    if steps is not None and steps != len(policy.transitions):
        if workload.preset != "tiny":
            raise ValueError(f"resized: steps of preset {workload.preset!r}; expected 'tiny', build the others at their steps")
        settings = workload.settings
        scheduler = load_scheduler(settings.model.pretrained, settings.sampler.scheduler)
        policy = build_policy(settings, Transitions.from_scheduler(scheduler, steps, settings.sampler.eta))
    return replace(
        workload,
        policy=policy,
        prompts=workload.prompts[part],
        embeddings=workload.embeddings.rows(part),
        images_per_prompt=images_per_prompt or workload.images_per_prompt,
    )


def share_of_rank(workload: Workload, rank: int, ranks: int) -> Workload:
    """This rank's part of a workload that was built with the prompts of all ranks.

    Raises: UserError if they do not divide.
    """
    workload.settings.check_ranks(ranks)
    each = len(workload.prompts) // ranks
    return resized(workload, prompts=slice(rank * each, (rank + 1) * each))
