"""Run directories on disks that fill up or turn read-only, that are taken away, or that two jobs want."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from campaign import facts
from campaign.cases.signals import ONE, ONE_EMA, ONE_OFFLOAD, SLOW, TWO, TWO_EMA, TWO_LORA, TWO_PLAIN
from campaign.scene import Case, Scene
from campaign.settings import EPOCHS

BLOCK = 4096
VERY_SLOW = {"CAMPAIGN_FAULT": '{"do": "slow", "seconds": 2}'}  # so that the job lives until a second one has started


class NotHere(Exception):
    """This machine does not let the fault be made."""


def limit(scene: Scene, call: int, share: float, room_at: int | None, rank: int = 0) -> None:
    """A limit of file sizes stands for a disk that is full: Python and torch say the same of both.

    Args:
        call: of the reward, at which the room ends; the first epoch's is the third.
        share: of the largest file of a checkpoint that has room.
        room_at: the call at which there is room again; None: at the next start.
    """
    checkpoint = scene.reference() / f"checkpoints/epoch-{EPOCHS:06d}"
    most = max(path.stat().st_size for path in checkpoint.rglob("*.pt"))
    fault = {"do": "full", "call": call, "bytes": int(share * most), "rank": rank}
    if room_at is not None:
        fault["room_at"] = room_at
    scene.injected.append(f"files of rank {rank} end at {int(share * most):,} bytes from call {call} of the reward on")
    env = {"CAMPAIGN_FAULT": json.dumps(fault)}
    if room_at is not None:
        says = r"WARNING: checkpoint .* cannot be written .*training goes on, and tries again"
        scene.finish(env=env, says=says, evaluation__every=0)
        return
    job = scene.start(env=env, evaluation__every=0)
    scene.end(job, (2,), "error: ")
    scene.finish(evaluation__every=0)


@contextlib.contextmanager
def small_disk(scene: Scene, checkpoints: float) -> Iterator[Path]:
    """A tmpfs with room for a run and so many checkpoints. Raises: NotHere."""

    def size(folder: Path) -> int:
        return sum(-(-path.stat().st_size // BLOCK) * BLOCK for path in folder.rglob("*"))

    reference = scene.reference()
    one = size(reference / f"checkpoints/epoch-{EPOCHS:06d}")
    room = size(reference) - size(reference / "checkpoints") + int(checkpoints * one) + 64 * BLOCK
    place = scene.folder / "disk"
    place.mkdir()
    mount("-t", "tmpfs", "-o", f"size={room}", "tmpfs", str(place))
    scene.run = place / "run"
    scene.injected.append(f"a disk of {room:,} bytes, {checkpoints:g} checkpoints beside all else")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=False)


def mount(*words: str) -> None:
    made = subprocess.run(["mount", *words], capture_output=True, text=True, check=False)
    if made.returncode:
        raise NotHere(f"mount: {made.stderr.strip()[:80]}")


def full_disk(scene: Scene, checkpoints: float) -> None:
    """Only the first checkpoints have room. Then the disk grows, and the same command goes on."""
    with small_disk(scene, checkpoints) as place:
        scene.end(scene.start(), (2,), "WARNING: checkpoint .* cannot be written")
        mount("-o", "remount,size=1g", str(place))
        scene.finish()
        keep(scene)


def keep(scene: Scene) -> None:
    """Take the run off a disk that goes away."""
    shutil.copytree(scene.run, scene.folder / "run")
    scene.run = scene.folder / "run"


@contextlib.contextmanager
def protected(scene: Scene, folder: Path) -> Iterator[None]:
    """A folder that nothing can be written into, while the block runs. What is open stays so. Raises: NotHere."""
    mount("--bind", str(folder), str(folder))
    try:
        mount("-o", "remount,bind,ro", str(folder))
        scene.injected.append(f"{folder.relative_to(scene.folder)} is read-only")
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=False)


def read_only(scene: Scene) -> None:
    """The run directory turns read-only in mid-run, until the job has ended."""
    job = scene.start()
    if scene.reach(job, "rollout", epoch=1):
        with protected(scene, scene.run):
            scene.end(job, (2,), "(?i)error: .*read-only")
    scene.finish()


def read_only_for_a_while(scene: Scene, name: str, says: str) -> None:
    """Through a checkpoint and an evaluation. Args: name: of a folder in the run directory."""
    job = scene.start(env=SLOW)
    if scene.reach(job, "rollout", epoch=1):
        with protected(scene, scene.run / name):
            while facts.epochs(scene.run) < 3 and job.poll() is None:  # a file that is open is still written
                time.sleep(0.003)
    scene.end(job, (0,), says)
    scene.finished = True


def removed(scene: Scene, name: str) -> None:
    """A directory of the run is removed while it trains. The next start says what it begins from."""
    job = scene.start()
    if scene.reach(job, "update", epoch=2):
        shutil.rmtree(scene.run / name)
        scene.injected.append(f"{name}/ is removed")
    scene.end(job, (0, 2), within=60 + scene.bound_s)
    scene.lost.clear()  # whoever removes them loses them
    scene._seen = scene._whole = 0
    if scene.starts[-1].status != 0:
        scene.finish()
    scene.finished = True


def second_job(scene: Scene, at_once: bool) -> None:
    """Of two jobs in one directory one is refused, and the other does not notice."""
    first = scene.start(env=None if at_once else VERY_SLOW)
    if not at_once:
        scene.reach(first, scene.draw.choice(("rollout", "update", "checkpoint")))
    else:
        scene.note("at the same moment")
    began = scene._began
    second = scene.start()
    other = second.wait(300)
    scene._began, scene._whole = began, 0
    finished = scene.end(first, (0, 2) if at_once else (0,))
    statuses = sorted([other.returncode, finished.status or 0])
    refused = other.text if other.returncode else finished.text
    if statuses != [0, 2] or "is in use by a job" not in refused:
        scene.unexpected.append(f"of two jobs the statuses are {statuses}, expected one that is refused as the second")
    if "Traceback" in other.text:
        scene.unexpected.append("the second job shows a traceback")
    scene.finished = True
    if finished.status:
        finished.status, finished.text = other.returncode, finished.text + other.text


def locked_by_a_dead_job(scene: Scene) -> None:
    """A lock is no file that a killed job leaves behind."""
    job = scene.start()
    if scene.reach(job, "update"):
        scene.send(job, "SIGKILL", "group")
    scene.end(job, (-9,))
    if not (scene.run / ".lock").exists():
        scene.unexpected.append("there is no lock file")
    scene.finish()


CASES = [
    Case("disk full at one checkpoint, then room", ONE, partial(limit, call=4, share=0.5, room_at=5)),
    Case("disk full of rank 1 at one checkpoint", TWO, partial(limit, call=4, share=0.5, room_at=5, rank=1)),
    Case("disk full at one checkpoint with an average", ONE_EMA, partial(limit, call=5, share=0.3, room_at=6)),
    Case("disk full from the third epoch on", ONE_OFFLOAD, partial(limit, call=5, share=0.5, room_at=None)),
    Case("disk full of rank 0 from the second epoch on", TWO_EMA, partial(limit, call=4, share=0.2, room_at=None)),
    Case("disk full before evaluation_before.pt", ONE, partial(limit, call=2, share=0.004, room_at=None)),
    Case("a disk with room for one checkpoint", TWO, partial(full_disk, checkpoints=1.6)),
    Case("a disk with room for one checkpoint, 1 rank", ONE, partial(full_disk, checkpoints=1.3)),
    Case("a run directory that turns read-only", ONE, read_only),
    Case("a run directory that turns read-only, 2 ranks", TWO_LORA, read_only),
    Case("checkpoints/ that is read-only for a while", TWO_EMA, partial(
        read_only_for_a_while, name="checkpoints", says="WARNING: checkpoint .* cannot be written .*(?i:read-only)")),
    Case("tensorboard/ that is read-only for a while", TWO_PLAIN, partial(
        read_only_for_a_while, name="tensorboard", says="WARNING: .*tensorboard cannot be written")),
    Case("samples/ that is read-only for a while", TWO_LORA, partial(
        read_only_for_a_while, name="samples", says="WARNING: .*samples/epoch-000002.png cannot be written"), short=True),
    Case("a run directory that is read-only for a while", ONE_OFFLOAD, partial(
        read_only_for_a_while, name=".", says="WARNING: checkpoint .* cannot be written"), short=True),
    Case("checkpoints/ is removed in mid-run", TWO_PLAIN, partial(removed, name="checkpoints")),
    Case("ranks/ is removed in mid-run", TWO, partial(removed, name="ranks")),
    Case("a second job in the run directory", TWO_PLAIN, partial(second_job, at_once=False)),
    Case("a second job in the run directory, 1 rank", ONE, partial(second_job, at_once=False)),
    Case("two jobs in one directory at once, 2 ranks", TWO_EMA, partial(second_job, at_once=True)),
    Case("two jobs in one directory at once", ONE_EMA, partial(second_job, at_once=True), short=True),
    Case("the next job after one that was killed", TWO_PLAIN, locked_by_a_dead_job),
    Case("the next job after one that was killed, 1 rank", ONE_EMA, locked_by_a_dead_job),
]  # fmt: skip
