"""Forks the ranks of launched jobs from one process that has imported everything, so that a test does not pay for imports.

Started by `launching.py`. It reads a job a line, JSON, from its standard input, and prints the process id of each job's
supervisor. A job is a process group: the supervisor, which ends it with the first rank that fails, as DeepSpeed's launcher does,
and a process for each rank. The supervisor's exit status is left in the job's folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import select
import signal
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0:1] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")]

from prdp_fast.core import environment

environment.prepare()

import torch

torch.set_num_threads(1)
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  # which deepspeed imports with its first engine, and inductor with it
import torch.utils.tensorboard  # with the first scalar
from diffusers import AutoencoderKL, UNet2DConditionModel  # noqa: F401  # which diffusers imports lazily

import prdp_fast.commands.evaluate
import prdp_fast.train
import prdp_fast.training.trainer  # noqa: F401  # torch, diffusers, transformers and deepspeed

PATIENCE = 3.0  # seconds from asking the other ranks to end to killing them


def rank_environment(job: dict, rank: int) -> dict[str, str]:
    """What DeepSpeed's launcher sets for a rank; nothing for a job that python runs by itself."""
    if job["ranks"] is None:
        return job["env"]
    return job["env"] | {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(job["ranks"]), "LOCAL_SIZE": str(job["ranks"]),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(job["port"]), "CROSS_RANK": "0", "CROSS_SIZE": "1",
    }  # fmt: skip


def run_rank(job: dict, rank: int) -> int:
    os.environ.update(rank_environment(job, rank))
    own = [] if job["ranks"] is None else [f"--local_rank={rank}"]
    sys.argv = [job["script"], *own, *job["arguments"]]
    sys.path[0] = str(Path(job["script"]).parent)
    try:
        runpy.run_path(job["script"], run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def leave(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def supervise(job: dict) -> int:
    """Start the ranks and wait for all of them. Returns: 0, or the status of the first rank that failed."""
    ranks = set()
    for rank in range(job["ranks"] or 1):
        pid = os.fork()
        if pid == 0:
            leave(run_rank(job, rank))
        ranks.add(pid)
    failed, since = 0, 0.0
    while ranks:
        pid, status = os.waitpid(-1, 0 if not failed else os.WNOHANG)
        if pid:
            ranks.discard(pid)
            code = os.waitstatus_to_exitcode(status)
            if code and not failed:
                failed, since = code if code > 0 else 128 - code, time.monotonic()
                for other in ranks:
                    os.kill(other, signal.SIGTERM)
        else:
            if time.monotonic() - since > PATIENCE:
                for other in ranks:
                    os.kill(other, signal.SIGKILL)
            time.sleep(0.02)
    return failed


def start(job: dict) -> int:
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    folder = Path(job["folder"])
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.chdir(job["cwd"])
    leave(supervise(job))
    raise AssertionError("unreachable")


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever is printed here is no answer
    jobs: dict[int, Path] = {}
    print("ready", file=answers, flush=True)
    while True:
        if select.select([0], [], [], 0.02)[0]:
            line = sys.stdin.readline()
            if not line:
                break
            job = json.loads(line)
            pid = start(job)
            jobs[pid] = Path(job["folder"])
            print(pid, file=answers, flush=True)
        with contextlib.suppress(ChildProcessError):
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid:
                partial = jobs[pid] / ".status"
                partial.write_text(str(os.waitstatus_to_exitcode(status)))
                partial.rename(jobs.pop(pid) / "status")
    for pid in jobs:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
