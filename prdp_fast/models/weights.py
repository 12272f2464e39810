"""The weight files of a model: which ones are read, and what is wrong with them before they are."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from prdp_fast.core.digest import files_digest
from prdp_fast.core.errors import UserError
from prdp_fast.core.weight_files import check_weight_file, fault, quantised_tensor, read_header
from prdp_fast.models.configs import read_json
from prdp_fast.models.files import find_file, resolve

READ = {".json", ".txt", ".model", ".safetensors", ".bin"}  # of a component; tokenizers have the second and third
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")  # of weight files: diffusers', transformers' and its older one


@dataclass(frozen=True)
class Weights:
    """The files of one network, as its directory holds them."""

    files: tuple[Path, ...]
    variant: str | None = None  # of their names, such as fp16

    def layers(self) -> int:
        """Of a text encoder, by the names in its safetensors files; 0 if they have no such names."""
        names = [name for path in self.files if path.suffix == ".safetensors" for name in read_header(path)]
        return max((int(match[1]) + 1 for name in names if (match := re.search(r"\.layers\.(\d+)\.", name))), default=0)


def find_weights(directory: Path) -> Weights | None:
    """The files that diffusers or transformers would read from a network's directory; None if there are none.

    The plain file before one that is split, safetensors before torch's own, and a variant where there is nothing else.
    """
    names = sorted(path.name for path in directory.iterdir() if path.is_file()) if directory.is_dir() else []
    for suffix in (".safetensors", ".bin"):
        for stem in STEMS:
            if stem + suffix in names:
                return Weights((directory / f"{stem}{suffix}",))
            if f"{stem}{suffix}.index.json" in names:
                return Weights(split_files(directory / f"{stem}{suffix}.index.json"))
    for suffix in (".safetensors", ".bin"):
        for stem in STEMS:
            for name in names:
                variant = name.removeprefix(f"{stem}.").removesuffix(suffix)
                if name == f"{stem}.{variant}{suffix}" and variant and "." not in variant and "-" not in variant:
                    return Weights((directory / name,), variant)
                variant = name.removeprefix(f"{stem}{suffix}.index.").removesuffix(".json")
                if name == f"{stem}{suffix}.index.{variant}.json" and variant:
                    return Weights(split_files(directory / name), variant)
    return None


def split_files(index: Path) -> tuple[Path, ...]:
    """The index of weights that are split over files, and those files. Raises: UserError if one is missing."""
    if reason := fault(index):
        raise UserError(f"{index} {reason}")
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        names = sorted({str(name) for name in content["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{index} is no index of weights; expected an object with a weight_map; fetch it again") from None
    for name in names:
        if not (index.parent / name).is_file():
            raise UserError(f"{index.parent / name} is missing, of which {index.name} speaks; fetch it again")
    return (index, *(index.parent / name for name in names))


def check_weights(pretrained: str, directory: Path, component: str) -> Weights | None:
    """A network's files of weights, looked at but not read; None if there are none.

    Raises: UserError if one is damaged, or holds what is no floating-point number.
    """
    what = f"model.pretrained {pretrained!r}"
    try:
        weights = find_weights(directory / component)
    except UserError as error:
        raise UserError(f"{what}: {error}") from None
    for path in weights.files if weights else ():
        check_weight_file(what, path)
        if path.suffix == ".safetensors" and (tensor := quantised_tensor(path)):
            raise UserError(
                f"{what}: {path} holds quantised weights, {tensor}; expected float32, float16 or bfloat16: give the model that "
                "it was made from"
            )
    return weights


def pipeline_digest(pretrained: str, components: tuple[str, ...] = ("",)) -> str:
    """Of the files that a pipeline is loaded from; of one on the hub, its commit there.

    Args: components: how the names of those begin that are looked at.
    Raises: UserError, OSError.
    """
    index = find_file(pretrained, "model_index.json")
    root = Path(resolve(pretrained))
    if not root.is_dir():
        return index.parent.name  # in the hub's cache a file lies in a directory named after its commit
    entries = read_json(pretrained, "model_index.json").items()
    names = [name for name, value in entries if isinstance(value, list) and name.startswith(components)]
    files = [path for name in names for path in (root / name).rglob("*") if path.suffix in READ and path.is_file()]
    return files_digest((path.relative_to(root).as_posix(), path) for path in [index, *files])


def encoder_digest(pretrained: str) -> str:
    """The same of what prompts go through: with the same one an embedding is the same. Raises: UserError, OSError."""
    return pipeline_digest(pretrained, ("text_encoder", "tokenizer"))
