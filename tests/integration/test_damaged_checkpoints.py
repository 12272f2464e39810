"""Checkpoints that a copy or a disk has damaged, and a disk that fills up: one line, and what the run can go on from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import launching
import pytest
from launching import TRAIN, Finished

pytestmark = pytest.mark.slow

SMALL = {
    "sampler": "{num_inference_steps: 2, guidance_scale: null}", "evaluation.prompts": 2,
    "schedule": "{epochs: 2, prompts_per_epoch: 2, images_per_prompt: 2, micro_batch: 4}",
}  # fmt: skip
WEIGHTS, OPTIMIZER = "zero/mp_rank_00_model_states.pt", "zero/zero_pp_rank_0_mp_rank_00_optim_states.pt"
FULL = """
import os
import resource

calls = 0


def score(images, prompts):
    global calls
    calls += 1
    if f"{calls}" == os.environ.get("FULL_AT"):
        limit = int(os.environ["LIMIT"])
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    return images.float().mean((1, 2, 3))
"""


def start(run: Path, env: dict[str, str] | None = None, **changes: object) -> Finished:
    values = SMALL | {"rewards": "[{name: jpeg_size}]"} | {name.replace("__", "."): value for name, value in changes.items()}
    return launching.start(
        TRAIN, "--config", "zero2.json", "--recipe", "smoke", "--output", run, *launching.settings(values), env=env
    ).wait(200)  # fmt: skip


def refusal(finished: Finished) -> str:
    assert finished.returncode == 2 and "Traceback" not in finished.text, finished.text[-4000:]
    (line,) = [line for line in finished.text.splitlines() if "error: " in line]
    return line


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs with both checkpoints."""
    run = tmp_path_factory.mktemp("checkpoints") / "run"
    assert start(run).returncode == 0
    return run


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "forgotten":  # by an earlier version of the program, which wrote down no sizes
        state = path.parent.parent / "state.json"
        state.write_text(json.dumps({name: value for name, value in json.loads(state.read_text()).items() if name != "files"}))
        path.write_bytes(data[:100_000])
    else:
        path.write_bytes(
            {"cut": data[:100_000], "empty": b"", "zeros": bytes(len(data)), "list": b"[]", "null": b'{"epoch": null}'}[how]
        )


@pytest.mark.parametrize(
    ("file", "how", "said"),
    [
        (WEIGHTS, "cut", f"{WEIGHTS} has 100,000 bytes of "),
        (OPTIMIZER, "missing", f"{OPTIMIZER} is missing"),
        (OPTIMIZER, "zeros", "it cannot be read ("),
        (WEIGHTS, "forgotten", "it cannot be read ("),
        ("state.json", "empty", "state.json cannot be read (it is empty)"),
        ("state.json", "list", "state.json cannot be read ("),
        ("state.json", "null", "state.json cannot be read ("),
    ],
)
def test_a_damaged_checkpoint_names_the_one_before(whole: Path, tmp_path: Path, file: str, how: str, said: str) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    newest = run / "checkpoints" / "epoch-000002"
    damage(newest / file, how)
    line = refusal(start(run, schedule__epochs=3))
    assert f"checkpoint {newest}: {said}" in line
    assert "remove this directory to go on from epoch-000001, the one before it" in line
    if how in ("cut", "missing"):  # and so it does
        shutil.rmtree(newest)
        finished = start(run, schedule__epochs=2)
        assert finished.returncode == 0 and "continuing after epoch 1" in finished.stdout


def test_the_only_checkpoint_leaves_the_beginning(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    shutil.rmtree(run / "checkpoints" / "epoch-000001")
    damage(run / "checkpoints" / "epoch-000002" / WEIGHTS, "cut")
    assert "remove this directory to go on from the beginning" in refusal(start(run, schedule__epochs=3))


# A limit of file sizes stands for a full disk: Python and torch say the same of both. An evaluation scores two sets.
@pytest.mark.parametrize(
    ("call", "limit", "said"),
    [
        (2, 2_000, "evaluation_before.pt: "),
        (4, 100_000, "checkpoints/epoch-000002 cannot be written ("),
        (6, 2_000, "evaluation_after.pt: "),
        (6, 100_000, "model: "),
    ],
)
def test_a_full_disk_is_one_line_and_the_run_goes_on_later(tmp_path: Path, call: int, limit: int, said: str) -> None:
    run, reward = tmp_path / "run", tmp_path / "reward.py"
    rewards = f"[{{name: python, options: {{function: '{reward}:score'}}}}]"
    reward.write_text(FULL)
    line = refusal(start(run, env={"FULL_AT": str(call), "LIMIT": str(limit)}, rewards=rewards))
    assert f"{run}/{said}" in line and ("--resume" in line or "it goes on from epoch-000001" in line)
    kept = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert kept == {2: [], 4: ["epoch-000001"], 6: ["epoch-000001", "epoch-000002"]}[call], "nothing half written is left"
    finished = start(run, rewards=rewards)
    assert finished.returncode == 0 and (run / "summary.json").exists(), finished.text[-4000:]
