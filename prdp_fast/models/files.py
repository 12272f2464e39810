"""The files of a model: a diffusers directory, a hub id, or 'tiny', which ships with the package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from prdp_fast.core.digest import files_digest
from prdp_fast.core.errors import UserError
from prdp_fast.core.hub import hub_file
from prdp_fast.world import TINY

READ = {".json", ".txt", ".model", ".safetensors", ".bin"}  # of a component; tokenizers have the second and third


def resolve(pretrained: str) -> str:
    """A directory or a hub id, as diffusers reads it."""
    return str(TINY) if pretrained == "tiny" else pretrained


def find_file(pretrained: str, filename: str) -> Path:
    """A file of a pipeline directory or hub id. Raises: UserError if it is not there."""
    path, what = Path(resolve(pretrained)), f"model.pretrained {pretrained!r}"
    if (path / filename).is_file():
        return path / filename
    if path.is_dir():
        raise UserError(f"{what} has no {filename}; expected a diffusers pipeline directory, as save_pretrained writes it")
    return hub_file(what, pretrained, filename, lacking="expected a diffusers pipeline, not a single checkpoint file")


def read_json(pretrained: str, filename: str) -> dict[str, Any]:
    """A configuration of a pipeline directory or hub id. Raises: UserError if it is not there or no JSON."""
    path = find_file(pretrained, filename)
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"model.pretrained {pretrained!r}: {filename} is no JSON ({error}); fetch it again") from None


def pipeline_digest(pretrained: str) -> str:
    """Of the files that a pipeline is loaded from; of one on the hub, its commit there. Raises: UserError, OSError."""
    index = find_file(pretrained, "model_index.json")
    root = Path(resolve(pretrained))
    if not root.is_dir():
        return index.parent.name  # in the hub's cache a file lies in a directory named after its commit
    components = [name for name, value in read_json(pretrained, "model_index.json").items() if isinstance(value, list)]
    files = [path for name in components for path in (root / name).rglob("*") if path.suffix in READ and path.is_file()]
    return files_digest((path.relative_to(root).as_posix(), path) for path in [index, *files])


def quiet_loading() -> None:
    """No progress bars for loading and saving, and no advice on dtypes, between the lines of a run."""
    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()
        library.set_verbosity_error()
