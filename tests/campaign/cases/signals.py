"""Ranks, launchers and whole jobs that are killed, halted, or asked to stop."""

from __future__ import annotations

import time
from functools import partial

from campaign.scene import Case, Scene
from campaign.settings import Setting

ONE, ONE_EMA, ONE_LORA, ONE_OFFLOAD = (
    Setting(1, 0), Setting(1, 1, ema=True), Setting(1, 2, lora=True), Setting(1, 2, offload=True),
)  # fmt: skip
TWO, TWO_EMA, TWO_PLAIN, TWO_LORA = (
    Setting(2, 2), Setting(2, 1, ema=True), Setting(2, 0), Setting(2, 2, lora=True, ema=True),
)  # fmt: skip
THREE, THREE_OFFLOAD = Setting(2, 3), Setting(2, 3, offload=True)
SLOW = {"CAMPAIGN_FAULT": '{"do": "slow", "seconds": 0.5}'}  # so that a moment inside a reward can be met
PATIENCE = {"schedule__collective_timeout_minutes": 0.4, "schedule__reward_timeout_s": 20}
KILLED = (1, 137, -9)  # of a launcher whose rank was killed


def kill(scene: Scene, target: str, phase: str, *, times: int = 1) -> None:
    """SIGKILL at a moment of `phase`; then the same command."""
    for _ in range(times):
        job = scene.start(env=SLOW if phase == "reward" else None)
        rank = int(target[-1]) if target.startswith("rank ") else 0
        if scene.reach(job, phase, rank=rank):
            scene.send(job, "SIGKILL", target)
        two = scene.case.setting.ranks > 1 and target.startswith("rank ")
        says = rf"(?m)^error: rank {rank} of 2 .*ended without a word in phase " if two else ""
        start = scene.end(job, KILLED, says=says, within=scene.bound_s)
        lines = [line for line in start.text.splitlines() if line.startswith("error: ")]
        if two and len(lines) > 1:
            scene.unexpected.append(f"{len(lines)} lines of errors, expected that of the rank alone")
    scene.finish()


def kill_at_every_restart(scene: Scene) -> None:
    """One rank or the other, three times, each in another phase."""
    for phase in scene.draw.sample(("rollout", "update", "checkpoint", "evaluate"), 3):
        job, rank = scene.start(), scene.draw.randrange(2)
        if scene.reach(job, phase, rank=rank):
            scene.send(job, "SIGKILL", f"rank {rank}")
        scene.end(job, KILLED, within=scene.bound_s)
    scene.finish()


def kill_in_start(scene: Scene) -> None:
    """The job is resumed, and killed again before it trains."""
    scene.crashed()
    job = scene.start()
    scene.wait_for(job, "start", -1)
    scene.note("while it starts")
    time.sleep(scene.draw.uniform(0, 0.4))
    scene.send(job, "SIGKILL", "rank 0")
    scene.end(job, KILLED, within=scene.bound_s)
    scene.finish()


def stop(
    scene: Scene, names: str, target: str, phase: str, status: int = 0, then: float | None = None, fault: str = "",
    epoch: int | None = None, **values: object,
) -> None:  # fmt: skip
    """A signal or several; the run saves and ends well, and the same command goes on.

    Args:
        then: seconds after which SIGKILL follows.
        fault: CAMPAIGN_FAULT of the first start.
        epoch: None draws it.
        values: recipe settings of both starts.
    """
    env = {"CAMPAIGN_FAULT": fault} if fault else SLOW if phase == "reward" else None
    job = scene.start(env=env, checkpoint__every=100 if then is None else 1, **values)
    if scene.reach(job, phase, epoch=epoch):
        for name in names.split():
            scene.send(job, name, target)
            time.sleep(0.05)
        if then is not None:
            time.sleep(then)
            scene.send(job, "SIGKILL", "group")
    statuses = (status,) if then is None else (status, -9)
    scene.end(job, statuses, says="stopped by SIG" if then is None else "", within=scene.bound_s)
    scene.finish(**values)


def stop_at_once(scene: Scene) -> None:
    """Before the ranks have met."""
    job = scene.start()
    time.sleep(scene.draw.uniform(0.5, 1.5))
    scene.note("before its first epoch")
    scene.send(job, "SIGTERM", "group")
    scene.end(job, (0, 143, -15), within=scene.bound_s)
    scene.finish()


def halt(scene: Scene, rank: int, phase: str, seconds: float | None) -> None:
    """SIGSTOP. Args: seconds: until it goes on; None: never."""
    job = scene.start(**PATIENCE)
    if scene.reach(job, phase, rank=rank):
        scene.send(job, "SIGSTOP", f"rank {rank}")
    if seconds is not None:
        time.sleep(seconds)
        scene.send(job, "SIGCONT", f"rank {rank}")
        scene.end(job)
        scene.finished = True
        return
    scene.end(job, (3,), rf"error: rank {1 - rank} has waited .* rank {rank} \(process .*halted", within=scene.bound_s)
    scene.finish()


def _kill(name: str, setting: Setting, target: str, phase: str, *, short: bool = False, times: int = 1) -> Case:
    return Case(name, setting, partial(kill, target=target, phase=phase, times=times), short=short)


def _stop(name: str, setting: Setting, names: str, target: str, phase: str, status: int = 0, **more) -> Case:
    short = more.pop("short", False)
    play = partial(stop, names=names, target=target, phase=phase, status=status, **more)
    return Case(name, setting, play, bound_s=90, short=short)


CASES = [
    _kill("SIGKILL of rank 0 in rollout", TWO, "rank 0", "rollout"),
    _kill("SIGKILL of rank 1 in update", TWO, "rank 1", "update"),
    _kill("SIGKILL of rank 1 in reward", TWO_EMA, "rank 1", "reward"),
    _kill("SIGKILL of rank 0 in checkpoint", TWO_LORA, "rank 0", "checkpoint", short=True),
    _kill("SIGKILL of rank 1 in evaluation", TWO_PLAIN, "rank 1", "evaluate"),
    _kill("SIGKILL of rank 1 in checkpoint, sharded", THREE, "rank 1", "checkpoint"),
    _kill("SIGKILL of rank 0 in update, offloaded", THREE_OFFLOAD, "rank 0", "update"),
    _kill("SIGKILL of the only rank in rollout", ONE, "rank 0", "rollout"),
    _kill("SIGKILL of the only rank in checkpoint", ONE_EMA, "rank 0", "checkpoint"),
    _kill("SIGKILL of the only rank in update", ONE_OFFLOAD, "rank 0", "update"),
    _kill("SIGKILL of the only rank in evaluation", ONE_LORA, "rank 0", "evaluate"),
    _kill("SIGKILL of the whole job in checkpoint", TWO, "group", "checkpoint"),
    _kill("SIGKILL of the whole job in update", TWO_EMA, "group", "update"),
    _kill("SIGKILL of the whole job three times in checkpoint", ONE_EMA, "group", "checkpoint", times=3),
    _kill("SIGKILL of the launcher in rollout", TWO_EMA, "launcher", "rollout"),
    _kill("SIGKILL of the launcher in checkpoint", TWO_PLAIN, "launcher", "checkpoint"),
    _kill("SIGKILL of the launcher in reward", TWO_LORA, "launcher", "reward"),
    _kill("SIGKILL of the launcher of one rank in update", ONE, "launcher", "update"),
    Case("SIGKILL of a rank three times, in three phases", TWO_PLAIN, kill_at_every_restart),
    Case("SIGKILL while a resumed job starts", ONE_EMA, kill_in_start, short=True),
    _stop("SIGTERM to rank 0 in rollout", TWO, "SIGTERM", "rank 0", "rollout"),
    _stop("SIGTERM to every rank in update", TWO_LORA, "SIGTERM", "ranks", "update"),
    _stop("SIGTERM to a rank in evaluation", TWO_PLAIN, "SIGTERM", "rank 1", "evaluate"),
    _stop("SIGTERM to a rank in checkpoint", TWO_EMA, "SIGTERM", "rank 0", "checkpoint"),
    _stop("SIGINT to every rank in rollout", TWO_PLAIN, "SIGINT", "ranks", "rollout", 130),
    _stop("SIGINT to rank 1 in reward", TWO_EMA, "SIGINT", "rank 1", "reward", 130),
    _stop("SIGHUP in evaluation", ONE_LORA, "SIGHUP", "rank 0", "evaluate"),
    _stop("SIGUSR1 in checkpoint", ONE_OFFLOAD, "SIGUSR1", "rank 0", "checkpoint", short=True),
    _stop("SIGUSR1 to rank 1 in update, sharded", THREE, "SIGUSR1", "rank 1", "update"),
    _stop("SIGTERM to every rank in rollout, offloaded", THREE_OFFLOAD, "SIGTERM", "ranks", "rollout"),
    _stop("SIGTERM and SIGINT in reward", TWO, "SIGTERM SIGINT", "rank 0", "reward"),
    _stop("SIGUSR1 twice in update", ONE, "SIGUSR1 SIGUSR1", "rank 0", "update"),
    _stop("SIGINT, SIGTERM and SIGHUP in checkpoint", TWO_LORA, "SIGINT SIGTERM SIGHUP", "ranks", "checkpoint", 130),
    _stop("SIGTERM, and SIGKILL a moment later", TWO_LORA, "SIGTERM", "ranks", "update", then=0.2),
    _stop(
        "SIGTERM to rank 0 while rank 1's reward hangs", TWO_EMA, "SIGTERM", "rank 0", "reward", epoch=1,
        fault='{"do": "hang", "call": 4, "rank": 1}',
    ),
    _stop(
        "SIGTERM to rank 1 whose reward hangs in an evaluation", TWO_PLAIN, "SIGTERM", "rank 1", "evaluate", epoch=2,
        fault='{"do": "hang", "call": 5, "rank": 1}',
    ),
    _stop(
        "SIGINT to rank 1 while its reward hangs in the background", TWO_LORA, "SIGINT", "rank 1", "reward", 130, epoch=1,
        fault='{"do": "hang", "call": 4, "rank": 1}', performance__background_rewards="on",
    ),
    _stop(
        "SIGINT to the only rank while its reward hangs in the background", ONE, "SIGINT", "rank 0", "reward", 130, epoch=1,
        fault='{"do": "hang", "call": 4}', performance__background_rewards="on",
    ),
    Case("SIGTERM before the first epoch", ONE, stop_at_once),
    Case("SIGSTOP of rank 1 for good", TWO, partial(halt, rank=1, phase="rollout", seconds=None), bound_s=90),
    Case("SIGSTOP of rank 0 for good, sharded", THREE, partial(halt, rank=0, phase="update", seconds=None), bound_s=90),
    Case("SIGSTOP of rank 1 for some seconds", TWO_PLAIN, partial(halt, rank=1, phase="update", seconds=4.0)),
]  # fmt: skip
