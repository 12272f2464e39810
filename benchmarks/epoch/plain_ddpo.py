"""A DDPO trainer in the usual style of the field, on the same pipeline: what the engine is compared with.

As in ddpo-pytorch and TRL's DDPOTrainer: a batch of prompts at a time, step by step with the scheduler's own arithmetic in plain
torch, pictures decoded and scored after each batch. Then, batch by batch and timestep by timestep, a forward, the clipped
importance ratio and a backward, and one optimizer step at the end. It is kept fair: the same number of denoiser rows, the same
batch, no gradient through what needs none, embeddings encoded once, float32, PyTorch's own fused AdamW.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from prdp_fast.core.records import Prompt
from prdp_fast.models.pipeline import Pipeline
from prdp_fast.rewards import WeightedRewards
from prdp_fast.sampling.transitions import Transitions


def log_prob_of(sample: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """(N,) mean over a latent of the normal log-density, as ddpo-pytorch's ddim_step_with_logprob ends."""
    log_prob = -((sample.detach() - mean) ** 2) / (2 * std**2) - torch.log(std) - math.log(math.sqrt(2 * math.pi))
    return log_prob.mean(dim=tuple(range(1, log_prob.ndim)))


class PlainDdpo:
    """One epoch at a time, on a CPU."""

    def __init__(
        self,
        denoiser: nn.Module,
        pipeline: Pipeline,
        transitions: Transitions,
        rewards: WeightedRewards,
        *,
        guidance_scale: float | None,
        batch: int,
        train_batch: int | None = None,
        learning_rate: float = 6e-5,
        clip_range: float = 1e-4,
    ) -> None:
        self.denoiser, self.pipeline, self.rewards = denoiser.requires_grad_(True), pipeline, rewards
        self.guidance_scale, self.batch, self.clip_range = guidance_scale, batch, clip_range
        self.train_batch = train_batch or batch  # of the update; `batch` samples
        self.steps = [
            (int(t), float(a), float(b), torch.tensor(float(s)))
            for t, a, b, s in zip(
                transitions.timesteps, transitions.sample_coef, transitions.output_coef, transitions.std, strict=True
            )
        ]
        self.optimizer = torch.optim.AdamW(denoiser.parameters(), lr=learning_rate, weight_decay=1e-4, fused=True)

    def noise_pred(self, latents: torch.Tensor, timestep: int, embeds: torch.Tensor, empty: torch.Tensor) -> torch.Tensor:
        if self.guidance_scale is None:
            return self.denoiser(latents, timestep, encoder_hidden_states=embeds).sample
        both = torch.cat([empty.expand_as(embeds), embeds])
        uncond, cond = self.denoiser(torch.cat([latents] * 2), timestep, encoder_hidden_states=both).sample.chunk(2)
        return uncond + self.guidance_scale * (cond - uncond)

    def epoch(self, prompts: list[Prompt], images_per_prompt: int, embeds: torch.Tensor, empty: torch.Tensor) -> torch.Tensor:
        """embeds (G, L, D), empty (1, L, D). Returns: the images, (N, 3, H, W) uint8."""
        rows = [prompt for prompt in prompts for _ in range(images_per_prompt)]
        embeds = embeds.repeat_interleave(images_per_prompt, 0)
        samples, images, scores = [], [], []
        for start in range(0, len(rows), self.batch):
            part = slice(start, start + self.batch)
            samples.append(self.sample(embeds[part], empty))
            pictures = self.pipeline.decode(samples[-1][0][:, -1])
            scored = self.rewards.score(pictures, [row.text for row in rows[part]], [row.metadata for row in rows[part]])
            images.append(pictures)
            scores.append(scored.total)
        self.update(samples, torch.cat(scores).view(len(prompts), images_per_prompt), embeds, empty)
        return torch.cat(images)

    @torch.no_grad()
    def sample(self, embeds: torch.Tensor, empty: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One batch: latents (n, T + 1, C, H, W) and log-probs (n, T)."""
        latents = torch.randn(len(embeds), *self.pipeline.latent_shape)
        trajectory, log_probs = [latents], []
        for timestep, a, b, std in self.steps:
            mean = a * latents + b * self.noise_pred(latents, timestep, embeds, empty)
            latents = mean + std * torch.randn_like(mean)
            trajectory.append(latents)
            log_probs.append(log_prob_of(latents, mean, std) if std > 0 else torch.zeros(len(latents)))
        return torch.stack(trajectory, 1), torch.stack(log_probs, 1)

    def update(
        self, samples: list[tuple[torch.Tensor, torch.Tensor]], rewards: torch.Tensor, embeds: torch.Tensor, empty: torch.Tensor
    ) -> None:
        """rewards (G, B), embeds (G * B, L, D): batch by batch, timestep by timestep, then one optimizer step."""
        advantages = ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-8)).flatten()
        count = sum(float(std) > 0 for *_, std in self.steps) * len(embeds)
        trajectories, old_log_probs = (torch.cat(tensors) for tensors in zip(*samples, strict=True))
        for start in range(0, len(embeds), self.train_batch):
            part = slice(start, start + self.train_batch)
            trajectory, old = trajectories[part], old_log_probs[part]
            for step, (timestep, a, b, std) in enumerate(self.steps):
                if std == 0:
                    continue
                x, following = trajectory[:, step], trajectory[:, step + 1]
                mean = a * x + b * self.noise_pred(x, timestep, embeds[part], empty)
                ratio = torch.exp(log_prob_of(following, mean, std) - old[:, step])
                clipped = torch.clamp(ratio, 1 - self.clip_range, 1 + self.clip_range)
                loss = torch.maximum(-advantages[part] * ratio, -advantages[part] * clipped).sum() / count
                loss.backward()
        nn.utils.clip_grad_norm_(self.denoiser.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
