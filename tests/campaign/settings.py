"""How a campaign's job is spread, and what it is: the same small job everywhere, so that one ends as the other."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from launching import ROOT, settings

EPOCHS = 4
REWARD = Path(__file__).with_name("reward.py")
JOB = {
    "prompts.source": "animals",  # quickly read
    "sampler.num_inference_steps": 2, "sampler.guidance_scale": "null", "schedule.epochs": EPOCHS,
    "schedule.updates_per_epoch": 1, "schedule.prompts_per_epoch": 4, "schedule.images_per_prompt": 2, "schedule.micro_batch": 8,
    "evaluation.prompts": 2, "evaluation.every": 2, "checkpoint.every": 1, "optimizer.learning_rate": 1e-3,
    "rewards": f"[{{name: python, options: {{function: '{REWARD}:score'}}}}]",
    # What `auto` measures at start could come out otherwise in another run, which would then round differently.
    "performance.attention": "sdpa", "performance.fuse_qkv": "off",
}  # fmt: skip
LORA, AVERAGE = "{rank: 2}", 0.9
# Where a run goes on with other ranks, Adam must not make a step out of a gradient that is only rounding.
RATE = 3e-5
ROUNDED = {"optimizer.eps": 1e-4, "optimizer.learning_rate": RATE}


@dataclass(frozen=True)
class Setting:
    ranks: int = 1
    stage: int = 2
    offload: bool = False
    lora: bool = False
    ema: bool = False
    rounded: bool = False  # results may be compared with those of other ranks and stages
    fault: str = ""  # CAMPAIGN_FAULT of every start: of a reward that is always so

    def __str__(self) -> str:
        parts = [f"{self.ranks} rank{'s' if self.ranks > 1 else ''}", f"stage {self.stage}"]
        parts += [name for name, is_on in (("offload", self.offload), ("LoRA", self.lora), ("EMA", self.ema)) if is_on]
        return ", ".join(parts)

    def values(self) -> dict[str, object]:
        """Recipe settings."""
        values: dict[str, object] = dict(JOB)
        if self.lora:
            values["model.lora"] = LORA
        if self.ema:
            values["model.ema_decay"] = AVERAGE
        return values | (ROUNDED if self.rounded else {})

    def words(self, model: Path, run: Path, more: dict[str, object]) -> list[str]:
        """Its command line. The DeepSpeed file is written beside the model."""
        name = f"zero{self.stage}{'_offload' if self.offload else ''}.json"
        config = ROOT / "configs" / name
        if not config.exists():
            content = json.loads((ROOT / "configs" / f"zero{self.stage}.json").read_text())
            content["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
            config = model.with_name(name)
            config.write_text(json.dumps(content))
        values = self.values() | {"model.pretrained": model} | more
        return ["--config", str(config), "--recipe", "smoke", "--output", str(run), *settings(values)]
