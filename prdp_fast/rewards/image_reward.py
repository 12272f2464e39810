"""ImageReward: a BLIP model that was trained on human rankings of generated pictures (arXiv:2304.05977).

rewards: [{name: image_reward, options: {dtype: bfloat16}}]

The prompt's [CLS] token looks at the picture through twelve layers of cross-attention, and five linear layers make one number of
what it saw, shifted and scaled as the model's authors do. Source: github.com/THUDM/ImageReward, ImageReward/ImageReward.py and
ImageReward/models/BLIP.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from prdp_fast.core.errors import UserError
from prdp_fast.rewards.scoring_model import ScoringModel, check_tensors, find_model_file, find_weights, read_checkpoint

HUB_ID, WEIGHTS = "zai-org/ImageReward", "ImageReward.pt"
TOKENIZER, VOCABULARY = "google-bert/bert-base-uncased", "vocab.txt"
ADDED_TOKENS = ("[DEC]", "[ENC]")  # in this order; numbers 30522 and 30523
PROMPT_LENGTH = 35  # tokens, [CLS] and [SEP] among them; what a prompt has beyond them is not read
IMAGE_SIZE = 224
PIXEL_MEAN, PIXEL_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
MEAN, STD = 0.16717362830052426, 1.0333394966054072
# ViT-L/16 as timm builds it, and med_config.json of the model's repository: transformers' own defaults are other numbers.
VISION: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": IMAGE_SIZE,
    "patch_size": 16,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
}
TEXT: dict[str, Any] = {
    "vocab_size": 30524,
    "hidden_size": 768,
    "encoder_hidden_size": VISION["hidden_size"],
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 512,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "is_decoder": True,  # which gives transformers' layers their cross-attention; a call is bidirectional unless told otherwise
}
HEAD = (1024, 128, 64, 16, 1)

# The checkpoint's names of tensors and ours, which are transformers'. The text encoder's are the same.
RENAMES = (
    (r"^blip\.visual_encoder\.cls_token$", "vision.embeddings.class_embedding"),
    (r"^blip\.visual_encoder\.pos_embed$", "vision.embeddings.position_embedding"),
    (r"^blip\.visual_encoder\.patch_embed\.proj\.", "vision.embeddings.patch_embedding."),
    (r"^blip\.visual_encoder\.norm\.", "vision.post_layernorm."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.norm([12])\.", r"vision.encoder.layers.\1.layer_norm\2."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.attn\.qkv\.", r"vision.encoder.layers.\1.self_attn.qkv."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.attn\.proj\.", r"vision.encoder.layers.\1.self_attn.projection."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.mlp\.", r"vision.encoder.layers.\1.mlp."),
    (r"^blip\.text_encoder\.", "text."),
    (r"^mlp\.layers\.", "head."),
)
# Of BLIP's pretraining, which the score does not use, and a table of numbers that every BERT has.
UNUSED = re.compile(r"^blip\.(vision_proj|text_proj)\.|^blip\.text_encoder\.embeddings\.position_ids$")


def renamed(checkpoint: Mapping[Any, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The checkpoint's tensors under our names; one that is not known keeps its own."""
    tensors = {}
    for key, tensor in checkpoint.items():
        name = str(key)
        if not UNUSED.match(name):
            for pattern, replacement in RENAMES:
                name, changed = re.subn(pattern, replacement, name)
                if changed:
                    break
            tensors[name] = tensor
    return tensors


class Blip(nn.Module):
    """Pixels and tokens to scores."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

        self.vision = BlipVisionModel(BlipVisionConfig(**VISION))
        self.text = BlipTextModel(BlipTextConfig(**TEXT), add_pooling_layer=False)
        layers: list[nn.Module] = []
        for inputs, outputs, dropout in zip((TEXT["hidden_size"], *HEAD), HEAD, (0.2, 0.2, 0.1, None, None)):
            layers += [nn.Linear(inputs, outputs)] + ([] if dropout is None else [nn.Dropout(dropout)])
        self.head = nn.Sequential(*layers)

    def forward(self, pixels: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """
        Args:
            pixels: (N, 3, 224, 224), normalised, of the model's dtype.
            tokens, mask: (N, L) int64; the mask is 1 for tokens and 0 for padding.
        Returns: (N,) float32.
        """
        seen = self.vision(pixels).last_hidden_state
        read = self.text(tokens, attention_mask=mask, encoder_hidden_states=seen).last_hidden_state[:, 0]
        return (self.head(read.float())[:, 0] - MEAN) / STD


def read_vocabulary(owner: str, tokenizer: str) -> dict[str, int]:
    """Raises: UserError unless it holds as many words as the model knows. transformers would go on with five."""
    path = find_model_file(owner, tokenizer, VOCABULARY)
    try:
        words = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{owner}: {path} cannot be read ({error}); fetch it again") from None
    expected = TEXT["vocab_size"] - len(ADDED_TOKENS)
    if len(words) != expected:
        raise UserError(f"{owner}: {path} has {len(words)} words; expected the {expected} of {TOKENIZER}")
    return {word: number for number, word in enumerate(words)}


def to_pixels(images: torch.Tensor) -> torch.Tensor:
    """Resize(224, bicubic), CenterCrop(224) and Normalize as torchvision has them, by PIL.

    Args: images: (N, 3, H, W) uint8. Returns: (N, 3, 224, 224) float32.
    """
    pictures = []
    for image in images:
        picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
        short = min(picture.size)
        picture = picture.resize([int(IMAGE_SIZE * side / short) for side in picture.size], Image.Resampling.BICUBIC)
        left, top = (round((side - IMAGE_SIZE) / 2) for side in picture.size)
        pictures.append(np.asarray(picture.crop((left, top, left + IMAGE_SIZE, top + IMAGE_SIZE))))
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
    return (pixels - torch.tensor(PIXEL_MEAN).view(3, 1, 1)) / torch.tensor(PIXEL_STD).view(3, 1, 1)


class ImageReward(ScoringModel):
    """The published model's score, higher is better; some come out below 0."""

    name = "image_reward"

    def __init__(
        self,
        *,
        batch: int = 32,
        device: str = "auto",
        dtype: str = "float32",
        weights: str | None = None,
        tokenizer: str = TOKENIZER,
    ) -> None:
        """
        Args:
            batch, device, dtype: see ScoringModel; the last layers, from the [CLS] token on, stay in float32.
            weights: a copy of the published ImageReward.pt; None takes it from the hub, 1.8 GB.
            tokenizer: a directory with BERT's vocab.txt, or a hub id.
        Raises: ValueError for an option that makes no sense.
        """
        super().__init__(batch=batch, device=device, dtype=dtype)
        for option, value in (("weights", weights), ("tokenizer", tokenizer)):
            if not isinstance(value, str) and (value is not None or option == "tokenizer"):
                raise ValueError(f"{option} is {value!r}; expected a path")
        self.weights, self.tokenizer = weights, tokenizer

    def load(self) -> None:
        from transformers import BertTokenizer

        self.words = BertTokenizer(vocab=read_vocabulary(self.owner, self.tokenizer), do_lower_case=True)
        self.words.add_tokens(list(ADDED_TOKENS), special_tokens=True)
        path = find_weights(self.owner, self.weights, HUB_ID, WEIGHTS)
        tensors = renamed(read_checkpoint(self.owner, path))
        with torch.device("meta"):  # what is loaded needs no memory and no random numbers first
            model = Blip()
        check_tensors(self.owner, path, tensors, model.state_dict())
        model.load_state_dict(tensors, assign=True)
        model.text.embeddings.position_ids = torch.arange(TEXT["max_position_embeddings"])[None]  # of no checkpoint
        self.place(model)
        model.head.float()
        self.model = model

    def score_batch(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        read = self.words(list(prompts), padding="max_length", truncation=True, max_length=PROMPT_LENGTH, return_tensors="pt")
        pixels = to_pixels(images).to(self.device, self.dtype)
        return self.model(pixels, read["input_ids"].to(self.device), read["attention_mask"].to(self.device))
