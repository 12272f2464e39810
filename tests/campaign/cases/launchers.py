"""Signals to true launchers, with imports and all: `prdp train`, deepspeed, torchrun."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from launching import TRAIN, deepspeed_command, free_port

from campaign import facts
from campaign.cases.signals import ONE, ONE_EMA, TWO, TWO_EMA, TWO_PLAIN
from campaign.scene import Case, Scene
from campaign.settings import Setting


def prdp(scene: Scene) -> list[str]:
    words = scene.case.setting.words(scene.kit.model, scene.run, {"checkpoint.every": 100})
    return [sys.executable, "-m", "prdp_fast.cli", "train", "--num_gpus", str(scene.case.setting.ranks), *words]


def deepspeed(scene: Scene) -> list[str]:
    words = scene.case.setting.words(scene.kit.model, scene.run, {"checkpoint.every": 100})
    return deepspeed_command(TRAIN, *words, ranks=scene.case.setting.ranks)


def torchrun(scene: Scene, *meeting: str) -> list[str]:
    words = scene.case.setting.words(scene.kit.model, scene.run, {})
    command = [str(Path(sys.executable).with_name("torchrun")), f"--nproc_per_node={scene.case.setting.ranks}"]
    return [*command, *meeting, "--max_restarts=3", "--monitor_interval=0.5", str(TRAIN), *words]


def signalled(scene: Scene, command: Callable[[Scene], list[str]], name: str, statuses: tuple[int, ...]) -> None:
    """One signal to the launcher; the ranks save and end, and the same command goes on."""
    job = scene.launch(command(scene))
    if scene.reach(job, scene.draw.choice(("rollout", "update"))):
        os.kill(job.pid, signal.Signals[name])
    scene.end(job, statuses, "stopped by ", within=scene.bound_s)
    scene.finish()


def restarted(scene: Scene, backend: str | None) -> None:
    """torchrun's agent starts the job again each time that a rank is killed. Args: backend: of its rendezvous; None: its own."""
    port = free_port()
    meeting = [f"--rdzv_backend={backend}", f"--rdzv_endpoint=localhost:{port}"] if backend else [f"--master_port={port}"]
    job, known = scene.launch(torchrun(scene, *meeting)), set()
    for phase in scene.draw.sample(("rollout", "update", "checkpoint"), 3):
        rank, epoch = scene.draw.randrange(2), scene.draw.choice((1, 2))
        while (found := scene.wait_for(job, phase, epoch, rank)) is not None and found["pid"] in known:
            time.sleep(0.02)
        if found is None:
            scene.unexpected.append(f"the job had ended before {phase} of epoch {epoch}")
            break
        known |= {one["pid"] for one in facts.rank_files(scene.run)}
        scene.note(f"rank {rank} in {found['phase']} of epoch {found['epoch']}")
        facts.stop_process(found["pid"], signal.SIGKILL)
    scene.end(job)
    scene.finished = True


def _case(name: str, setting: Setting, command: Callable[[Scene], list[str]], signal_name: str, *statuses: int) -> Case:
    play = partial(signalled, command=command, name=signal_name, statuses=statuses)
    return Case(name, setting, play, bound_s=90)


CASES = [
    _case("SIGTERM to prdp train", TWO, prdp, "SIGTERM", 0), _case("SIGINT to prdp train", TWO_EMA, prdp, "SIGINT", 130),
    _case("SIGKILL of prdp train", TWO_PLAIN, prdp, "SIGKILL", -9),
    _case("SIGTERM to deepspeed", TWO, deepspeed, "SIGTERM", 143, -15),
    _case("SIGHUP to deepspeed", TWO_EMA, deepspeed, "SIGHUP", 129, -1),
    _case("SIGTERM to deepspeed, one rank", ONE, deepspeed, "SIGTERM", 143, -15),
    _case("SIGHUP to deepspeed, one rank", ONE_EMA, deepspeed, "SIGHUP", 129, -1),
    # torchrun shows tracebacks of its own.
    Case("a rank killed three times under torchrun", TWO_PLAIN, partial(restarted, backend=None), mendable=False),
    Case("a rank killed three times under torchrun, c10d", TWO_EMA, partial(restarted, backend="c10d"), mendable=False),
]  # fmt: skip
