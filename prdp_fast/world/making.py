"""What the commands that train an embedded model share: scenes to train on, a resumable trainer, the look at its samples."""

from __future__ import annotations

import copy
import math
import random
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from torch import nn

from prdp_fast.core.files import write_tensors
from prdp_fast.world import scenes
from prdp_fast.world.reader import read_images

MAX_TOKENS = 20  # 18 words and the two markers
LATENT_SIZE = scenes.IMAGE_SIZE // 4


class Trainer:
    """Modules trained together with AdamW, warm-up and cosine decay, and an averaged copy; saved every minute."""

    def __init__(self, modules: nn.Module, path: Path, *, steps: int, lr: float, ema: float) -> None:
        self.modules, self.path, self.steps, self.lr, self.ema_decay = modules, path, steps, lr, ema
        self.optimizer = torch.optim.AdamW(modules.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=1e-4)
        self.ema = copy.deepcopy(modules).requires_grad_(False)
        self.step = 0
        self.saved_at = self.started_at = time.monotonic()
        if path.exists():
            state = torch.load(path, weights_only=True)
            modules.load_state_dict(state["modules"])
            self.ema.load_state_dict(state["ema"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step = state["step"]
            print(f"{path.name}: resumed at step {self.step}", flush=True)

    def update(self, loss: torch.Tensor) -> None:
        warmup = min(1.0, (self.step + 1) / 100)
        cosine = 0.5 * (1 + math.cos(math.pi * self.step / self.steps))
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * warmup * max(cosine, 0.01)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        decay = min(self.ema_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for average, parameter in zip(self.ema.parameters(), self.modules.parameters(), strict=True):
                average.lerp_(parameter, 1 - decay)
        if self.step == self.steps or time.monotonic() - self.saved_at > 60:
            self.save()

    def save(self) -> None:
        state = {
            "modules": self.modules.state_dict(), "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(), "step": self.step,
        }  # fmt: skip
        write_tensors(self.path, state)
        self.saved_at = time.monotonic()

    def log(self, **values: float) -> None:
        shown = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
        elapsed = time.monotonic() - self.started_at
        print(f"{self.path.stem} {self.step}/{self.steps}  {elapsed:.0f} s  {shown}", flush=True)


def step_generator(seed: int, step: int) -> torch.Generator:
    """Every step has its own generator, so a resumed run draws what an uninterrupted one would have drawn."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def draw_dataset(count: int, seed: int) -> tuple[list[str], torch.Tensor, torch.Tensor]:
    """`count` training scenes: prompts, images (count, 3, 32, 32) uint8, foreground masks (count, 1, 32, 32) uint8."""
    chooser = random.Random(seed)
    chosen: list[scenes.Scene] = []
    while len(chosen) < count:
        scene = scenes.scene_at(chooser.randrange(scenes.NUM_SCENES))
        if scenes.split_of(scene) == "train":
            chosen.append(scene)
    images = scenes.render(chosen, torch.Generator().manual_seed(seed))
    backgrounds = torch.tensor([scenes.PALETTE[scene.background] for scene in chosen], dtype=torch.uint8)
    foreground = (images != backgrounds[:, :, None, None]).any(1, keepdim=True).to(torch.uint8)
    return [scene.prompt() for scene in chosen], images, foreground


def to_model_range(images: torch.Tensor) -> torch.Tensor:
    return images.float() / 127.5 - 1


def to_uint8(pixels: torch.Tensor) -> torch.Tensor:
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


@torch.no_grad()
def encode_dataset(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    return torch.cat([vae.encode(to_model_range(part).to(vae.device)).latent_dist.mode().cpu() for part in images.split(256)])


def report_samples(pipeline: DiffusionPipeline, path: Path, **options: Any) -> None:
    """Sample 96 held-out prompts, print how many attributes are right, write an 8 x 6 grid of the first 48.

    Args: options: further ones of the pipeline's call.
    """
    chooser = random.Random(1)
    prompts: list[str] = []
    while len(prompts) < 96:
        scene = scenes.scene_at(chooser.randrange(scenes.NUM_SCENES))
        if scenes.split_of(scene) != "train":
            prompts.append(scene.prompt())
    pixels = pipeline(
        prompts, num_inference_steps=10, guidance_scale=2.0, output_type="pt", generator=torch.Generator().manual_seed(1),
        **options,
    ).images  # fmt: skip
    images = (pixels * 255).round().to(torch.uint8).cpu()
    reading = read_images(images, prompts)
    rates = zip(scenes.ATTRIBUTES, reading.attribute_right.float().mean(0).tolist(), strict=True)
    print(
        f"held-out samples: soft {reading.scores.mean():.3f}  strict {reading.strict.float().mean():.0%}  "
        + "  ".join(f"{name} {rate:.0%}" for name, rate in rates),
        flush=True,
    )
    grid = images[:48].reshape(6, 8, 3, 32, 32).permute(0, 3, 1, 4, 2).reshape(192, 256, 3)
    pipeline.numpy_to_pil(grid.numpy()[None] / 255.0)[0].resize((768, 576), 0).save(path)


def save_pipeline(pipeline: DiffusionPipeline, directory: Path) -> None:
    """In float16 safetensors."""
    pipeline.to(dtype=torch.float16).save_pretrained(directory, safe_serialization=True)
    size = sum(path.stat().st_size for path in directory.rglob("*.safetensors"))
    print(f"{directory}: {size / 1e6:.1f} MB of safetensors")
