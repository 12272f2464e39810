"""Signals to true launchers, with imports and all: `prdp train`, deepspeed, torchrun."""

from __future__ import annotations

import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

from launching import TRAIN, deepspeed_command, free_port

from campaign import facts
from campaign.cases.signals import TWO, TWO_EMA, TWO_PLAIN
from campaign.scene import Case, Scene


def prdp(scene: Scene) -> list[str]:
    words = scene.case.setting.words(scene.kit.model, scene.run, {"checkpoint.every": 100})
    return [sys.executable, "-m", "prdp_fast.cli", "train", "--num_gpus", str(scene.case.setting.ranks), *words]


def deepspeed(scene: Scene) -> list[str]:
    words = scene.case.setting.words(scene.kit.model, scene.run, {"checkpoint.every": 100})
    return deepspeed_command(TRAIN, *words, ranks=scene.case.setting.ranks)


def torchrun(scene: Scene) -> list[str]:
    words = scene.case.setting.words(scene.kit.model, scene.run, {})
    command = [str(Path(sys.executable).with_name("torchrun")), f"--nproc_per_node={scene.case.setting.ranks}"]
    return [*command, f"--master_port={free_port()}", "--max_restarts=3", "--monitor_interval=0.5", str(TRAIN), *words]


def signalled(scene: Scene, command, name: str, statuses: tuple[int, ...], says: str = "stopped by ") -> None:
    """One signal to the launcher; the ranks save and end, and the same command goes on."""
    job = scene.launch(command(scene))
    if scene.reach(job, scene.draw.choice(("rollout", "update"))):
        os.kill(job.pid, signal.Signals[name])
    scene.end(job, statuses, says, within=scene.bound_s)
    scene.finish()


def restarted(scene: Scene) -> None:
    """torchrun's agent starts the job again each time that a rank is killed."""
    job, known = scene.launch(torchrun(scene)), set()
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


CASES = [
    Case("SIGTERM to prdp train", TWO, partial(signalled, command=prdp, name="SIGTERM", statuses=(0,)), 90, true_launcher=True),
    Case("SIGINT to prdp train", TWO_EMA, partial(signalled, command=prdp, name="SIGINT", statuses=(130,)), 90, true_launcher=True),
    Case("SIGKILL of prdp train", TWO_PLAIN, partial(signalled, command=prdp, name="SIGKILL", statuses=(-9,)), 90,
         true_launcher=True),
    Case("SIGTERM to deepspeed", TWO, partial(signalled, command=deepspeed, name="SIGTERM", statuses=(143, -15)), 90,
         true_launcher=True),
    Case("a rank killed three times under torchrun", TWO_PLAIN, restarted, mendable=False, true_launcher=True),
]  # fmt: skip
