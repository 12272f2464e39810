"""JSON as programs read it: strict, and on the disk whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from prdp_fast.core.files import write_json, write_tensors


def test_json_is_strict_and_whole(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    value = {
        "a": float("nan"),
        "b": [1, 2.5, float("-inf")],
        "c": np.float32(0.5),
        "d": torch.tensor([1, 2]),
        "e": tmp_path,
        "f": None,
    }
    write_json(path, value)
    expected = {"a": None, "b": [1, 2.5, None], "c": 0.5, "d": [1, 2], "e": str(tmp_path), "f": None}
    assert json.loads(path.read_text()) == expected

    def crash(*_: object) -> None:
        raise OSError("no")

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError, match="no"):
        write_json(path, {"new": 1})
    assert json.loads(path.read_text()) == expected


def test_a_file_is_on_the_disk_before_its_name_and_its_name_before_anything_else(tmp_path, monkeypatch):
    """Evaluations and every JSON file: a crash of the machine leaves the old file or the new one."""
    events = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        events.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    def replaced(source: object, target: object) -> None:
        events.append(f"name {Path(str(target)).name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    for write, name in ((write_tensors, "evaluation_after.pt"), (write_json, "summary.json")):
        events.clear()
        write(tmp_path / name, {"a": 1})
        assert events == [f"sync .{name}.partial", f"name {name}", f"sync {tmp_path.name}"]
