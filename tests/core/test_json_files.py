"""JSON as programs read it: strict, and on the disk whole or not at all."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch

from prdp_fast.core.files import write_json


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
