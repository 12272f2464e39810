"""Trajectories from the current policy.

The noise of a trajectory is Philox keyed by (seed, epoch, prompt, image, step): the same trajectory comes out whatever the
batch size, the number of ranks and the device, and resuming needs no generator state.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from prdp_fast.core.records import Prompt, TextEmbeddings, Trajectories
from prdp_fast.sampling.policy import Policy
from prdp_kernels import derive_seeds, philox_normal


def noise_seeds(prompts: list[Prompt], images_per_prompt: int, *, seed: int, epoch: int) -> torch.Tensor:
    """(N,) int64 Philox keys of the trajectories of `prompts`, prompt-major."""
    prompt = torch.tensor([p.index for p in prompts], dtype=torch.int64).repeat_interleave(images_per_prompt)
    first = torch.tensor([p.occurrence * images_per_prompt for p in prompts], dtype=torch.int64)
    image = (first[:, None] + torch.arange(images_per_prompt)).flatten()
    return derive_seeds(seed, epoch, prompt, image)


@torch.no_grad()
def rollout(
    policy: Policy,
    denoiser: nn.Module,
    prompts: list[Prompt],
    embeddings: TextEmbeddings,
    *,
    images_per_prompt: int,
    latent_shape: tuple[int, int, int],
    batch: int,
    seed: int,
    epoch: int,
) -> Trajectories:
    """Sample B trajectories of each prompt.

    Args:
        embeddings: one row per prompt.
        latent_shape: (C, H, W).
        batch: at most this many trajectories per denoiser call; changes speed only.
    Returns: G * B trajectories of T steps on the embeddings' device.
    """
    device = embeddings.prompt_embeds.device
    steps = len(policy.transitions)
    seeds = noise_seeds(prompts, images_per_prompt, seed=seed, epoch=epoch)
    rows, stochastic = len(seeds), policy.transitions.steps_of(seeds)
    seeds, columns = seeds.to(device), stochastic.to(device)
    noisy = torch.zeros(rows, steps, dtype=torch.bool, device=device).scatter_(1, columns, True)
    group = torch.arange(rows, device=device) // images_per_prompt
    latents = torch.empty(rows, steps + 1, *latent_shape, dtype=torch.float32, device=device)
    log_probs = torch.empty(rows, steps, dtype=torch.float32, device=device)
    batches = -(-rows // batch)
    even = -(-rows // batches)  # of one size, so that nothing recompiles: the last batch repeats rows to fill up
    for start in range(0, rows, even):
        part = slice(start, min(start + even, rows))
        padded = torch.arange(start, start + even, device=device).clamp(max=rows - 1)
        count = part.stop - start
        noise = policy.noise(seeds[padded], latent_shape)
        first = philox_normal(seeds[padded], latent_shape, step=0, backend=policy.backend) if noise is None else noise[:, 0]
        x = first * policy.transitions.init_noise_sigma
        latents[part, 0] = x[:count]
        embedding_rows = embeddings.rows(group[padded])
        for step in range(steps):
            given = None if noise is None else noise[:, step + 1]
            x, log_prob = policy.sample_step(denoiser, x, step, embedding_rows, seeds[padded], given, noisy[padded, step])
            latents[part, step + 1], log_probs[part, step] = x[:count], log_prob[:count]
    return Trajectories(prompts, images_per_prompt, embeddings, latents, log_probs.gather(1, columns), seeds, stochastic)


def finite_images(trajectories: Trajectories) -> torch.Tensor:
    """(N,) bool on their device: which trajectories are finite. Waits for nothing.

    A step is linear in the latent, so that NaN and infinity never leave a trajectory: its last latent tells of all.
    """
    largest = torch.linalg.vector_norm(trajectories.latents[:, -1], math.inf, dim=(1, 2, 3))
    return largest.isfinite() & trajectories.log_probs.isfinite().all(1)


def remove(trajectories: Trajectories, lost: torch.Tensor) -> None:
    """Make trajectories that are not finite harmless, in place: in a gradient, 0 times NaN would be NaN.

    Their log-probs become NaN, and their latents 0. Their images must have no reward.

    Args: lost: (N,) bool, on any device.
    """
    lost = lost.to(trajectories.latents.device)
    trajectories.latents[lost] = 0.0
    trajectories.log_probs[lost] = math.nan
