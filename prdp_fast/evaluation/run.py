"""Sampling and scoring on fixed prompts and fixed noise.

`evaluate` scores the denoiser that a run trains: before, at intervals and after. `compute_blocks` does the work of
`prdp evaluate`, on models as they lie on disk. Both sample with `sample_images`, so that their scores are comparable.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from prdp_fast.acceleration.process import prepare_process
from prdp_fast.config.recipe import PerformanceSettings
from prdp_fast.core import distributed
from prdp_fast.core.errors import NotFiniteError, OneRankError, RewardError, UserError
from prdp_fast.core.memory import smaller_on_oom
from prdp_fast.core.records import Prompt, Scores, TextEmbeddings
from prdp_fast.core.weight_files import check_weight_file
from prdp_fast.evaluation.blocks import KEPT_PICTURES, Block, BlockName, EvaluationDirectory
from prdp_fast.evaluation.plan import EvaluationPlan, Model
from prdp_fast.evaluation.statistics import diversity, mean_and_error, paired_mean_and_error, prompt_means
from prdp_fast.models.families.base import Family
from prdp_fast.models.lora import WEIGHTS
from prdp_fast.models.pipeline import Pipeline
from prdp_fast.models.text import TextEncoder
from prdp_fast.rewards import WeightedRewards
from prdp_fast.sampling.policy import Policy
from prdp_fast.sampling.rollout import finite_images, rollout

# Training counts its epochs from 0. Evaluation noise has an epoch number that no training reaches.
EVALUATION_EPOCH = 2**40
PROGRESS_S = 30.0  # between two lines of progress
PATIENCE = 16  # images without a single score after which `prdp evaluate` gives a reward up

Encode = Callable[[list[Prompt]], TextEmbeddings]
Say = Callable[[str], None]


def sample_images(
    policy: Policy, denoiser: nn.Module, pipeline: Pipeline, encode: Encode, prompts: list[Prompt], *,
    images_per_prompt: int, batch: int, seed: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Images of prompts, prompt-major. The noise depends on (seed, prompt, image) alone, so models can be compared on it.

    Returns: (P * B, 3, H, W) uint8; (P * B,) bool, False for a picture that is not finite and must have no score.
    Raises: NotFiniteError if none is finite. OneRankError if the memory is too small for one image.
    """
    embeddings = encode(prompts)
    trajectories, _ = smaller_on_oom(
        lambda size: rollout(
            policy, denoiser, prompts, embeddings, images_per_prompt=images_per_prompt,
            latent_shape=pipeline.latent_shape, batch=size, seed=seed, epoch=EVALUATION_EPOCH,
        ),
        min(batch, len(prompts) * images_per_prompt), phase="evaluation's rollout", say=print,
        advice="lower sampler.rollout_batch (of prdp evaluate --batch), or use a GPU with more memory",
    )  # fmt: skip
    latents = finite_images(trajectories)
    images, shown = pipeline.decode_checked(trajectories.latents[:, -1])
    latents = latents.cpu()
    if not (latents & shown).any():
        own = denoiser if isinstance(denoiser, nn.Module) else pipeline.denoiser
        reason = pipeline.explain(own, embeddings, latents=not latents.any())
        what = "decoded picture" if latents.any() else "image's latents"
        raise NotFiniteError(f"evaluation: not one {what} of {len(images)} is finite; {reason}")
    return images, latents & shown


def score_images(rewards: WeightedRewards, images: torch.Tensor, prompts: list[Prompt], images_per_prompt: int) -> Scores:
    """Scores of (P * B, ...) images, prompt-major; NaN where there is none, be it everywhere. Raises: RewardError."""
    rows = [prompt for prompt in prompts for _ in range(images_per_prompt)]
    return rewards.score(images, [prompt.text for prompt in rows], [prompt.metadata for prompt in rows], some=False)


# Of the denoiser that a run trains.


@dataclass(frozen=True)
class Evaluation:
    """Images and scores of one prompt set, in the set's order."""

    prompts: list[str]  # P
    images: torch.Tensor  # (P * B, 3, H, W) uint8
    rewards: torch.Tensor  # (P,) float32, mean over the scored ones of a prompt's B images; NaN if none of them is
    strict: torch.Tensor | None  # (P,) float32, share of images that are all right by a reward's verdict; None without one
    scores: torch.Tensor | None = None  # (P, B) float32, of every image, NaN without one; None in files of earlier versions
    held: dict[str, torch.Tensor] = field(default_factory=dict)  # of rewards held out from training, (P,) float32 each

    @staticmethod
    def merge(parts: list[Evaluation], total: int) -> Evaluation:
        """Interleave the ranks' parts, rank r holding prompts r, r + ranks, ..."""
        order = torch.cat([torch.arange(rank, total, len(parts)) for rank in range(len(parts))]).argsort()
        prompts = [prompt for part in parts for prompt in part.prompts]
        images = torch.cat([part.images.unflatten(0, (len(part.prompts), -1)) for part in parts if part.prompts])
        rewards = torch.cat([part.rewards for part in parts])
        strict = None if parts[0].strict is None else torch.cat([part.strict for part in parts if part.strict is not None])
        scores = None if parts[0].scores is None else torch.cat([part.scores for part in parts if part.scores is not None])
        return Evaluation(
            [prompts[i] for i in order], images[order].flatten(0, 1), rewards[order], None if strict is None else strict[order],
            None if scores is None else scores[order],
            {name: torch.cat([part.held[name] for part in parts])[order] for name in parts[0].held},
        )  # fmt: skip

    @property
    def unscored(self) -> int:
        """Images without a score; of an evaluation that an earlier version kept, prompts without one."""
        return int((~(self.rewards if self.scores is None else self.scores).isfinite()).sum())

    def summary(self) -> dict[str, float]:
        """Of what was scored: mean, standard error and n over prompts, and the strict rate if a reward gives verdicts.

        "unscored" is the number of images that were left out.
        """
        summary = mean_and_error(self.rewards) | {"unscored": self.unscored}
        if self.strict is not None:
            summary["strict"] = mean_and_error(self.strict)["mean"]
        return summary


def compare_evaluations(before: Evaluation, after: Evaluation) -> dict[str, Any]:
    """before, after, and their difference, paired prompt by prompt over the images that both have a score of; under "held" the
    same of every reward that was held out, if there are any."""
    first, second = before.rewards, after.rewards
    kept = [part.scores for part in (before, after) if part.scores is not None]
    if len(kept) == 2:
        missing = ~(kept[0].isfinite() & kept[1].isfinite())
        first, second = (means_of_prompts(scores.masked_fill(missing, math.nan)) for scores in kept)
    compared: dict[str, Any] = {
        "before": before.summary(), "after": after.summary(), "difference": paired_mean_and_error(first, second),
    }  # fmt: skip
    if held := before.held.keys() & after.held.keys():
        compared["held"] = {name: compare_held(before.held[name], after.held[name]) for name in sorted(held)}
    return compared


def compare_held(before: torch.Tensor, after: torch.Tensor) -> dict[str, Any]:
    """The same of a reward that was held out, whose (P,) means of prompts are known."""
    return {
        "before": mean_and_error(before), "after": mean_and_error(after), "difference": paired_mean_and_error(before, after)
    }  # fmt: skip


def means_of_prompts(scores: torch.Tensor) -> torch.Tensor:
    """(P, B) scores -> (P,) float32, the mean of a prompt's finite ones; NaN without one."""
    return torch.from_numpy(prompt_means(scores)).float()


def evaluate(
    policy: Policy, denoiser: nn.Module, pipeline: Pipeline, encode: Encode, rewards: WeightedRewards, prompts: list[Prompt], *,
    images_per_prompt: int, batch: int, seed: int, held_rewards: WeightedRewards | None = None,
) -> Evaluation:  # fmt: skip
    """Sample and score `prompts`, this rank's part, which may be empty. Raises: RewardError.

    Images without a score are left out, even if it is all of them; whether any rank has one is for the caller to see.
    """
    if not prompts:
        none = torch.empty(0, images_per_prompt)
        no_strict = None if rewards.verdict is None else none[:, 0]
        held = {reward.name: none[:, 0] for reward in held_rewards.rewards} if held_rewards else {}
        return Evaluation([], torch.empty(0, 3, 1, 1, dtype=torch.uint8), none[:, 0], no_strict, none, held)
    images, shown = sample_images(
        policy, denoiser, pipeline, encode, prompts, images_per_prompt=images_per_prompt, batch=batch, seed=seed
    )  # fmt: skip
    scored = score_images(rewards, images, prompts, images_per_prompt).without(~shown)
    scores = scored.total.view(len(prompts), images_per_prompt)
    strict = None
    if rewards.verdict is not None:
        strict = means_of_prompts(scored.details[rewards.verdict].view(len(prompts), images_per_prompt))
    held = {}
    if held_rewards is not None:
        parts = score_images(held_rewards, images, prompts, images_per_prompt).without(~shown).parts
        held = {name: means_of_prompts(part.view(len(prompts), images_per_prompt)) for name, part in parts.items()}
    return Evaluation([prompt.text for prompt in prompts], images, means_of_prompts(scores), strict, scores, held)


# Of models as they lie on disk: `prdp evaluate`.


def claim_and_share(
    plan: EvaluationPlan, directory: EvaluationDirectory, say: Say, *, restart: bool
) -> tuple[torch.device, list[BlockName]]:
    """Claim the directory for the plan, and share out the blocks that it lacks. Every rank calls this.

    Returns: this rank's device and its blocks.
    Raises: UserError, on every rank, if the directory holds something else.
    """

    def claim() -> list[BlockName]:
        directory.claim(plan.settings, restart=restart)
        for path in directory.discard_damaged(plan.blocks()):
            say(f"{path} was damaged and is computed again")
        return directory.missing(plan.blocks())

    if distributed.world_size() == 1:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu"), claim()
    # Rank 0 looks at the directory, and every rank hears its verdict. After that none waits for another in a collective, which
    # would time out: how long a share takes differs.
    device = distributed.init()
    try:
        fault, missing = "", []
        if distributed.is_main():
            try:
                missing = claim()
            except UserError as error:
                fault = str(error)
        fault, missing = distributed.from_main((fault, missing))
    finally:
        distributed.shutdown()
    if fault:
        raise UserError(fault)
    return device, missing[distributed.rank() :: distributed.world_size()]


def compute_blocks(
    plan: EvaluationPlan, directory: EvaluationDirectory, names: list[BlockName], device: torch.device, say: Say
) -> None:
    """Sample and score this rank's blocks, and keep each in the directory as soon as it is done.

    Raises: OneRankError if a reward fails, gives this rank's first images no score, or the GPU's memory is too small.
    """
    unscored = dict.fromkeys(plan.rewards, 0)  # images so far, of rewards that gave none of them a score
    dtype = getattr(torch, plan.dtype)
    prepare_process(PerformanceSettings(), device, dtype)
    try:
        if names:
            for reward in plan.rewards.values():
                reward.prepare()
        for role, model in plan.models.items():
            own = [name for name in names if name.role == role]
            if not own:
                continue
            say(f"{model.name} ({role}): {len(own)} blocks of up to {plan.block} prompts, {plan.samples} images each")
            pipeline = load_model(model, plan.families[role], device, dtype)
            for note in pipeline.family.notes:
                say(note)
            encode, told = TextEncoder(pipeline, dtype).encode, time.monotonic()
            for number, name in enumerate(own, start=1):
                try:
                    block = compute_block(plan, name, pipeline, encode)
                    give_up_on_silent_rewards(unscored, block)
                    directory.save(name, block)
                except torch.OutOfMemoryError as error:
                    raise OneRankError(
                        f"out of GPU memory with {plan.batch} images a {pipeline.family.denoiser_title} call; give a smaller "
                        "--batch, and --restart"
                    ) from error
                if time.monotonic() - told > PROGRESS_S:
                    told = time.monotonic()
                    say(f"{model.name} ({role}): {number} of {len(own)} blocks")
            del pipeline, encode  # before the next model is loaded
    except (RewardError, NotFiniteError) as error:
        raise OneRankError(str(error)) from error


def give_up_on_silent_rewards(unscored: dict[str, int], block: Block) -> None:
    """Args: unscored: images so far by reward; one that has given a score is no longer in it.

    Raises: RewardError for a reward that has scored none of PATIENCE images, before the block is kept.
    """
    for label in list(unscored):
        if block.scores[label].isfinite().any():
            del unscored[label]
            continue
        unscored[label] += block.scores[label].numel()
        if unscored[label] >= PATIENCE:
            raise RewardError(
                f"reward {label!r} returned NaN or infinity for all of the first {unscored[label]} images; expected at least one "
                "finite score: check the images it was given and its weights, then give the same command with --restart"
            )


def compute_block(plan: EvaluationPlan, name: BlockName, pipeline: Pipeline, encode: Encode) -> Block:
    """Raises: RewardError."""
    prompts, start = plan.prompts_of(name)
    images, shown = sample_images(
        plan.policies[name.role], pipeline.denoiser, pipeline, encode, prompts, images_per_prompt=plan.samples, batch=plan.batch,
        seed=plan.seed,
    )  # fmt: skip
    scores: dict[str, torch.Tensor] = {}
    for label, reward in plan.rewards.items():
        scored = score_images(reward, images, prompts, plan.samples).without(~shown)
        (scores[label],) = scored.parts.values()
        scores |= {f"{label}/{key.partition('/')[2]}": value for key, value in scored.details.items()}
    features = plan.features(images).reshape(len(prompts), plan.samples, -1)
    return Block(
        {label: values.view(len(prompts), plan.samples) for label, values in scores.items()},
        torch.from_numpy(diversity(features)),
        images[:: plan.samples][: max(0, KEPT_PICTURES - start)].clone(),
    )


def load_model(model: Model, family: Family, device: torch.device, dtype: torch.dtype) -> Pipeline:
    """A model to sample from, its LoRA weights merged. Raises: UserError if they do not fit."""
    pipeline = Pipeline.load(family, device, frozen_dtype=dtype)
    if model.adapter is not None:
        check_weight_file(f"the LoRA weights of {model.name}", model.adapter / WEIGHTS)
        try:
            pipeline.whole.load_lora_weights(str(model.adapter), weight_name=WEIGHTS)
            pipeline.whole.fuse_lora()
            pipeline.whole.unload_lora_weights()
        except Exception as error:  # diffusers, peft and safetensors raise all kinds
            raise UserError(
                f"{model.adapter / WEIGHTS} does not load onto {model.pretrained!r}: {' '.join(str(error).split())[:300]}; "
                "give the model it was trained on as --base"
            ) from None
    pipeline.denoiser.to(dtype).requires_grad_(False).eval()
    return pipeline
