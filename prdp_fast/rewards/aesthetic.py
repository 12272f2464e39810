"""LAION's aesthetic predictor V2: how much would people like the image, from 1 to 10? It reads no prompt.

rewards: [{name: aesthetic}]

Source: github.com/christophschuhmann/improved-aesthetic-predictor (sac+logos+ava1-l14-linearMSE), which DDPO and PRDP use.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from prdp_fast.rewards.clip import Clip, processor_pixels
from prdp_fast.rewards.scoring_model import (
    ScoringModel,
    check_tensors,
    find_model_file,
    find_weights,
    read_checkpoint,
    read_pretrained,
)

MODEL = "openai/clip-vit-large-patch14"
HEAD = ("trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth")  # the same tensors, on the hub
WIDTHS = (1024, 128, 64, 16, 1)
DROPOUT_AFTER = (0, 1, 2)  # layers; in use dropout does nothing, but it numbers the checkpoint's layers 0, 2, 4, 6, 7


def build_head(features: int) -> nn.Sequential:
    """Linear layers and nothing between them. features: of the image, 768 for ViT-L/14."""
    layers: list[nn.Module] = []
    for number, (inputs, outputs) in enumerate(zip((features, *WIDTHS), WIDTHS)):
        layers.append(nn.Linear(inputs, outputs))
        if number in DROPOUT_AFTER:
            layers.append(nn.Dropout(0.0))
    return nn.Sequential(*layers)


class Aesthetic(ScoringModel):
    """The head's value of the unit image features."""

    name = "aesthetic"

    def __init__(
        self,
        *,
        model: str = MODEL,
        weights: str | None = None,
        batch: int = 32,
        device: str = "auto",
        dtype: str = "float32",
    ) -> None:
        """
        Args:
            model: hub id or directory of the CLIP model, of which the image tower is loaded.
            weights: a file of the head; null fetches it.
        """
        super().__init__(batch=batch, device=device, dtype=dtype)
        self.model, self.weights = model, weights

    def load(self) -> None:
        from transformers import CLIPVisionModelWithProjection

        find_model_file(self.owner, self.model, "config.json")
        tower = self.place(read_pretrained(self.owner, CLIPVisionModelWithProjection, self.model))
        self.clip = Clip(tower, processor_pixels(self.owner, self.model))
        path = find_weights(self.owner, self.weights, *HEAD)
        state = head_tensors(read_checkpoint(self.owner, path))
        head = build_head(tower.config.projection_dim)
        check_tensors(self.owner, path, state, head.state_dict())
        head.load_state_dict(state)
        self.head = head.to(self.device).eval().requires_grad_(False)  # float32: it costs nothing

    def score_batch(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        return self.head(self.clip.images(images))[:, 0]


def head_tensors(checkpoint: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The checkpoint's tensors under the head's names: layers.0.weight becomes 0.weight."""
    return {name.removeprefix("layers."): tensor for name, tensor in checkpoint.items()}
