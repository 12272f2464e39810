"""Mutations of a model directory: every key of its configurations, every file of its weights. Used by test_mutations.py.

python tests/models/mutations.py DIRECTORY COUNT [SEED]    prints what is wrong; DIRECTORY is of `tiny_pipelines.build`. A count
                                                           of "all" tries every mutation, a quarter of an hour on one core
"""

from __future__ import annotations

import functools
import json
import math
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from prdp_fast.core.errors import UserError
from prdp_fast.core.records import Prompt
from prdp_fast.models.families import read_family
from prdp_fast.models.pipeline import Pipeline
from prdp_fast.models.text import TextEncoder
from prdp_fast.sampling.transitions import Transitions

MOST_INSIDE = 100  # of one object, all of it is tried: a vocabulary is not a configuration
VALUES: tuple[Any, ...] = (None, "x", -1, 3.5, True, [], [None], ["x", 2], {}, {"a": 1})
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 492265168\n"
# Of the file as a whole. True: it is refused in any case.
DAMAGES = {
    "absent": True, "empty": True, "pointer": True, "half": True, "without its last byte": True, "longer": True, "a page": True,
    "half precision": False, "bfloat16": False, "double": False, "int8": True, "without a tensor": True, "a NaN": True,
    "an infinity": True, "all NaN": True, "a tensor of another shape": True, "another tensor's name": True,
}  # fmt: skip
FLOATS = {"half precision": torch.float16, "bfloat16": torch.bfloat16, "double": torch.float64, "int8": torch.int8}


Tensors = dict[str, torch.Tensor]


def fill(tensors: Tensors, names: list[str], value: float, *, first_only: bool = False) -> None:
    for name in names[-1:] if first_only else names:
        tensors[name].view(-1)[: 1 if first_only else None] = value


def reshape(tensors: Tensors, names: list[str]) -> None:
    tensors[names[0]] = torch.cat([tensors[names[0]]] * 2)


def rename(tensors: Tensors, names: list[str]) -> None:
    tensors[names[0] + "_old"] = tensors.pop(names[0])


def remove(tensors: Tensors, names: list[str]) -> None:
    del tensors[names[len(names) // 2]]


CHANGES: dict[str, Callable[[Tensors, list[str]], None]] = {
    "without a tensor": remove,
    "a NaN": functools.partial(fill, value=math.nan, first_only=True),
    "an infinity": functools.partial(fill, value=math.inf, first_only=True),
    "all NaN": functools.partial(fill, value=math.nan),
    "a tensor of another shape": reshape,
    "another tensor's name": rename,
}


@dataclass(frozen=True)
class Mutation:
    file: str  # in the directory
    key: tuple[str | int, ...] | None  # where in a configuration; None: the file as a whole
    change: Any  # a value, or a name of DAMAGES
    absent: bool = False  # without the key
    alike: bool = False  # of the same kind as it was

    def __str__(self) -> str:
        key = "" if self.key is None else ".".join(map(str, self.key)) + " "
        return f"{self.file} {key}{'absent' if self.absent else json.dumps(self.change)}"

    def apply(self, directory: Path) -> None:
        path = directory / self.file
        if self.key is not None:
            content = json.loads(path.read_text())
            *outer, last = self.key
            inner = functools.reduce(lambda value, key: value[key], outer, content)
            if self.absent:
                del inner[last]
            else:
                inner[last] = self.change
            path.write_text(json.dumps(content))
        elif path.suffix == ".json" and not isinstance(self.change, str):
            path.write_text(json.dumps(self.change))
        else:
            damage(path, self.change)

    @property
    def may_change_the_model(self) -> bool:
        """Whether a model that differs may be loaded: a key that is absent or null has a default; a weight can be rounded."""
        if self.key is None:
            return DAMAGES.get(self.change) is False
        if self.absent and isinstance(self.key[-1], int):  # a list that is shorter
            return True
        return self.absent or self.alike or self.change is None


def damage(path: Path, how: str) -> None:
    whole = path.read_bytes()
    if how in FLOATS:
        tensors = {name: value.to(FLOATS[how]) for name, value in load_file(path).items()}
        save_file(tensors, path, {"format": "pt"})
    elif how in CHANGES:
        tensors = load_file(path)
        CHANGES[how](tensors, sorted(name for name, value in tensors.items() if value.is_floating_point()))
        save_file(tensors, path, {"format": "pt"})
    elif how == "absent":
        path.unlink()
    else:
        path.write_bytes({
            "empty": b"", "pointer": POINTER, "half": whole[: len(whole) // 2], "without its last byte": whole[:-1],
            "longer": whole + b"\0", "a page": b"<!DOCTYPE html><html>" + b" " * 200 + b"</html>",
        }[how])  # fmt: skip


def mutations(directory: Path) -> Iterator[Mutation]:
    """All of them, in a fixed order."""
    for path in sorted(directory.rglob("*.json")):
        name = str(path.relative_to(directory))
        for how in ("absent", "empty", "pointer", "half", "a page"):
            yield Mutation(name, None, how)
        for value in ([], None, 3):
            yield Mutation(name, None, value)
        for key, old in places(json.loads(path.read_text())):
            yield Mutation(name, key, None, absent=True)
            yield from (
                Mutation(name, key, value, alike=alike(value, old)) for value in VALUES if json.dumps(value) != json.dumps(old)
            )
    for path in sorted(directory.rglob("merges.txt")):
        for how in ("absent", "empty", "pointer", "half", "a page"):
            yield Mutation(str(path.relative_to(directory)), None, how)
    for path in sorted(directory.rglob("*.safetensors")):
        yield from (Mutation(str(path.relative_to(directory)), None, how) for how in DAMAGES)


def places(content: Any, depth: int = 2) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Every key, and what is in the small lists and objects under it."""
    inside = list(content.items() if isinstance(content, dict) else enumerate(content))
    for key, value in inside if len(inside) <= MOST_INSIDE else inside[:3]:
        yield (key,), value
        if depth > 1 and isinstance(value, (dict, list)):
            yield from (((key, *inner), old) for inner, old in places(value, depth - 1))


def as_on_the_hub(directory: Path) -> None:
    """Files as the hub has them of models older than tokenizer.json: vocab.json and merges.txt, the U-Net in several files."""
    for file in directory.glob("tokenizer*/tokenizer.json"):
        model = json.loads(file.read_text())["model"]
        (file.parent / "vocab.json").write_text(json.dumps(model["vocab"]))
        lines = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
        (file.parent / "merges.txt").write_text("\n".join(["#version: 0.2", *lines, ""]))
        file.unlink()
    network = UNet2DConditionModel.from_pretrained(directory / "unet")
    shutil.rmtree(directory / "unet")
    network.save_pretrained(directory / "unet", max_shard_size="150KB")


def alike(value: Any, old: Any) -> bool:
    """A model that differs for such a value is what was asked for. A null says nothing of the kind."""
    if old is None or type(value) is type(old):
        return True
    return {type(value), type(old)} <= {int, float}


def painted(directory: Path) -> torch.Tensor:
    """What a job sees of a model, from its table of steps to a picture, as one vector. Raises: UserError."""
    family = read_family(str(directory))
    table = Transitions.from_scheduler(family.scheduler(), 3)
    pipeline = Pipeline.load(family, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        embeddings = TextEncoder(pipeline, torch.float32).encode([Prompt(0, "three red circles and a square", {})])
        latents = torch.randn(1, *pipeline.latent_shape, generator=torch.Generator().manual_seed(0))
        output = family.predict(pipeline.denoiser, latents, torch.tensor([500]), embeddings, guided=True)
    images = pipeline.decode(latents)
    parts = [table.sample_coef, table.output_coef, table.std, table.timesteps, output, images]
    return torch.cat([part.flatten().double() for part in parts])


def fault_of(mutation: Mutation, directory: Path, expected: torch.Tensor, scratch: Path) -> str | None:
    """Try a mutation on a copy. Returns: what is wrong with how it ends, None if nothing is."""
    copy = scratch / "model"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(directory, copy)
    mutation.apply(copy)
    try:
        result = painted(copy)
    except UserError as error:
        line = str(error)
        return None if len(line) < 900 else f"a line too long: {line[:900]}"
    except Exception as error:
        return f"a traceback: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if mutation.may_change_the_model or (result.shape == expected.shape and torch.equal(result, expected)):
        chosen = mutation.alike and mutation.change is not None  # -1 for an epsilon is a number; NaN ends the run's first forward
        return None if chosen or bool(result.isfinite().all()) else "accepted, and not finite"
    return "accepted, and the model is another"


def main() -> None:
    directory = Path(sys.argv[1])
    every = list(mutations(directory))
    count = len(every) if sys.argv[2] == "all" else min(int(sys.argv[2]), len(every))
    chosen = random.Random(int(sys.argv[3]) if len(sys.argv) > 3 else 0).sample(every, count)
    expected = painted(directory)
    with tempfile.TemporaryDirectory() as scratch:
        faults = 0
        for number, mutation in enumerate(chosen, start=1):
            if reason := fault_of(mutation, directory, expected, Path(scratch)):
                faults += 1
                print(f"{mutation}: {reason}", flush=True)
            if number % 100 == 0:
                print(f"{number} of {len(every)}, {faults} faults", flush=True)
    print(f"{len(chosen)} of {len(every)} mutations of {directory.name}, {faults} faults")


if __name__ == "__main__":
    main()
