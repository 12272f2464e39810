"""Tokenizers of a pipeline, looked at before prompts go through them: what is wrong with their files is seldom an error there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from prdp_fast.core.errors import UserError
from prdp_fast.models.families.base import Family

MOST_LOST = 0.01  # of a vocabulary's words that no merge makes: words added by hand


def check_tokenizers(family: Family, whole: DiffusionPipeline, directory: Path) -> None:
    """Cut prompts where the text encoders end, and try them.

    Args: directory: that `whole` was loaded from.
    Raises: UserError if a tokenizer has no words or other words than its encoder, or a prompt cannot be encoded.
    """
    what = f"model.pretrained {family.pretrained!r}"
    encoders = [name for name in family.networks() if name.startswith("text_encoder") and getattr(whole, name) is not None]
    if not encoders:  # left out: no prompt goes through them
        return
    for name, encoder in ((name.replace("text_encoder", "tokenizer"), name) for name in encoders):
        config = getattr(whole, encoder).config
        try:
            fault = tokenizer_fault(getattr(whole, name), config, directory / name)
        except Exception as error:  # of special tokens that are no words: RecursionError, TypeError and others
            fault = f"does not work ({said(error)}); fetch its files again"
        if fault:
            raise UserError(f"{what}: {name} {fault}")
    if hasattr(whole, "tokenizer_max_length"):  # some pipelines have looked at it before it was mended
        whole.tokenizer_max_length = whole.tokenizer.model_max_length
    try:
        with torch.no_grad():
            family.encode(whole, ["a prompt"], negative=False)
    except Exception as error:  # of tokenizers and text encoders, by the setting that is wrong
        raise UserError(f"{what}: a prompt cannot be encoded with its tokenizer and text encoder: {said(error)}") from None


def tokenizer_fault(tokenizer: Any, config: Any, folder: Path) -> str | None:
    """What is wrong with a tokenizer for the text encoder of `config`, None if nothing is. A length that is none is mended."""
    longest, words = getattr(config, "max_position_embeddings", None), len(tokenizer)  # T5 has no positions of its own
    if longest and (not isinstance(tokenizer.model_max_length, (int, float)) or tokenizer.model_max_length > longest):
        tokenizer.model_max_length = longest
    if fault := numbering_fault(folder):
        return fault
    if words <= len(tokenizer.all_special_ids):  # what transformers makes where the vocabulary's file is missing
        return "has no words; expected tokenizer.json, or vocab.json and merges.txt; fetch them"
    if words > config.vocab_size:
        return f"knows {words} words and its text encoder {config.vocab_size}; they are of two models"
    if lost := words_without_merges(tokenizer):
        return (
            f"has no merge for {lost:,} of its {words:,} words, so that prompts would be split into letters; merges.txt, or the "
            "merges in tokenizer.json, are cut off or of another vocabulary; fetch them again"
        )
    return None


def numbering_fault(folder: Path) -> str | None:
    """What is wrong with the numbers of the words in a tokenizer's files. transformers drops a word that has none, silently."""
    for file in (folder / "vocab.json", folder / "tokenizer.json"):
        if not file.is_file():
            continue
        content = json.loads(file.read_text(encoding="utf-8"))
        vocabulary = content if file.name == "vocab.json" else content["model"]["vocab"]
        if not isinstance(vocabulary, dict):
            continue  # of a tokenizer that has no numbers
        for word, number in vocabulary.items():
            if type(number) is not int or number < 0:
                return f"has a {file.name} with {json.dumps(number)[:40]} for the number of {word!r}; fetch it again"
        if len(set(vocabulary.values())) < len(vocabulary):
            return f"has a {file.name} where two words have one number; fetch it again"
    return None


def words_without_merges(tokenizer: Any) -> int:
    """Words of a byte-pair vocabulary that no prompt can come to; 0 if they are few, or the tokenizer is of another kind."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    model = {} if backend is None else json.loads(backend.to_str())["model"]
    if model.get("type") != "BPE":
        return 0
    made = {"".join(pair.split(" ", 1) if isinstance(pair, str) else pair) for pair in model["merges"]}
    suffix = model.get("end_of_word_suffix") or ""
    kept = made | tokenizer.get_added_vocab().keys()
    lost = sum(word not in kept and len(word.removesuffix(suffix)) > 1 for word in model["vocab"])
    return lost if lost > len(model["vocab"]) * MOST_LOST else 0


def said(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
