"""Jobs that are asked to stop, lose their launcher or a rank, or wait for one that does not come."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import launching
import pytest
import torch
from launching import ROOT, TRAIN, Job, deepspeed_command
from safetensors.torch import load_file

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

# The third call of a rank is in the third epoch. It waits, once in the life of the run, for whatever the test does.
REWARD = """
import pathlib, time
calls = 0
def score(images, prompts):
    global calls
    calls += 1
    if calls == 3 and not pathlib.Path("waited").exists():
        pathlib.Path("waited").touch()
        time.sleep(300)
    return images[:, 0].double().mean((1, 2)).div(255).float()
"""
# A job in which something is otherwise: `EXTRA` is run before training, with the module of the Trainer as `trainer`.
CHANGED = """
import os, sys, time
from prdp_fast import train
from prdp_fast.training import trainer
RANK = os.environ.get("RANK", "0")
{extra}
sys.exit(train.main())
"""
SMALL = {
    "schedule.epochs": 4, "schedule.updates_per_epoch": 1, "schedule.prompts_per_epoch": 4, "schedule.images_per_prompt": 2,
    "sampler.num_inference_steps": 3, "evaluation.prompts": 0, "optimizer.learning_rate": 1e-3, "checkpoint.every": 100,
    # What `auto` measures at start could come out otherwise in another run, which would then round differently.
    "performance.attention": "sdpa", "performance.fuse_qkv": "off",
}  # fmt: skip
MANY = SMALL | {"schedule.epochs": 100_000, "rewards": "[{name: jpeg_size}]"}
MINE = SMALL | {"performance.background_rewards": "on", "rewards": "[{name: python, options: {function: 'reward.py:score'}}]"}


def words(values: dict, *more: str) -> list[str]:
    return ["--config", "zero2.json", "--recipe", "smoke", "--output", "run", *more, *launching.settings(values)]


def rank_file(run: Path, rank: int) -> dict:
    return json.loads((run / f"ranks/rank-{rank:05d}.json").read_text())


def wait_for(condition, job, what: str, timeout: float = 150) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert job.poll() is None, f"the job has ended before {what}"
        assert time.monotonic() < deadline, f"no {what}"
        time.sleep(0.02)


def epochs(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def changed(folder: Path, extra: str) -> Path:
    script = folder / "changed.py"
    script.write_text(CHANGED.format(extra=extra))
    return script


def is_gone(pid: int) -> bool:
    path = Path(f"/proc/{pid}/stat")
    try:
        return path.read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def error_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("error: ")]


def test_a_stop_inside_a_reward_is_saved_and_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """The signal comes to one rank, and the other one sits in a reward that never returns."""
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "reward.py").write_text(REWARD)
    (tmp_path / "whole/waited").touch()
    launching.run(TRAIN, *words(MINE), ranks=2, cwd=tmp_path / "whole")

    folder = tmp_path / "stopped"
    job = launching.start(TRAIN, *words(MINE), ranks=2, cwd=folder)
    wait_for((folder / "waited").exists, job, "call that waits")
    signalled = rank_file(folder / "run", 0)
    assert signalled["epoch"] == 2 and signalled["host"]
    for _ in range(2):  # the second one changes nothing
        os.kill(signalled["pid"], signal.SIGUSR1)
    finished = job.wait(60)
    assert finished.returncode == 0, finished.text[-3000:]
    said = [line for line in finished.text.splitlines() if line.startswith("stopped by ")]
    assert said == [f"stopped by SIGUSR1: 2 of 4 epochs are saved in {folder / 'run'}; the same command goes on"]
    assert "Traceback" not in finished.text and not error_lines(finished.text)
    assert [path.name for path in (folder / "run/checkpoints").iterdir()] == ["epoch-000002"]

    resumed = launching.run(TRAIN, *words(MINE), ranks=2, cwd=folder)
    assert "continuing after epoch 2" in resumed.stdout and epochs(folder / "run") == 4
    export = "run/model/unet/diffusion_pytorch_model.safetensors"
    found, expected = (load_file(tmp_path / name / export) for name in ("stopped", "whole"))
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_an_interrupted_run_of_one_process_has_status_130(tmp_path: Path) -> None:
    job = launching.start(TRAIN, *words(MANY), cwd=tmp_path)
    wait_for(lambda: epochs(tmp_path / "run") > 0, job, "epoch")
    os.kill(rank_file(tmp_path / "run", 0)["pid"], signal.SIGINT)
    finished = job.wait(60)
    done = epochs(tmp_path / "run")
    assert finished.returncode == 130 and f"stopped by SIGINT: {done} of 100000 epochs are saved" in finished.text
    assert (tmp_path / f"run/checkpoints/epoch-{done:06d}/state.json").is_file() and "Traceback" not in finished.text


def test_a_stop_before_the_first_epoch_and_one_that_the_recipe_sets(tmp_path: Path) -> None:
    finished = launching.start(TRAIN, *words(MANY | {"schedule.stop_after": 1e-4}), cwd=tmp_path).wait(60)
    assert finished.returncode == 0
    said = finished.text.splitlines()[-1]
    assert said.startswith("stopped by schedule.stop_after (0.0001 minutes): no") or said.endswith("nothing was begun")


def test_the_grace_is_over_before_an_update_is(tmp_path: Path) -> None:
    """The run ends then, and the last checkpoint stands."""
    extra = """
update = trainer.run_updates
def slow(*arguments, **options):
    if options["last_drift"] is not None:  # the second epoch's
        open("slow", "w").close()
        time.sleep(300)
    return update(*arguments, **options)
trainer.run_updates = slow
"""
    job = launching.start(
        changed(tmp_path, extra), *words(MANY | {"checkpoint.every": 1}, "--grace", "1"), cwd=tmp_path
    )  # fmt: skip
    wait_for((tmp_path / "slow").exists, job, "slow update")
    os.kill(rank_file(tmp_path / "run", 0)["pid"], signal.SIGTERM)
    started = time.monotonic()
    finished = job.wait(60)
    assert finished.returncode == 0 and time.monotonic() - started < 20
    assert finished.text.splitlines()[-1] == (
        "stopped by SIGTERM: phase update of epoch 1 took longer than --grace 1 s; the same command goes on from its last "
        "checkpoint, epoch-000001"
    )


def test_ranks_whose_launcher_is_killed_save_and_end(tmp_path: Path) -> None:
    job: Job = launching.start(TRAIN, *words(MANY), ranks=2, cwd=tmp_path)
    wait_for(lambda: epochs(tmp_path / "run") > 0, job, "epoch")
    pids = [rank_file(tmp_path / "run", rank)["pid"] for rank in range(2)]
    os.kill(job.pid, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while not all(map(is_gone, pids)):
        assert time.monotonic() < deadline, "ranks live on without their launcher"
        time.sleep(0.05)
    assert list((tmp_path / "run/checkpoints").glob("epoch-*/state.json")), job.output()[-2000:]
    assert "stopped by " in job.output() and "Traceback" not in job.output()


def test_ranks_notice_that_the_deepspeed_command_above_their_launcher_is_gone(tmp_path: Path) -> None:
    """What it has started in turn is the ranks' parent, and lives."""
    log = (tmp_path / "log").open("w")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    command = subprocess.Popen(
        deepspeed_command(TRAIN, *words(MANY), ranks=2), cwd=tmp_path, stdout=log, stderr=log, env=environment
    )
    try:
        wait_for(lambda: epochs(tmp_path / "run") > 0, command, "epoch", 240)
    finally:
        command.kill()
        command.wait()
    pids = [rank_file(tmp_path / "run", rank)["pid"] for rank in range(2)]
    deadline = time.monotonic() + 40
    while not all(map(is_gone, pids)):
        assert time.monotonic() < deadline, "ranks live on without the deepspeed command"
        time.sleep(0.05)
    assert list((tmp_path / "run/checkpoints").glob("epoch-*/state.json"))
    assert "stopped by the end of its launcher (deepspeed " in (tmp_path / "log").read_text()


def test_a_killed_rank_is_named_and_no_other_has_a_traceback(tmp_path: Path) -> None:
    job = launching.start(TRAIN, *words(MANY | {"checkpoint.every": 1}), ranks=2, cwd=tmp_path)
    wait_for(lambda: list((tmp_path / "run/checkpoints").glob("epoch-*")), job, "checkpoint")
    pid = rank_file(tmp_path / "run", 1)["pid"]
    os.kill(pid, signal.SIGKILL)
    finished = job.wait(60)
    assert finished.returncode not in (0, 2) and "Traceback" not in finished.text
    (line,) = error_lines(finished.text)
    assert line.startswith(f"error: rank 1 of 2 (process {pid} on ") and "ended without a word in phase " in line
    assert "the same command goes on from its last checkpoint, epoch-" in line


@pytest.mark.parametrize(
    ("fault", "said"), [("raise KeyError('boom')", "KeyError: 'boom'"), ("sys.exit(0)", "asked the process to end (0)")]
)
def test_a_rank_that_fails_alone_speaks_first_and_alone(tmp_path: Path, fault: str, said: str) -> None:
    extra = f"""
roll = trainer.rollout
def fails(*arguments, **options):
    if RANK == "1" and options["epoch"] == 1:
        {fault}
    return roll(*arguments, **options)
trainer.rollout = fails
"""
    finished = launching.start(changed(tmp_path, extra), *words(MANY), ranks=2, cwd=tmp_path).wait(100)
    assert finished.returncode == 1, finished.text[-3000:]
    (line,) = error_lines(finished.text)
    assert line.startswith(f"error: rank 1 of 2 failed in phase rollout of epoch 1: {said}")
    assert finished.text.count("Traceback") == 1 and finished.text.index(line) < finished.text.index("Traceback")


def test_a_rank_that_does_not_come_is_named_and_every_rank_leaves_its_stacks(tmp_path: Path) -> None:
    values = MANY | {"schedule.collective_timeout_minutes": 0.1, "schedule.reward_timeout_s": 3}
    job = launching.start(TRAIN, *words(values), ranks=2, cwd=tmp_path)
    wait_for(lambda: epochs(tmp_path / "run") > 1, job, "epoch")
    pid = rank_file(tmp_path / "run", 1)["pid"]
    os.kill(pid, signal.SIGSTOP)
    finished = job.wait(60)
    assert finished.returncode == 3 and "Traceback" not in finished.text, finished.text[-3000:]
    (line,) = error_lines(finished.text)
    assert line.startswith("error: rank 0 has waited 6 s in ") and f"rank 1 (process {pid} on " in line
    assert "halted by a signal), in phase " in line and "schedule.collective_timeout_minutes" in line
    assert "trainer.py" in (tmp_path / "run/ranks/stacks-00000.txt").read_text()
