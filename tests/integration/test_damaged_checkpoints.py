"""Checkpoints that a copy, a disk or a stranger has changed, and a disk that fills up: what a whole job makes of them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import launching
import pytest
import torch
from damage import damage, told
from launching import TRAIN, Finished
from safetensors.torch import load_file

from prdp_fast.core import checkpoint_files

pytestmark = pytest.mark.slow

SMALL = {
    "sampler": "{num_inference_steps: 2, guidance_scale: null}", "evaluation.prompts": 2,
    "schedule": "{epochs: 2, prompts_per_epoch: 2, images_per_prompt: 2, micro_batch: 4}",
}  # fmt: skip
WEIGHTS, OPTIMIZER = "zero/mp_rank_00_model_states.pt", "zero/zero_pp_rank_0_mp_rank_00_optim_states.pt"
FULL = """
import os
import resource
import time

calls = 0


def score(images, prompts):
    global calls
    calls += 1
    if os.environ.get("RANK", "0") == os.environ.get("FULL_RANK", "0"):
        if f"{calls}" == os.environ.get("FULL_AT"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(os.environ["LIMIT"]), resource.RLIM_INFINITY))
        if f"{calls}" == os.environ.get("ROOM_AT"):
            time.sleep(1)  # in which a writer in the background has failed
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return images.float().mean((1, 2, 3))
"""


def start(
    run: Path, *, stage: int = 2, ranks: int | None = None, env: dict[str, str] | None = None, **changes: object
) -> Finished:
    values = SMALL | {"rewards": "[{name: jpeg_size}]"} | {name.replace("__", "."): value for name, value in changes.items()}
    return launching.start(
        TRAIN, "--config", f"zero{stage}.json", "--recipe", "smoke", "--output", run, *launching.settings(values), ranks=ranks,
        env=env,
    ).wait(200)  # fmt: skip


def refusal(finished: Finished) -> str:
    assert finished.returncode == 2 and "Traceback" not in finished.text, finished.text[-4000:]
    (line,) = [line for line in finished.text.splitlines() if "error: " in line]
    return line


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def trained(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model/unet/diffusion_pytorch_model.safetensors")


def same(one: Path, other: Path) -> bool:
    expected = trained(other)
    return all(torch.equal(value, expected[name]) for name, value in trained(one).items())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs with both checkpoints."""
    run = tmp_path_factory.mktemp("checkpoints") / "run"
    assert start(run).returncode == 0
    return run


@pytest.mark.parametrize(
    ("stage", "ranks", "file", "kind"),
    [
        (2, 1, WEIGHTS, "bit"),
        (2, 2, "zero/zero_pp_rank_1_mp_rank_00_optim_states.pt", "bit"),
        (3, 1, OPTIMIZER, "cut"),
        (3, 2, "zero/zero_pp_rank_1_mp_rank_00_model_states.pt", "bit"),
        (2, 2, "state.json", "missing"),
    ],
)
def test_a_run_falls_back_and_ends_as_if_nothing_had_happened(
    tmp_path: Path, stage: int, ranks: int, file: str, kind: str
) -> None:
    run, undamaged = tmp_path / "run", tmp_path / "undamaged"
    assert start(run, stage=stage, ranks=ranks).returncode == 0
    shutil.copytree(run, undamaged)
    newest = run / "checkpoints/epoch-000002"
    damage(newest, file, kind)
    finished = start(run, stage=stage, ranks=ranks)
    assert finished.returncode == 0, finished.text[-4000:]
    (line,) = [line for line in finished.text.splitlines() if "falls back" in line]
    assert line.startswith(f"checkpoint {newest}: {told(file, kind)}") and line.endswith("falls back to epoch-000001")
    assert "continuing after epoch 1 from epoch-000001" in finished.stdout
    assert names(run) == ["epoch-000001", "epoch-000002"] and same(run, undamaged)
    assert [json.loads(row)["epoch"] for row in (run / "metrics.jsonl").read_text().splitlines()] == [0, 1]


def test_without_a_whole_one_the_run_is_refused(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    for name in names(run):
        damage(run / "checkpoints" / name, WEIGHTS, "cut")
    line = refusal(start(run, schedule__epochs=3))
    assert "has no whole checkpoint (epoch-000002: " in line and "remove that directory to begin anew" in line
    shutil.rmtree(run / "checkpoints")
    finished = start(run)
    assert finished.returncode == 0 and "continuing" not in finished.stdout and same(run, whole)


# Of earlier versions, which wrote down sizes, or nothing.


def forget(checkpoint: Path, *, sizes: bool) -> None:
    """Make it one of an earlier version."""
    state = json.loads((checkpoint / "state.json").read_text())
    del state["manifest"]
    if sizes:
        state["files"] = {name: (checkpoint / name).stat().st_size for name in (WEIGHTS, OPTIMIZER)}
    (checkpoint / "state.json").write_text(json.dumps(state))
    (checkpoint / "manifest.json").unlink()


def test_checkpoints_of_earlier_versions_are_gone_on_from(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    for name in names(run):
        forget(run / "checkpoints" / name, sizes=True)
    damage(run / "checkpoints/epoch-000002", OPTIMIZER, "cut")
    finished = start(run)
    assert finished.returncode == 0 and "continuing after epoch 1 from epoch-000001" in finished.stdout
    assert f"epoch-000002: {OPTIMIZER} has " in finished.stderr and same(run, whole)


def test_what_an_earlier_version_left_and_cannot_be_read_names_the_one_before(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    newest = run / "checkpoints/epoch-000002"
    forget(newest, sizes=False)
    damage(newest, WEIGHTS, "cut")
    line = refusal(start(run, schedule__epochs=3))
    assert f"checkpoint {newest}: it cannot be read (" in line
    assert "remove this directory to go on from epoch-000001, the one before it" in line


# Of a stranger.


class Program:
    """What a pickle makes of it when it is read: a call of `touch`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "plain pickle"])
@pytest.mark.parametrize("file", [WEIGHTS, OPTIMIZER])
def test_a_checkpoint_runs_no_program(whole: Path, tmp_path: Path, file: str, zipped: bool) -> None:
    """With a manifest that is right: whoever can write the one can write the other."""
    run, trace = tmp_path / "run", tmp_path / "trace"
    shutil.copytree(whole, run)
    newest = run / "checkpoints/epoch-000002"
    content = torch.load(newest / file, weights_only=False)
    torch.save(content | {"more": Program(trace)}, newest / file, _use_new_zipfile_serialization=zipped)
    torch.load(newest / file, weights_only=False)
    assert trace.exists(), "the trap works"
    trace.unlink()
    files = {name: checkpoint_files.measure(newest / name) for name in checkpoint_files.read_manifest(newest)[0]}
    checkpoint_files.write_manifest(newest, files, kept=False)
    line = refusal(start(run, schedule__epochs=3))
    assert not trace.exists()
    assert f"{Path(file).name}: it asks for posix.system when it is read, expected tensors and plain values alone" in line


# A disk that is full. A limit of file sizes stands for one: Python and torch say the same of both. An evaluation scores two sets,
# so the epochs' calls are the third, the fourth and so on.


def with_reward(tmp_path: Path) -> str:
    (tmp_path / "reward.py").write_text(FULL)
    return f"[{{name: python, options: {{function: '{tmp_path / 'reward.py'}:score'}}}}]"


@pytest.mark.parametrize(("ranks", "behind"), [(1, "off"), (1, "on"), (2, "off"), (2, "on")])
def test_a_full_disk_is_a_line_and_training_goes_on(tmp_path: Path, ranks: int, behind: str) -> None:
    """Of two ranks, the second alone has no room."""
    rewards = with_reward(tmp_path)
    env = {"FULL_AT": "4", "ROOM_AT": "5", "LIMIT": "5000000", "FULL_RANK": str(ranks - 1)}
    run, other = tmp_path / "run", tmp_path / "other"
    finished = start(run, ranks=ranks, env=env, rewards=rewards, schedule__epochs=3, checkpoint__async_save=behind)
    assert finished.returncode == 0 and "Traceback" not in finished.text, finished.text[-4000:]
    (line,) = [line for line in finished.text.splitlines() if "cannot be written" in line]
    assert line.startswith(f"WARNING: checkpoint {run / 'checkpoints/epoch-000002'} cannot be written (")
    then = {"off": "training goes on, and tries again after epoch 3", "on": "the next one is tried when it is due, or at the end"}
    assert f"the last whole one is epoch-000001; make room: {then[behind]}" in line
    assert ("rank 1: " in line) == (ranks == 2)
    assert names(run) == ["epoch-000001", "epoch-000003"]
    assert start(other, ranks=ranks, rewards=rewards, schedule__epochs=3).returncode == 0 and same(run, other)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_last_checkpoint_without_room_fails_the_run_after_the_export(tmp_path: Path, ranks: int) -> None:
    rewards = with_reward(tmp_path)
    env = {"FULL_AT": "4", "LIMIT": "12000000", "FULL_RANK": str(ranks - 1)}  # a model has room, and optimizer states have not
    run = tmp_path / "run"
    finished = start(run, ranks=ranks, env=env, rewards=rewards)
    line = refusal(finished)
    assert f"the model is exported, but the run's last checkpoint {run / 'checkpoints/epoch-000002'} cannot be written (" in line
    assert f"the last whole one is epoch-000001; make room, or lift a limit of file sizes, and go on with --resume {run}" in line
    assert finished.text.count("WARNING: checkpoint ") == 2, "after the epoch, and once more at the end"
    assert names(run) == ["epoch-000001"] and (run / "summary.json").exists() and trained(run)
    again = start(run, ranks=ranks, rewards=rewards)
    assert again.returncode == 0 and names(run) == ["epoch-000001", "epoch-000002"], again.text[-4000:]


@pytest.mark.parametrize(("call", "limit", "said"), [(2, 2_000, "evaluation_before.pt: "), (6, 2_000, "evaluation_after.pt: ")])
def test_other_files_without_room_are_one_line_and_the_run_goes_on_later(
    tmp_path: Path, call: int, limit: int, said: str
) -> None:
    run, rewards = tmp_path / "run", with_reward(tmp_path)
    line = refusal(start(run, env={"FULL_AT": str(call), "LIMIT": str(limit)}, rewards=rewards))
    assert f"{run}/{said}" in line and "--resume" in line
    assert names(run) == {2: [], 6: ["epoch-000001", "epoch-000002"]}[call], "nothing half written is left"
    finished = start(run, rewards=rewards)
    assert finished.returncode == 0 and (run / "summary.json").exists(), finished.text[-4000:]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """74 MB: one checkpoint has room, two have not."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=74m", "tmpfs", str(place)], capture_output=True, check=False)
    if made.returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        yield place
    finally:
        with contextlib.suppress(subprocess.CalledProcessError):
            subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_disk_with_room_for_one_checkpoint(small_disk: Path, ranks: int) -> None:
    """Every later one fails; what is there already stays whole, and the model is exported."""
    run = small_disk / "run"
    finished = start(run, ranks=ranks)
    line = refusal(finished)
    assert "the model is exported, but the run's last checkpoint" in line and "the last whole one is epoch-000001" in line
    assert names(run) == ["epoch-000001"] and trained(run)
    assert (
        checkpoint_files.content_fault(
            run / "checkpoints/epoch-000001", checkpoint_files.look(run / "checkpoints/epoch-000001")[0].items()
        )
        is None
    )
