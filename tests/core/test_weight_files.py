"""Files of weights that are none, or a part of one, are told apart without reading them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from prdp_fast.core.weight_files import WeightFileError, check_weight_file, fault, quantised_tensor, write_safetensors

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 492265168\n"
TENSORS = {"b.weight": torch.arange(6.0).view(2, 3), "a": torch.tensor(2.0)}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    save_file(TENSORS, tmp_path / "model.safetensors")
    torch.save(TENSORS, tmp_path / "model.bin")
    torch.save(TENSORS, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    (tmp_path / "vocab.json").write_text("{}")
    return {path.name: path for path in tmp_path.iterdir()}


def test_whole_files_have_no_fault(files: dict[str, Path]) -> None:
    assert [fault(path) for path in files.values()] == [None] * 4


@pytest.mark.parametrize("name", ["model.safetensors", "model.bin", "old.bin", "vocab.json"])
def test_pointers_and_empty_files(files: dict[str, Path], name: str) -> None:
    path = files[name]
    path.write_bytes(POINTER)
    assert fault(path) == f"is a git-lfs pointer of {len(POINTER)} bytes; run git lfs pull where it was cloned"
    path.write_bytes(b"")
    with pytest.raises(WeightFileError, match=r"reward 'x': .*is empty; fetch it again"):
        check_weight_file("reward 'x'", path)


@pytest.mark.parametrize("kept", [1, 7, 8, 20, -30, -1])
def test_a_safetensors_file_that_is_cut_off(files: dict[str, Path], kept: int) -> None:
    path = files["model.safetensors"]
    whole = path.read_bytes()
    path.write_bytes(whole[:kept])
    line = fault(path)
    assert line and line.endswith("fetch it again")
    if kept == -1:
        assert line == f"is cut off: {len(whole) - 1:,} bytes of {len(whole):,}; fetch it again"


def test_other_content(files: dict[str, Path]) -> None:
    path = files["model.safetensors"]
    path.write_bytes(path.read_bytes() + b"\0")
    assert "is damaged" in str(fault(path))
    for header in (b"[]", b'{"a": 1}', b'{"a": {"data_offsets": 3}}', b"\xff\xff", b"{}" * 9):
        path.write_bytes(len(header).to_bytes(8, "little") + header)
        assert "is no safetensors file" in str(fault(path)), header
    page = b"<!DOCTYPE html>" + b" " * 100
    for name in ("model.safetensors", "model.bin"):
        files[name].write_bytes(page)
        assert "fetch it again" in str(fault(files[name]))
    torch.save(TENSORS, files["model.bin"])
    files["model.bin"].write_bytes(files["model.bin"].read_bytes()[:-40])
    assert "is cut off" in str(fault(files["model.bin"]))
    assert "cannot be read" in str(fault(path.with_name("missing")))


def test_quantised_weights_are_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    for dtype, found in ((torch.float16, None), (torch.bfloat16, None), (torch.float64, None), (torch.int8, "x.weight (I8)")):
        save_file({"x.weight": torch.ones(2).to(dtype), "position_ids": torch.arange(2)}, path)
        assert quantised_tensor(path) == found


def test_what_is_written_is_read_and_always_the_same_bytes(tmp_path: Path) -> None:
    path, metadata = tmp_path / "own.safetensors", {"z": "1", "format": "pt", "a": "ä"}
    written = set()
    for names in (["a", "b.weight"], ["b.weight", "a"]):
        for keys in (["z", "format", "a"], ["a", "z", "format"]):
            write_safetensors(path, {name: TENSORS[name] for name in names}, {key: metadata[key] for key in keys})
            written.add(path.read_bytes())
    assert len(written) == 1 and fault(path) is None
    loaded = load_file(path)
    assert loaded.keys() == TENSORS.keys() and all(torch.equal(value, TENSORS[name]) for name, value in loaded.items())
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    assert length % 8 == 0 and json.loads(whole[8 : 8 + length])["__metadata__"] == metadata
