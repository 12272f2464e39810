"""A reward that fails in an epoch, in launched jobs of two ranks: the run stops and goes on later, or repeats the epoch.

Whatever happens on the way, the weights at the end are those of a run in which nothing failed, bit for bit.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import launching
import numpy as np
import pytest
import torch
from launching import ROOT, TRAIN, Job, free_port
from PIL import Image
from safetensors.torch import load_file

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

SMALL = {
    "schedule.epochs": 3, "schedule.updates_per_epoch": 1, "schedule.prompts_per_epoch": 4, "schedule.images_per_prompt": 2,
    "sampler.num_inference_steps": 3, "evaluation.prompts": 0, "optimizer.learning_rate": 1e-3,
    # What `auto` measures at start could come out otherwise in another run, which would then round differently.
    "performance.attention": "sdpa", "performance.fuse_qkv": "off",
}  # fmt: skip


def start(output: Path, url: str, **schedule: object) -> Job:
    rewards = f"[{{name: http, options: {{url: '{url}', retries: 0, timeout_s: 30}}}}]"
    values = SMALL | {"rewards": rewards} | {f"schedule.{name}": value for name, value in schedule.items()}
    return launching.start(
        TRAIN, "--config", "zero2.json", "--recipe", "smoke", "--output", output, *launching.settings(values), ranks=2
    )  # fmt: skip


def finish(job: Job, *, well: bool = True) -> str:
    finished = job.wait(200)
    assert (finished.returncode == 0) == well, finished.text[-4000:]
    return finished.text


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model/unet/diffusion_pytorch_model.safetensors")


def assert_same_weights(run: Path, expected: Path) -> None:
    found, wanted = weights(run), weights(expected)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def redness(pixels: np.ndarray) -> float:
    return float(np.float32(pixels[..., 0].mean() / 255))


@contextlib.contextmanager
def scorer(fails: Callable[[int], bool] = lambda number: False, port: int = 0) -> Iterator[tuple[str, list[str]]]:
    """A server in this process: its address, and what it answered. fails: by the number of the request, from 0 on."""
    answers: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with lock:
                answers.append("500" if fails(len(answers)) else "200")
                status = int(answers[-1])
            images = [np.array(Image.open(io.BytesIO(base64.b64decode(image)))) for image in request["images"]]
            content = {"error": "no memory left"} if status == 500 else {"scores": list(map(redness, images))}
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    lock = threading.Lock()
    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", answers
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    with scorer() as (url, answers):
        finish(start(output, url))
    assert answers == ["200"] * 6
    return output


def rows(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_one_rank_fails_the_run_stops_and_goes_on(undisturbed, tmp_path):
    """From the second epoch on, one of every two requests fails: one rank has its scores and must not use them."""
    run = tmp_path / "run"
    with scorer(lambda number: number >= 2 and number % 2 == 1) as (url, answers):
        said = finish(start(run, url), well=False)
        assert answers == ["200", "200", "200", "500"]
        line = next(line for line in said.splitlines() if "error: " in line)
        assert "no memory left" in line and "stopped in epoch 1, 1 finished epochs are saved" in line
        assert line.endswith(f"the same command with --resume {run}")
        assert [path.name for path in (run / "checkpoints").iterdir()] == ["epoch-000001"]

        said = finish(start(run, url, on_failure="repeat", max_repeats=2), well=False)
        assert answers[4:] == ["200", "500"] * 3  # both ranks ask again each time: the epoch and two repetitions
        assert said.count("repeating it, 1 of 2") == said.count("repeating it, 2 of 2") == 1
        assert [path.name for path in (run / "checkpoints").iterdir()] == ["epoch-000001"] and len(rows(run)) == 1

    # The address is part of the recipe, and a resumed run keeps its recipe.
    with scorer(port=int(url.rpartition(":")[2])) as (url, answers):
        finish(start(run, url))
        assert answers == ["200"] * 4
    assert_same_weights(run, undisturbed)


SLOW_ONCE = """
import pathlib, time
def score(images, prompts):
    with open("calls", "a") as file:
        file.write("x")
    if pathlib.Path("calls").stat().st_size == 3:
        pathlib.Path("hanging").touch()
        time.sleep(120)
    return images[:, 0].double().mean((1, 2)).div(255).float()
"""


def serve(directory: Path, port: int) -> subprocess.Popen:
    """`prdp serve-reward`, once it listens."""
    process = subprocess.Popen(
        [sys.executable, "-m", "prdp_fast.cli", "serve-reward", "python", "--option", "function=slow_once.py:score",
         "--port", str(port), "--device", "cpu"],
        cwd=directory, env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])},
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline().startswith("serving python")
    return process


def test_a_server_killed_in_the_middle_of_an_epoch_and_started_again(undisturbed, tmp_path):
    (tmp_path / "slow_once.py").write_text(SLOW_ONCE)
    port = free_port()
    server = serve(tmp_path, port)
    try:
        job = start(tmp_path / "run", f"http://127.0.0.1:{port}", on_failure="repeat", max_repeats=10_000)
        deadline = time.monotonic() + 120
        while not (tmp_path / "hanging").exists():  # the third call is one of the second epoch
            assert job.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        server.kill()
        server.communicate()
        server = serve(tmp_path, port)
        said = finish(job)
    finally:
        server.kill()
        server.communicate()
    assert "epoch 1: reward 'http'" in said and "repeating it, 1 of 10000" in said
    assert [row["epoch"] for row in rows(tmp_path / "run")] == [0, 1, 2]
    assert_same_weights(tmp_path / "run", undisturbed)
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["images"] == 3 * 4 * 2  # what was thrown away does not count


HANGS = """
import os, time
calls = 0
def score(images, prompts):
    global calls
    calls += 1
    if calls == 2 and os.environ["RANK"] == "1":
        {what}
    return images[:, 0].double().mean((1, 2)).div(255).float()
"""


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("time.sleep(300)", "gave no scores of 4 images within 4 s"),
        ("raise SystemExit(0)", r"mine.py:score raised SystemExit: 0"),
    ],
)
def test_a_function_that_hangs_or_leaves_on_one_rank(tmp_path, what, said):
    """Both ranks end with status 2 and one line, and the finished epoch is saved."""
    (tmp_path / "mine.py").write_text(HANGS.format(what=what))
    values = SMALL | {
        "rewards": f"[{{name: python, options: {{function: '{tmp_path / 'mine.py'}:score'}}}}]", "schedule.reward_timeout_s": 4,
    }  # fmt: skip
    started = time.monotonic()
    finished = launching.start(
        TRAIN, "--config", "zero2.json", "--recipe", "smoke", "--output", tmp_path / "run", *launching.settings(values), ranks=2
    ).wait(200)
    assert finished.returncode == 2 and time.monotonic() - started < 100, finished.text[-3000:]
    (line,) = [line for line in finished.text.splitlines() if line.startswith("error: ")]
    assert said in line and "(on rank 1)" in line
    assert "stopped in epoch 1, 1 finished epochs are saved" in line and "Traceback" not in finished.text
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["epoch-000001"]


def test_tasks_of_srun_are_one_job(tmp_path):
    """Two processes as srun starts them train together."""
    values = SMALL | {"rewards": "[{name: jpeg_size}]", "schedule.epochs": 1}
    slurm = {
        "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_STEP_NUM_NODES": "1", "SLURM_JOB_ID": "77",
        "SLURM_STEP_ID": str(free_port()),  # another rendezvous than that of a job beside this one
    }  # fmt: skip
    jobs = [
        launching.start(
            TRAIN, "--config", "zero2.json", "--recipe", "smoke", "--output", tmp_path / "run", *launching.settings(values),
            env=slurm | {"SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)},
        )
        for task in range(2)
    ]  # fmt: skip
    assert [finish(job) is not None for job in jobs] == [True, True]
    assert json.loads((tmp_path / "run/run.json").read_text())["world_size"] == 2 and len(rows(tmp_path / "run")) == 1
