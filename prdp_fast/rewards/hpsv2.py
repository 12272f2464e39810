"""HPS v2 (arXiv:2306.09341): a CLIP ViT-H/14 that was trained on people's preferences between generated images.

rewards: [{name: hpsv2}]                                  # v2.0, which PRDP reports
rewards: [{name: hpsv2, options: {version: v2.1}}]

Source: github.com/tgxs002/HPSv2. Its checkpoints are open_clip's; their tensors are put under transformers' names, so that
neither open_clip nor torchvision is needed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from prdp_fast.core.errors import UserError
from prdp_fast.rewards.clip import Clip, read_tokenizer
from prdp_fast.rewards.scoring_model import ScoringModel, check_tensors, find_weights, read_checkpoint

HUB_ID = "xswu/HPSv2"
FILES = {"v2.0": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}
TOKENIZER = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
IMAGE_SIZE = 224
# open_clip's ViT-H-14.json, in transformers' words.
TEXT: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "max_position_embeddings": 77,
    "hidden_act": "gelu",
    "bos_token_id": 49406,
    "eos_token_id": 49407,
    "pad_token_id": 0,
}
VISION: dict[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "image_size": IMAGE_SIZE,
    "patch_size": 14,
    "hidden_act": "gelu",
}
PROJECTION = 1024
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # OpenAI's CLIP

RENAMES = (
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^text_projection$", "text_projection.weight"),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),  # transformers' own spelling
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.attn\.", ".self_attn."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)
TRANSPOSED = ("text_projection.weight", "visual_projection.weight")  # open_clip multiplies features by them from the right


def transformers_tensors(checkpoint: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """open_clip's tensors of a CLIP under the names of transformers' CLIPModel; a name that is not known stays."""
    tensors = {}
    for key, tensor in checkpoint.items():
        for pattern, replacement in RENAMES:
            key = re.sub(pattern, replacement, key)
        if match := re.fullmatch(r"(.*)\.in_proj_(weight|bias)", key):
            for part, name in zip(tensor.chunk(3), "qkv", strict=True):
                tensors[f"{match[1]}.{name}_proj.{match[2]}"] = part
        else:
            tensors[key] = tensor.T.contiguous() if key in TRANSPOSED else tensor
    return tensors


def empty_model() -> Any:
    """The architecture, on the meta device: its weights are not drawn to be overwritten."""
    from transformers import CLIPConfig, CLIPModel

    with torch.device("meta"):
        return CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=PROJECTION))


def square(images: torch.Tensor, size: int = IMAGE_SIZE) -> torch.Tensor:
    """(n, 3, H, W) uint8 -> (n, 3, size, size) float32, normalised: the longer side resized, the rest filled with black.

    As HPSv2's own copy of open_clip does it (`resize_longest_max`), which is not open_clip's resize and crop: on values from 0
    to 1 that are not rounded again, with the antialiasing that torchvision has had since 0.17.
    """
    pixels = images.float() / 255
    height, width = images.shape[-2:]
    scale = size / max(height, width)
    if scale != 1:
        new = round(height * scale), round(width * scale)
        pixels = torch.nn.functional.interpolate(pixels, new, mode="bicubic", align_corners=False, antialias=True)
        down, across = size - new[0], size - new[1]
        pixels = torch.nn.functional.pad(pixels, (across // 2, across - across // 2, down // 2, down - down // 2))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (pixels - mean) / std


class HpsV2(ScoringModel):
    """The cosine of image and prompt. The published function applies no logit scale."""

    name = "hpsv2"

    def __init__(
        self,
        *,
        version: str = "v2.0",
        weights: str | None = None,
        tokenizer: str = TOKENIZER,
        batch: int = 32,
        device: str = "auto",
        dtype: str = "float32",
    ) -> None:
        """
        Args:
            version: v2.0, which PRDP's numbers are of, or v2.1.
            weights: a checkpoint file of that version; null fetches it.
            tokenizer: hub id or directory.
        """
        if version not in FILES:
            raise ValueError(f"version is {version!r}; expected {' or '.join(FILES)}")
        super().__init__(batch=batch, device=device, dtype=dtype)
        self.version, self.weights, self.tokenizer = version, weights, tokenizer

    def load(self) -> None:
        path = find_weights(self.owner, self.weights, HUB_ID, FILES[self.version])
        checkpoint = read_checkpoint(self.owner, path)
        if not isinstance(checkpoint.get("state_dict"), dict):
            raise UserError(f"{self.owner}: {path} has no 'state_dict'; expected a copy of {FILES[self.version]} of {HUB_ID}")
        tensors = transformers_tensors(checkpoint["state_dict"])
        model = empty_model()
        check_tensors(self.owner, path, tensors, model.state_dict())
        model.load_state_dict(tensors, assign=True)
        for module in model.modules():  # which no checkpoint holds
            if "position_ids" in module._buffers:
                module.position_ids = torch.arange(module.position_ids.shape[-1])[None]
        self.clip = Clip(self.place(model), square, read_tokenizer(self.owner, self.tokenizer, TEXT["vocab_size"]))

    def score_batch(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        return self.clip.cosine(images, prompts)
