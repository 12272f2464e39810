"""The files of a model: a diffusers directory, a hub id, or 'tiny', which ships with the package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from prdp_fast.core.errors import UserError
from prdp_fast.core.hub import hub_file
from prdp_fast.world import TINY


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


def quiet_loading() -> None:
    """No progress bars for loading and saving, and no advice on dtypes, between the lines of a run."""
    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()
        library.set_verbosity_error()
