"""Run directories with everything in them that a report shows, made without a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from prdp_fast.evaluation.statistics import mean_and_error, paired_mean_and_error

HOSTILE = "<script>alert(1)</script> \u202egnirts\u202c \x1b[31mred\x1b[0m \"quoted\" 'single' & \x00 \ud800"
SECRET = "s3cr3t"


def evaluation(prompts: list[str], shift: float, side: int = 8, seed: int = 0) -> dict[str, Any]:
    """Two images a prompt, as training keeps them."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (2 * len(prompts), 3, side, side), dtype=torch.uint8, generator=generator)
    scores = torch.rand(len(prompts), 2, generator=generator) + shift
    return {"prompts": prompts, "images": images, "rewards": scores.mean(1), "strict": None, "scores": scores}


def told(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """As a summary has it."""
    first, second = before["rewards"], after["rewards"]
    measured = {"before": mean_and_error(first), "after": mean_and_error(second)}
    return measured | {"difference": paired_mean_and_error(first, second)}


def recipe(seed: int, **objective: Any) -> dict[str, Any]:
    held = {"name": "http", "weight": 1.0, "options": {"url": f"https://{SECRET}.example"}}
    return {
        "evaluation": {"prompts": 6, "rewards": [held]},
        "seed": seed,
        "model": {"pretrained": "/home/somebody/models/base-model", "lora": None},
        "rewards": [
            {"name": "http", "weight": 1.0, "normalise": "none", "options": {
                "url": f"https://{SECRET}.example", "token_env": f"PRDP_{SECRET}", "arguments": {"key": SECRET}, "batch": 4,
            }}
        ],
        "objective": {"name": "prdp", "kl_weight": 5.0, "clip_range": 0.001} | objective,
        "schedule": {"epochs": 6, "prompts_per_epoch": 4, "images_per_prompt": 2},
    }  # fmt: skip


def row(epoch: int, seed: int = 0) -> dict[str, Any]:
    return {
        "epoch": epoch, "reward": 0.5 + 0.05 * epoch + 0.01 * seed, "reward_std": 0.1, "loss": 1.0 / (epoch + 1),
        "reward/http": 0.5, "reward/http/part": 0.1 * epoch, "clip_fraction": 0.2, "kl_to_reference": 1e-3 * epoch,
        "drift": 1e-6, "drift/step_000": 1e-6, "drift/step_001": 2e-7, "first_ratio_error": 1e-7, "grad_norm": 0.1,
        "images_per_s": 8.0, "seconds/rollout": 1.0, "seconds/reference": 1.0, "seconds/update": 3.3, "skipped_updates": 0.0,
    }  # fmt: skip


PROMPTS = ["a red square", "a blue circle", HOSTILE.replace("\ud800", ""), "ein Gr\u00fcn", "\u05e9\u05dc\u05d5\u05dd", "x" * 900]


def a_run(directory: Path, seed: int = 0, *, side: int = 8, epochs: int = 6, **objective: Any) -> Path:
    """A finished run with everything."""
    directory.mkdir(parents=True)
    record = {
        "recipe": recipe(seed, **objective), "world_size": 2, "versions": {"torch": "2.13.0", "xformers": None},
        "deepspeed": {"zero_optimization": {"stage": 2, "offload_optimizer": {"nvme_path": "/home/somebody/nvme"}}},
        "machine": {"processor": "A processor", "cores": 2},
    }  # fmt: skip
    (directory / "run.json").write_text(json.dumps(record))
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row(epoch, seed)) + "\n" for epoch in range(epochs)))
    before = {"unseen": evaluation(PROMPTS, 0.0, side), "seen": evaluation(PROMPTS[:3], 0.0, side)}
    after = {"unseen": evaluation(PROMPTS, 0.4, side, 1), "seen": evaluation(PROMPTS[:3], 0.4, side, 1)}
    torch.save(before, directory / "evaluation_before.pt")
    torch.save(after, directory / "evaluation_after.pt")
    summary = {
        "evaluation": {name: told(before[name], after[name]) for name in before}, "epochs": epochs,
        "images": 8 * epochs, "wall_s": 40.0, "unet_forwards": {"rollout": 600, "reference": 600, "update": 600},
    }  # fmt: skip
    summary["evaluation"]["unseen"]["held"] = {"jpeg_size": told(before["unseen"], after["unseen"])}
    (directory / "summary.json").write_text(json.dumps(summary))
    (directory / "acceleration.json").write_text(json.dumps({"compile": {"value": "off", "reason": HOSTILE}}))
    return directory
