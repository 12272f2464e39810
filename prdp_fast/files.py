"""Files that are there whole or not at all."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


def write_json(path: Path, value: Any, *, indent: int | None = 2) -> None:
    """Strict JSON (NaN and infinities become null), written whole or not at all. indent None: all in one line."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        json.dump(_strict(value), file, indent=indent, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _strict(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, torch.Tensor) or hasattr(value, "tolist"):  # tensors and numpy alike
        return _strict(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value
