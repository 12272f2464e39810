"""Whole jobs whose checkpoints are written while they train: killed and stopped meanwhile, and the best one kept."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

import launching
import pytest
import torch
from launching import TRAIN
from safetensors.torch import load_file

from prdp_fast.core import checkpoint_files
from prdp_fast.core.errors import UserError
from prdp_fast.training.extract import extract

pytestmark = pytest.mark.slow

# A writer that waits in its thread, at the first checkpoint after epoch {epoch}, for {seconds} seconds.
SLOW = """
import os, pathlib, sys, time
from prdp_fast import train
from prdp_fast.training import checkpoint
finish = checkpoint.finish_files
def slow(directory, paths):
    if "epoch-{epoch:06d}" in directory.name:
        pathlib.Path("writing-" + os.environ.get("RANK", "0")).touch()
        time.sleep({seconds})
    return finish(directory, paths)
checkpoint.finish_files = slow
sys.exit(train.main())
"""
FAULT = """
from prdp_fast.training import trainer
roll = trainer.rollout
def fails(*arguments, **options):
    if options["epoch"] == 1:
        raise KeyError("boom")
    return roll(*arguments, **options)
trainer.rollout = fails
"""
JOB = {
    "sampler": "{num_inference_steps: 2, guidance_scale: null}", "evaluation.prompts": 0, "optimizer.learning_rate": 1e-3,
    "schedule": "{epochs: 4, prompts_per_epoch: 4, images_per_prompt: 2, micro_batch: 8}", "checkpoint.every": 1,
    "checkpoint.async_save": "on", "rewards": "[{name: jpeg_size}]", "model.ema_decay": 0.5,
    # What `auto` measures at start could come out otherwise in another run, which would then round differently.
    "performance.attention": "sdpa", "performance.fuse_qkv": "off",
}  # fmt: skip
# Scores by the number of the call: before training seen and unseen, and then of an epoch, seen and unseen again and again.
GRADED = """
calls = 0
SCORES = {5: 0.2, 8: 0.9, 11: 0.5}
def score(images, prompts):
    global calls
    calls += 1
    return images.double().mean((1, 2, 3)).div(1e6).add(SCORES.get(calls, 0.0)).float()
"""
FAILING = """
calls = 0
def score(images, prompts):
    global calls
    calls += 1
    return images.double().mean((1, 2, 3)).float() if calls == 1 else []
"""


def words(run: Path, **changes: object) -> list[str]:
    values = JOB | {name.replace("__", "."): value for name, value in changes.items()}
    return ["--config", "zero2.json", "--recipe", "smoke", "--output", str(run), *launching.settings(values)]


def slow(folder: Path, epoch: int, seconds: float) -> Path:
    script = folder / "slow.py"
    script.write_text(SLOW.format(epoch=epoch, seconds=seconds))
    return script


def wait_for(path: Path, job: launching.Job) -> None:
    deadline = time.monotonic() + 150
    while not path.exists():
        assert job.poll() is None and time.monotonic() < deadline, job.output()[-4000:]
        time.sleep(0.01)


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def rows(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


@pytest.mark.distributed
def test_a_job_killed_while_one_is_written_goes_on_from_the_one_before_bit_for_bit(tmp_path: Path) -> None:
    """It ends as a run of which every checkpoint was written at once."""
    run, other = tmp_path / "run", tmp_path / "other"
    launching.run(TRAIN, *words(other, checkpoint__async_save="off"), ranks=2, cwd=tmp_path)
    job = launching.start(slow(tmp_path, 3, 300), *words(run), ranks=2, cwd=tmp_path)
    for rank in range(2):
        wait_for(tmp_path / f"writing-{rank}", job)
    while rows(run) < 4 and job.poll() is None:
        time.sleep(0.01)  # training goes on
    job.kill()
    assert rows(run) == 4 and names(run) == [".epoch-000003.partial", "epoch-000001", "epoch-000002"]
    finished = launching.run(TRAIN, *words(run), ranks=2, cwd=tmp_path)
    assert "continuing after epoch 2 from epoch-000002" in finished.stdout and "falls back" not in finished.text
    assert names(run) == names(other) == ["epoch-000003", "epoch-000004"]
    export = "model/unet/diffusion_pytorch_model.safetensors"
    found, expected = load_file(run / export), load_file(other / export)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    for name, file in checkpoint_files.read_manifest(other / "checkpoints/epoch-000004")[0].items():
        if name.endswith(".safetensors"):
            assert checkpoint_files.read_manifest(run / "checkpoints/epoch-000004")[0][name] == file


def test_a_stop_while_one_is_written_waits_for_it_and_saves(tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = launching.start(slow(tmp_path, 20, 5), *words(run, schedule__epochs=1000, checkpoint__every=20), cwd=tmp_path)
    wait_for(tmp_path / "writing-0", job)
    begun = time.monotonic()
    while rows(run) <= 20:
        time.sleep(0.01)  # training goes on
    os.kill(json.loads((run / "ranks/rank-00000.json").read_text())["pid"], signal.SIGTERM)
    assert time.monotonic() - begun < 5, "too late to see anything"
    finished, epochs = job.wait(60), rows(run)
    assert finished.returncode == 0 and 20 < epochs < 40, finished.text[-3000:]
    assert f"stopped by SIGTERM: {epochs} of 1000 epochs are saved in {run}" in finished.text
    assert names(run) == ["epoch-000020", f"epoch-{epochs:06d}"]


def test_an_error_of_every_rank_waits_for_the_one_that_is_written(tmp_path: Path) -> None:
    """A reward that fails for good, while the last finished epoch is on its way to the disk."""
    (tmp_path / "reward.py").write_text(FAILING)
    run, rewards = tmp_path / "run", "[{name: python, options: {function: 'reward.py:score'}}]"
    finished = launching.start(slow(tmp_path, 1, 2), *words(run, rewards=rewards, checkpoint__keep=9), cwd=tmp_path).wait(100)
    assert finished.returncode == 2 and "1 finished epochs are saved" in finished.text, finished.text[-3000:]
    assert names(run) == ["epoch-000001"]


def test_an_error_of_a_single_rank_waits_for_it_too(tmp_path: Path) -> None:
    run, script = tmp_path / "run", slow(tmp_path, 1, 2)
    script.write_text(script.read_text().replace("sys.exit(", FAULT + "sys.exit("))
    finished = launching.start(script, *words(run), cwd=tmp_path).wait(100)
    assert finished.returncode == 1 and "goes on from its last checkpoint, epoch-000001" in finished.text, finished.text[-3000:]
    assert names(run) == ["epoch-000001"]


def test_the_best_is_saved_and_kept(tmp_path: Path) -> None:
    """Nothing is due but what an evaluation asks for."""
    (tmp_path / "reward.py").write_text(GRADED)
    run, rewards = tmp_path / "run", "[{name: python, options: {function: 'reward.py:score'}}]"
    finished = launching.run(
        TRAIN,
        *words(
            run, rewards=rewards, schedule__epochs=3, checkpoint__every=100, checkpoint__keep=1, evaluation__prompts=2,
            evaluation__every=1, checkpoint__keep_best="evaluation/unseen",
        ),
        cwd=tmp_path,
    )  # fmt: skip
    said = [line for line in finished.stdout.splitlines() if "is the best so far" in line]
    assert [line[:53] for line in said] == [f"evaluation/unseen is the best so far after epoch {epoch}, 0" for epoch in (1, 2)]
    assert names(run) == ["epoch-000002", "epoch-000003"]
    best = checkpoint_files.best_of(run / "checkpoints/epoch-000002")
    assert best is not None and best.metric == "evaluation/unseen" and 0.9 <= best.value < 0.901
    assert extract(run, last=False).checkpoint.name == "epoch-000003"
    taken = extract(run, last=False, best=True)
    assert taken.checkpoint.name == "epoch-000002" and taken.averaged
    with pytest.raises(UserError, match="is one checkpoint, and --best chooses one of a run's"):
        extract(run / "checkpoints/epoch-000003", last=False, best=True)
    shutil.rmtree(run / "checkpoints/epoch-000002")
    with pytest.raises(UserError, match=r"has no best checkpoint: it needs checkpoint\.keep_best and an evaluation"):
        extract(run, last=False, best=True)
