"""Model directories with a key or a file that is not as it should be end in one line, or in the model that they are."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from mutations import Mutation, fault_of, mutations, painted
from tiny_pipelines import build

COUNT = 8  # of each family; tests/models/mutations.py tries as many as it is told


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_mutations(family: str, tmp_path: Path) -> None:
    directory = build(family, tmp_path / family)
    every = list(mutations(directory))
    assert len(every) > 1000
    expected = painted(directory)
    chosen = random.Random(torch.__version__).sample(every, COUNT)  # others with the next version of the libraries
    weights = [mutation for mutation in every if mutation.file.endswith(".safetensors")]
    chosen += random.Random(0).sample(weights, COUNT // 2)
    faults = [f"{mutation}: {reason}" for mutation in chosen if (reason := fault_of(mutation, directory, expected, tmp_path))]
    assert not faults, "\n".join(faults)


def test_the_harness_notices(tmp_path: Path) -> None:
    """A model that is quietly another."""
    directory = build("sd1", tmp_path / "sd1")
    expected = painted(directory)
    mutation = Mutation("unet/config.json", "norm_eps", 3.5)
    assert fault_of(mutation, directory, expected, tmp_path) == "accepted, and the model is another"
    assert fault_of(mutation, directory, painted(directory) * 0, tmp_path) is not None
