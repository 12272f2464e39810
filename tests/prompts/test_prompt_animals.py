from __future__ import annotations

from pathlib import Path

import pytest

from prdp_fast.config.recipe import PromptSettings
from prdp_fast.prompts import PromptSet, PromptStream, animals
from prdp_fast.prompts import shards as build
from prdp_fast.prompts.verify import verify


def test_the_papers_prompts_and_as_many_unseen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRDP_CACHE", str(tmp_path))
    recipe = PromptSettings(source="animals")
    sets = {name: list(PromptSet.open("animals", name)) for name in (recipe.train, recipe.seen, recipe.unseen)}
    assert [len(prompts) for prompts in sets.values()] == [45, 45, 45]
    seen, unseen = ({prompt.text for prompt in sets[name]} for name in ("train", "unseen_eval"))
    assert {"A painting of a squirrel", "A painting of a bird", "A painting of an ant"} <= seen
    assert {"A painting of an octopus", "A painting of a snail"} <= unseen
    assert len(seen) == len(unseen) == 45 and seen.isdisjoint(unseen)
    assert sets["seen_eval"] == sets["train"]
    assert sorted(prompt.index for prompt in sets["train"] + sets["unseen_eval"]) == list(range(90))
    assert all(animals.prompt(prompt.metadata["animal"]) == prompt.text for prompt in sets["train"])
    epoch = PromptStream(PromptSet.open("animals", "train"), seed=0, prompts_per_epoch=32).epoch(5)
    assert len({(prompt.index, prompt.occurrence) for prompt in epoch}) == 32
    (directory,) = (tmp_path / "prompts").iterdir()
    assert directory.name == f"animals-{build.animals_version()}" and verify(directory) == []


def test_version_follows_the_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    before = build.animals_version()
    monkeypatch.setattr(animals, "UNSEEN", animals.UNSEEN[:-1])
    assert build.animals_version() != before
