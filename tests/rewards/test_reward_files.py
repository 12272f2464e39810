"""A reward's model of which a file is a git-lfs pointer, cut off or empty: one line, before anything is scored."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from prdp_fast.core.errors import RewardError, UserError
from prdp_fast.rewards import build_reward
from prdp_fast.rewards.scoring_model import check_tensors, read_checkpoint, read_pretrained

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 492265168\n"


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    from transformers import CLIPConfig, CLIPModel

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config=sizes | {"vocab_size": 20, "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1},
        vision_config=sizes | {"image_size": 8, "patch_size": 4},
        projection_dim=4,
    )
    CLIPModel(config).save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


def refusal(clip: Path) -> str:
    with pytest.raises(RewardError) as caught:
        build_reward("clip_score", {"model": str(clip), "device": "cpu"}).prepare()
    line = str(caught.value)
    assert "\n" not in line and line.startswith("reward 'clip_score': ")
    return line


def test_weights_that_are_none(clip: Path) -> None:
    path = clip / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(POINTER)
    assert f"{path} is a git-lfs pointer of {len(POINTER)} bytes; run git lfs pull" in refusal(clip)
    path.write_bytes(whole[:-5])
    assert f"{path} is cut off: {len(whole) - 5:,} bytes of {len(whole):,}" in refusal(clip)
    path.write_bytes(b"")
    assert f"{path} is empty" in refusal(clip)
    path.write_bytes(whole)
    tensors = load_file(path)
    del tensors["visual_projection.weight"]
    save_file(tensors, path, {"format": "pt"})
    assert "lack visual_projection.weight of a CLIPModel; fetch them again" in refusal(clip)


@pytest.mark.parametrize("content", [b"", POINTER, b"{", b"[]", b"null", b'{"text_config": 3}', b'{"projection_dim": "x"}'])
def test_a_configuration_that_is_none(clip: Path, content: bytes) -> None:
    (clip / "config.json").write_bytes(content)
    refusal(clip)


def test_checkpoints(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"a": torch.zeros(3)}, path)
    whole = path.read_bytes()
    for content, words in (
        (POINTER, "git-lfs pointer of"), (b"", "is empty"), (whole[:-30], "is cut off"), (b"<html>", "no file of tensors"),
    ):  # fmt: skip
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"reward 'x': .*{words}"):
            read_checkpoint("reward 'x'", path)
    expected = {"a": torch.zeros(3)}
    check_tensors("o", path, {"a": torch.zeros(3).half()}, expected)
    with pytest.raises(UserError, match=r"has a as torch\.int8"):
        check_tensors("o", path, {"a": torch.zeros(3).to(torch.int8)}, expected)


def test_whatever_a_loader_raises_is_one_line(tmp_path: Path) -> None:
    class Loader:
        @staticmethod
        def from_pretrained(name: str):
            raise Exception("a library's\nown kind")

    with pytest.raises(UserError, match=r"o: '.*' does not load as a Loader \(a library's own kind\)"):
        read_pretrained("o", Loader, str(tmp_path))
