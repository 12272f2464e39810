"""CLIP (arXiv:2103.00020) as rewards use it: unit features of images and of texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from prdp_fast.core.errors import UserError
from prdp_fast.rewards.scoring_model import ScoringModel, find_model_file, read_pretrained
from prdp_fast.world import TINY_SCORER

Pixels = Callable[[torch.Tensor], torch.Tensor]  # (n, 3, H, W) uint8 -> (n, 3, S, S) float32, both on the CPU


class Clip:
    """A CLIP model, or its image tower alone, with what turns images and texts into its inputs."""

    def __init__(self, model: Any, pixels: Pixels, tokenizer: Any = None) -> None:
        """
        Args:
            model: transformers' CLIPModel or CLIPVisionModelWithProjection, on its device and in its dtype.
            tokenizer: of texts; None if there are none.
        """
        self.model, self.pixels, self.tokenizer = model, pixels, tokenizer

    @torch.no_grad()
    def images(self, images: torch.Tensor) -> torch.Tensor:
        """(n, 3, H, W) uint8 on the CPU -> (n, D) float32 of length 1."""
        weight = self.model.visual_projection.weight
        pixels = self.pixels(images).to(weight.device, weight.dtype)
        return unit(self.model.visual_projection(self.model.vision_model(pixels).pooler_output))

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        """n texts, cut where the model's context ends -> (n, D) float32 of length 1. Equal texts are read once."""
        once = list(dict.fromkeys(texts))
        longest = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(once, padding=True, truncation=True, max_length=longest, return_tensors="pt")["input_ids"]
        # No mask: attention is causal, and the feature is that of the first end of text, before all padding.
        read = self.model.text_model(tokens.to(self.model.text_projection.weight.device)).pooler_output
        numbers = {text: number for number, text in enumerate(once)}
        return unit(self.model.text_projection(read))[[numbers[text] for text in texts]]

    def cosine(self, images: torch.Tensor, texts: Sequence[str]) -> torch.Tensor:
        """(n,) float32: of each image with its own text."""
        return (self.images(images) * self.texts(texts)).sum(-1)


def unit(features: torch.Tensor) -> torch.Tensor:
    features = features.float()
    return features / features.norm(dim=-1, keepdim=True)


def processor_pixels(owner: str, name: str) -> Pixels:
    """The preprocessing that a model was published with, by its preprocessor_config.json. Raises: UserError.

    The processor that works on PIL pictures: it needs no torchvision, and resizes as the models' own code does.
    """
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    find_model_file(owner, name, "preprocessor_config.json")
    processor = read_pretrained(owner, CLIPImageProcessorPil, name)

    def pixels(images: torch.Tensor) -> torch.Tensor:
        pictures = list(images.permute(0, 2, 3, 1).numpy())
        return processor(pictures, return_tensors="pt", input_data_format="channels_last")["pixel_values"]

    return pixels


def read_tokenizer(owner: str, name: str, words: int) -> Any:
    """words: of the model's vocabulary. transformers makes a tokenizer of two words, silently, where the vocabulary's file is
    missing or out of reach.

    Raises: UserError.
    """
    from transformers import CLIPTokenizer

    find_model_file(owner, name, "tokenizer_config.json")
    tokenizer = read_pretrained(owner, CLIPTokenizer, name)
    if len(tokenizer) < words:
        raise UserError(
            f"{owner}: the tokenizer of {name!r} knows {len(tokenizer)} words, the model {words}; expected the model's own, with "
            "tokenizer.json, or vocab.json and merges.txt"
        )
    return tokenizer


class ClipReward(ScoringModel):
    """A reward that is a function of a published CLIP model's features, in transformers' layout."""

    def __init__(self, *, model: str, processor: str | None = None, **placing: Any) -> None:
        """
        Args:
            model: hub id or directory; "tiny_scorer" is the embedded world's.
            processor: of the tokenizer and the image processor, if they are not the model's own.
        """
        super().__init__(**placing)
        self.model = str(TINY_SCORER) if model == TINY_SCORER.name else model
        self.processor = processor or self.model

    def load(self) -> None:
        from transformers import CLIPModel

        find_model_file(self.owner, self.model, "config.json")
        model = self.place(read_pretrained(self.owner, CLIPModel, self.model))
        tokenizer = read_tokenizer(self.owner, self.processor, model.config.text_config.vocab_size)
        self.clip = Clip(model, processor_pixels(self.owner, self.processor), tokenizer)
