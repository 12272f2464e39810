"""Fixed prompts, fixed noise, before and after: what training changed, on prompts it drew and on prompts it never saw."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from prdp_fast.core.records import Prompt, Scores, TextEmbeddings
from prdp_fast.evaluation.statistics import mean_and_error
from prdp_fast.models.pipeline import Pipeline
from prdp_fast.rewards import WeightedRewards
from prdp_fast.sampling.policy import Policy
from prdp_fast.sampling.rollout import rollout

# Training counts its epochs from 0; evaluation noise has an epoch number that no training reaches.
EVALUATION_EPOCH = 2**40


@dataclass(frozen=True)
class Evaluation:
    """Images and scores of one prompt set, in the set's order."""

    prompts: list[str]  # P
    images: torch.Tensor  # (P * B, 3, H, W) uint8
    rewards: torch.Tensor  # (P,) float32, mean over the B images of a prompt
    strict: torch.Tensor | None  # (P,) float32 share of images that the reward says are all right, where it says so

    @staticmethod
    def merge(parts: list[Evaluation], total: int) -> Evaluation:
        """Interleave the ranks' parts, rank r holding prompts r, r + ranks, ..."""
        order = torch.cat([torch.arange(rank, total, len(parts)) for rank in range(len(parts))]).argsort()
        prompts = [prompt for part in parts for prompt in part.prompts]
        images = torch.cat([part.images.unflatten(0, (len(part.prompts), -1)) for part in parts if part.prompts])
        rewards = torch.cat([part.rewards for part in parts])
        strict = None if parts[0].strict is None else torch.cat([part.strict for part in parts if part.strict is not None])
        return Evaluation(
            [prompts[i] for i in order], images[order].flatten(0, 1), rewards[order], None if strict is None else strict[order]
        )

    def summary(self) -> dict[str, float]:
        """mean and standard error over prompts, n, and the strict rate if there is one."""
        summary = mean_and_error(self.rewards)
        if self.strict is not None:
            summary["strict"] = self.strict.mean().item()
        return summary


def compare(before: Evaluation, after: Evaluation) -> dict[str, dict[str, float]]:
    """before, after, and their paired difference, prompt by prompt."""
    return {"before": before.summary(), "after": after.summary(), "difference": mean_and_error(after.rewards - before.rewards)}


def sample_images(
    policy: Policy,
    denoiser: nn.Module,
    pipeline: Pipeline,
    encode: Callable[[list[Prompt]], TextEmbeddings],
    prompts: list[Prompt],
    *,
    images_per_prompt: int,
    batch: int,
    seed: int,
) -> torch.Tensor:
    """(P * B, 3, H, W) uint8, prompt-major. The noise depends on (seed, prompt, image) alone, so models can be compared on it."""
    trajectories = rollout(
        policy, denoiser, prompts, encode(prompts), images_per_prompt=images_per_prompt,
        latent_shape=pipeline.latent_shape, batch=batch, seed=seed, epoch=EVALUATION_EPOCH,
    )  # fmt: skip
    return pipeline.decode(trajectories.latents[:, -1])


def evaluate(
    policy: Policy,
    denoiser: nn.Module,
    pipeline: Pipeline,
    encode: Callable[[list[Prompt]], TextEmbeddings],
    rewards: WeightedRewards,
    prompts: list[Prompt],
    *,
    images_per_prompt: int,
    batch: int,
    seed: int,
) -> Evaluation:
    """Sample and score `prompts` (this rank's part)."""
    images = sample_images(
        policy, denoiser, pipeline, encode, prompts, images_per_prompt=images_per_prompt, batch=batch, seed=seed
    )  # fmt: skip
    rows = [prompt for prompt in prompts for _ in range(images_per_prompt)]
    scores: Scores = rewards.score(images, [prompt.text for prompt in rows], [prompt.metadata for prompt in rows])
    strict = None if rewards.verdict is None else scores.details[rewards.verdict]
    return Evaluation(
        [prompt.text for prompt in prompts],
        images,
        scores.total.view(len(prompts), -1).nanmean(-1),
        None if strict is None else strict.float().view(len(prompts), -1).mean(-1),
    )
