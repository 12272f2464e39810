"""Files of weights, looked at without reading the weights: is it one, and is all of it there?"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prdp_fast.core.errors import UserError
from prdp_fast.core.files import whole

POINTER = b"version https://git-lfs.github.com/spec/"
CHECKPOINTS = (".bin", ".pt", ".pth", ".ckpt")  # what torch.save writes: a zip file, or a pickle of before torch 1.6
LONGEST_HEADER = 100_000_000  # bytes, as safetensors has it
FLOATS = ("F64", "F32", "F16", "BF16")  # safetensors' names


class WeightFileError(UserError):
    """A file of weights that is none, or of which a part is missing."""


def check_weight_file(what: str, path: Path) -> None:
    """Args: what: opens an error, e.g. "model.pretrained 'name'". Raises: WeightFileError."""
    if reason := fault(path):
        raise WeightFileError(f"{what}: {path} {reason}")


def fault(path: Path) -> str | None:
    """What is wrong with a file of weights, tokens or configuration, and the next move; None if nothing seems to be.

    Costs the reading of a header.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        return f"cannot be read ({error.strerror or error}); check the path and its permissions"
    if size == 0:
        return "is empty; fetch it again"
    if head.startswith(POINTER):
        return f"is a git-lfs pointer of {size} bytes; run git lfs pull where it was cloned"
    if path.suffix == ".safetensors":
        return _safetensors_fault(path, size)
    if path.suffix in CHECKPOINTS:
        return _checkpoint_fault(path, head)
    return None


def read_header(path: Path) -> dict[str, Any]:
    """Of a safetensors file: dtype, shape and data_offsets by tensor. Raises: ValueError if it has no header, OSError."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(LONGEST_HEADER, path.stat().st_size - 8):
            raise ValueError("no header")
        header = json.loads(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("no header")
    header.pop("__metadata__", None)
    return header


def quantised_tensor(path: Path) -> str | None:
    """A weight of a safetensors file that is no floating-point number, as 'name (dtype)'. Loaders cast it without its scale."""
    for name, entry in read_header(path).items():
        if name.endswith((".weight", ".bias")) and entry["dtype"] not in FLOATS:
            return f"{name} ({entry['dtype']})"
    return None


def write_safetensors(path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    """A safetensors file whose bytes follow from its content: the library's own writer puts metadata in an order of chance.

    Args: tensors: float32, on the CPU.
    """
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for name, tensor in sorted(tensors.items()):
        end = offset + 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    with whole(path) as partial, partial.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in sorted(tensors.items()):
            file.write(tensor.detach().contiguous().numpy().astype("<f4", copy=False).tobytes())


def _safetensors_fault(path: Path, size: int) -> str | None:
    try:
        header = read_header(path)
        expected = path_end = 8 + _header_length(path)
        for entry in header.values():
            expected = max(expected, path_end + int(entry["data_offsets"][1]))
    except (OSError, ValueError, TypeError, KeyError, IndexError):
        return f"is no safetensors file, or the beginning of one ({size:,} bytes without a whole header); fetch it again"
    if size < expected:
        return f"is cut off: {size:,} bytes of {expected:,}; fetch it again"
    if size > expected:
        return f"is damaged: {size:,} bytes where its header speaks of {expected:,}; fetch it again"
    return None


def _header_length(path: Path) -> int:
    with path.open("rb") as file:
        return int.from_bytes(file.read(8), "little")


def _checkpoint_fault(path: Path, head: bytes) -> str | None:
    if head.startswith(b"PK"):
        return None if zipfile.is_zipfile(path) else "is cut off: a zip file without its end; fetch it again"
    return None if head.startswith(b"\x80") else "is no file of tensors; fetch it again"
