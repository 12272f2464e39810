"""Evaluations that a run keeps: read again as they were, or not at all."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from prdp_fast.core import distributed
from prdp_fast.core.errors import UserError
from prdp_fast.evaluation.run import Evaluation
from prdp_fast.training.results import load, load_or_run, save
from prdp_fast.training.trainer import Trainer

PROMPTS = ["a cat", "a dog é"]


def evaluation(**changes: object) -> Evaluation:
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, 16, 16), generator=draw, dtype=torch.uint8)
    fields = {"prompts": PROMPTS, "images": images, "rewards": torch.tensor([1.0, float("nan")]), "strict": None}
    return Evaluation(**fields | {"scores": torch.tensor([[1.0], [float("nan")]])} | changes)  # type: ignore[arg-type]


def same(one: Evaluation, other: Evaluation) -> bool:
    pairs = [(getattr(one, name), getattr(other, name)) for name in ("images", "rewards", "scores")]
    return one.prompts == other.prompts and all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in pairs)


def test_one_flipped_bit_is_noticed(tmp_path: Path) -> None:
    """torch reads most of such files without a word."""
    path, draw = tmp_path / "evaluation.pt", random.Random(0)
    save(path, {"seen": evaluation()})
    whole = path.read_bytes()
    refused = 0
    for _ in range(200):
        data = bytearray(whole)
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
        found = load(path)
        assert found is None or same(found["seen"], evaluation())
        refused += found is None and read_by_torch(path)
    assert refused > 50, "torch reads no damaged file: the digest is of no use"


def read_by_torch(path: Path) -> bool:
    try:
        torch.load(path, weights_only=True)
    except Exception:
        return False
    return True


def test_a_file_of_other_prompts_is_another_run_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was copied there, say. What is measured before training must be of the prompts that are measured after it."""
    monkeypatch.setattr(distributed, "barrier", lambda: None)
    kept, made = {"seen": evaluation()}, {"seen": evaluation(prompts=["a cat", "a bird"])}
    save(tmp_path / "evaluation_before.pt", kept)

    def found(prompts: dict[str, list[str]]) -> Evaluation:
        return load_or_run(tmp_path, prompts, lambda: made)["seen"]

    assert same(found({"seen": PROMPTS}), evaluation())
    for others in ({"seen": ["a cat", "a bird"]}, {"seen": PROMPTS, "unseen": PROMPTS}, {"seen": PROMPTS[:1]}):
        save(tmp_path / "evaluation_before.pt", kept)
        assert found(others) is made["seen"]
    read = load(tmp_path / "evaluation_before.pt")
    assert read is not None and read["seen"].prompts == ["a cat", "a bird"], "and it is kept"


def test_without_a_reference_a_lost_evaluation_is_refused_and_not_made_of_trained_weights() -> None:
    trainer: Any = SimpleNamespace(
        state=SimpleNamespace(epoch=3), reference=None, engine=SimpleNamespace(has_adapter=False), output=Path("run"),
        objective=SimpleNamespace(name="rwr"), evaluate=lambda names: pytest.fail("the trained weights were evaluated"),
    )  # fmt: skip
    with pytest.raises(UserError, match=r"run has no whole evaluation_before.pt, and objective 'rwr' keeps no reference"):
        Trainer.evaluate_reference(trainer, ["seen"])


def test_files_of_earlier_versions_are_read(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.pt"
    torch.save({"seen": vars(evaluation())}, path)
    found = load(path)
    assert found is not None and same(found["seen"], evaluation())


@pytest.mark.parametrize("changes", [{"prompts": ["a cat", "a dog"]}, {"rewards": torch.tensor([1.0, 2.0])}, {"scores": None}])
def test_every_field_counts(tmp_path: Path, changes: dict[str, object]) -> None:
    path, other = tmp_path / "evaluation.pt", tmp_path / "other.pt"
    save(path, {"seen": evaluation()})
    save(other, {"seen": evaluation(**changes)})
    mixed = torch.load(other, weights_only=True)
    mixed["seen"]["sha256"] = torch.load(path, weights_only=True)["seen"]["sha256"]
    torch.save(mixed, path)
    assert load(other) is not None and load(path) is None
