"""Model directories with a key or a file that is not as it should be end in one line, or in the model that they are."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
import torch
from mutations import Mutation, as_on_the_hub, fault_of, mutations, painted
from tiny_pipelines import build

from prdp_fast.core.errors import UserError

COUNT = 8  # of each family; tests/models/mutations.py tries as many as it is told


@pytest.mark.parametrize("family", ["sd1", "sdxl", "hub"])
def test_mutations(family: str, tmp_path: Path) -> None:
    directory = build("sd1" if family == "hub" else family, tmp_path / family)
    if family == "hub":
        as_on_the_hub(directory)
    every = list(mutations(directory))
    assert len(every) > 1000
    expected = painted(directory)
    chosen = random.Random(torch.__version__).sample(every, COUNT)  # others with the next version of the libraries
    weights = [mutation for mutation in every if mutation.file.endswith(".safetensors")]
    chosen += random.Random(0).sample(weights, COUNT // 2)
    faults = [f"{mutation}: {reason}" for mutation in chosen if (reason := fault_of(mutation, directory, expected, tmp_path))]
    assert not faults, "\n".join(faults)


VOCABULARY, MERGES, SPECIAL = "tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer/special_tokens_map.json"


def test_tokenizers_that_are_quietly_others(tmp_path: Path) -> None:
    """transformers takes them: without merges, with words that have no number, with special tokens that are no words."""
    new, old = build("sd1", tmp_path / "new"), build("sd1", tmp_path / "old")
    as_on_the_hub(old)
    (old / SPECIAL).write_text('{"unk_token": {"content": "<|endoftext|>"}, "bos_token": "<|startoftext|>"}')
    tried = [(new, Mutation("tokenizer/tokenizer.json", ("model", "merges"), {}))]
    tried += [(old, Mutation(MERGES, None, how)) for how in ("absent", "empty", "half", "pointer")]
    tried += [(old, Mutation(VOCABULARY, ("<|startoftext|>",), value)) for value in ("x", True, [], {"a": 1})]
    tried += [(old, Mutation(VOCABULARY, ("a",), 3)), (old, Mutation(SPECIAL, ("unk_token",), {}))]
    expected = painted(new)
    assert torch.equal(painted(old), expected)
    for directory, mutation in tried:
        copy = tmp_path / "tried"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(directory, copy)
        mutation.apply(copy)
        with pytest.raises(UserError, match="tokenizer") as error:
            painted(copy)
        assert len(str(error.value)) < 900, mutation


def test_the_harness_notices(tmp_path: Path) -> None:
    """A model that is quietly another."""
    directory = build("sd1", tmp_path / "sd1")
    expected = painted(directory)
    mutation = Mutation("unet/config.json", ("norm_eps",), 3.5)
    assert fault_of(mutation, directory, expected, tmp_path) == "accepted, and the model is another"
    assert fault_of(mutation, directory, painted(directory) * 0, tmp_path) is not None
