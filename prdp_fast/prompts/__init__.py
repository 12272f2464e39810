"""Prompt sets: WebDataset shards and their index (`build`), and the shuffled, resumable stream over them (`stream`)."""

from prdp_fast.prompts.shards import (
    build_animal_shards,
    build_scene_shards,
    build_text_shards,
    ensure_animal_shards,
    ensure_scene_shards,
    ensure_text_shards,
    write_index,
    write_shards,
)
from prdp_fast.prompts.stream import PromptSet, PromptStream

__all__ = [
    "PromptSet",
    "PromptStream",
    "build_animal_shards",
    "build_scene_shards",
    "build_text_shards",
    "ensure_animal_shards",
    "ensure_scene_shards",
    "ensure_text_shards",
    "write_index",
    "write_shards",
]
