"""A run of two ranks goes on on one, at another stage; and a model is taken out of its checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import launching
import pytest
import torch
from damage import damage
from launching import TRAIN, Finished
from safetensors import safe_open
from safetensors.torch import load_file

from prdp_fast import cli

pytestmark = pytest.mark.slow

WEIGHTS = "model/unet/diffusion_pytorch_model.safetensors"
RATE = 3e-5  # the smoke recipe's
EPS = torch.finfo(torch.float32).eps


class Runs(NamedTuple):
    """Two that have two epochs in common, on two ranks."""

    uninterrupted: Path
    elastic: Path
    said: str


def train(output: Path, epochs: int, config: str, ranks: int, **more: object) -> Finished:
    settings = {
        "sampler.num_inference_steps": 2, "schedule.prompts_per_epoch": 4, "schedule.images_per_prompt": 3,
        "schedule.micro_batch": 8, "schedule.epochs": epochs, "evaluation.prompts": 4, "model.ema_decay": 0.9,
        "rewards": "[{name: shapes_alignment, normalise: running}]", "optimizer.eps": 1e-4, "checkpoint.keep": 9,
    } | more  # fmt: skip
    return launching.start(
        TRAIN, "--config", config, "--recipe", "smoke", "--output", output, *launching.settings(settings), ranks=ranks,
        cwd=output.parent,
    ).wait()  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("elastic")
    whole, elastic = folder / "whole", folder / "elastic"
    assert train(whole, 4, "zero2.json", 2).returncode == 0
    shutil.copytree(whole, elastic)
    for epoch in (3, 4):
        shutil.rmtree(elastic / f"checkpoints/epoch-{epoch:06d}")
    shutil.rmtree(elastic / "model")
    (elastic / "summary.json").unlink()
    went_on = train(elastic, 4, "zero1.json", 1, **{"schedule.micro_batch": 6})
    assert went_on.returncode == 0, went_on.text
    return Runs(whole, elastic, went_on.text)


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_one_rank_goes_on_where_two_were(runs: Runs) -> None:
    assert (
        "continuing on 1 rank instead of 2, at ZeRO stage 1 instead of 2, with schedule.micro_batch 6 instead of 8: equal to "
        "rounding, not to the bit\n"
    ) in runs.said
    assert "continuing after epoch 2 from epoch-000002, resharded from 2 ranks at ZeRO stage 2" in runs.said
    record = json.loads((runs.elastic / "run.json").read_text())
    assert record["world_size"] == 1 and record["deepspeed"]["zero_optimization"]["stage"] == 1
    state = json.loads((runs.elastic / "checkpoints/epoch-000004/state.json").read_text())
    assert state["micro_batch"] == 6 and state["asked"]["spread"] == [1, 1, ["none", "none"]]


def close(ours: float, theirs: float, relative: float, size: float = 0.0) -> bool:
    """Args: size: of the numbers whose difference it is; they are rounded to 2 eps of it."""
    return abs(ours - theirs) <= relative * abs(theirs) + 2 * EPS * abs(size)


def test_the_same_prompts_noise_and_course(runs: Runs) -> None:
    """Images are rounded to 256 levels. A pixel that is on the edge between two may change, one of 3 x 32 x 32, and with it its
    reward, the loss and the gradient by 1 / 3072. Means of log-probs are their sums' rounding off."""
    ours, theirs = rows(runs.elastic), rows(runs.uninterrupted)
    assert [row["epoch"] for row in ours] == [row["epoch"] for row in theirs] == [0, 1, 2, 3]
    assert ours[:2] == theirs[:2]
    for own, other in zip(ours[2:], theirs[2:], strict=True):
        for key in ("reward", "reward_divisor/shapes_alignment", "loss", "grad_norm"):
            assert close(own[key], other[key], 1e-3), key
        for key in ("log_prob", "kl_to_reference", "mean_log_ratio"):
            assert close(own[key], other[key], 1e-3, size=other["log_prob"]), key
    for key in ("loss", "grad_norm", "kl_to_reference"):
        assert not close(theirs[3][key], theirs[2][key], 2e-2), "epochs are alike: this would accept another one"
    states = [json.loads((run / "checkpoints/epoch-000004/state.json").read_text()) for run in runs[:2]]
    for name in ("epoch", "images", "unet_forwards"):
        assert states[0][name] == states[1][name]
    (count, *sums), (same, *others) = (next(iter(state["seen_rewards"].values())) for state in states)
    assert count == same == 4 * 12 and all(close(own, other, 1e-3) for own, other in zip(sums, others, strict=True))
    before, after = (
        json.loads((run / "summary.json").read_text())["evaluation"]["unseen"] for run in (runs.elastic, runs.uninterrupted)
    )
    assert before["before"] == after["before"] and close(before["after"]["mean"], after["after"]["mean"], 1e-3)


def test_weights_and_their_average(runs: Runs, tmp_path: Path) -> None:
    """Four updates, each of which rounds a weight to eps of it, and moves it by the learning rate with an error of at most 1%."""
    before = taken(runs.elastic / "checkpoints/epoch-000002", tmp_path, "--last")
    for words in ((), ("--last",)):
        ours, theirs = (taken(run, tmp_path, *words) for run in runs[:2])
        assert ours.keys() == theirs.keys()
        for name, other in theirs.items():
            allowed = 4 * (EPS * float(other.abs().max()) + 1e-2 * RATE)
            assert float((ours[name] - other).abs().max()) <= allowed, (name, words)
        moved = sorted(float((other - before[name]).abs().max()) for name, other in theirs.items())
        assert moved[len(moved) // 2] > RATE / 2, "hardly moved"


# A model out of a checkpoint.


def taken(path: Path, folder: Path, *words: str) -> dict[str, torch.Tensor]:
    file = folder / "weights.safetensors"
    file.unlink(missing_ok=True)
    assert cli.main(["checkpoint", "consolidate", str(path), str(file), *words]) == 0
    return load_file(file)


def content(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["uninterrupted", "elastic"])
def test_the_export_of_the_last_checkpoint_is_that_of_the_run(name: str, runs: Runs, tmp_path: Path, capsys) -> None:
    """To the byte: of two ranks' shards at stage 2, and of one's at stage 1."""
    run = getattr(runs, name)
    assert cli.main(["checkpoint", "export", str(run), str(tmp_path / "made")]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == str(tmp_path / "made") and f"the moving average of {run}/checkpoints/epoch-000004" in said[-2]
    exported, made = content(run / "model"), content(tmp_path / "made")
    assert made.keys() == exported.keys() - {"before_after.png"}
    assert all(made[file] == exported[file] for file in made.keys() - {"README.md"})
    assert b"4 epochs, 48 images" in made["README.md"] and not list(tmp_path.glob(".*"))


def test_one_file_of_weights(runs: Runs, tmp_path: Path) -> None:
    run, file = runs.elastic, tmp_path / "weights.safetensors"
    averaged, exported = taken(run, tmp_path), load_file(run / WEIGHTS)
    assert averaged.keys() == exported.keys() and all(torch.equal(averaged[name], exported[name]) for name in exported)
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"format": "pt", "epochs": "4", "averaged": "true"}
    last = taken(run, tmp_path, "--last")
    assert not all(torch.equal(averaged[name], last[name]) for name in last)
    assert all(value.dtype == torch.float32 for value in last.values())


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    capsys.readouterr()
    assert cli.main(["checkpoint", *map(str, words)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_what_cannot_be_taken_out_is_one_line(runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, new = runs.elastic, tmp_path / "new"
    assert "expected a name that ends in .safetensors" in refused(capsys, "consolidate", run, tmp_path / "weights.pt")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    assert "exists already; name a new directory" in refused(capsys, "export", run, tmp_path / "full")
    assert "is neither a run directory" in refused(capsys, "export", tmp_path, new)
    assert "is neither a run directory" in refused(capsys, "export", run / "checkpoints/epoch-000009", new)
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    damage(copy / "checkpoints/epoch-000004", "average-rank-00000.safetensors", "bit")
    assert "has SHA-256" in refused(capsys, "export", copy / "checkpoints/epoch-000004", new)
    assert cli.main(["checkpoint", "consolidate", str(copy), str(tmp_path / "third.safetensors")]) == 0
    assert "the one before it is taken" in capsys.readouterr().out
    record = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps(record | {"content": {"model.pretrained": "other"}}))
    assert "is not what" in refused(capsys, "export", copy, new)
    (copy / "run.json").write_text("{")
    assert "run.json is damaged" in refused(capsys, "export", copy, new)
    (copy / "run.json").write_text(json.dumps(record))
    shutil.rmtree(copy / "checkpoints")
    assert "has no checkpoint yet" in refused(capsys, "export", copy, new)
    assert not new.exists() and not list(tmp_path.glob(".*"))


def test_other_ranks_that_do_not_divide_the_epoch_are_told_which_do(runs: Runs) -> None:
    answer = train(runs.elastic, 5, "zero2.json", 3)
    assert answer.returncode == 2 and "Traceback" not in answer.text
    assert "schedule.prompts_per_epoch is 4, not divisible by 3 ranks; start 1, 2 or 4 (--num_gpus 2)" in answer.text
