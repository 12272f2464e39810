"""Runs that go on with other ranks, or another ZeRO stage, than they began with. A move is one line of MOVES."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from campaign.scene import Case, Scene
from campaign.settings import Setting

# From what, and to what. Of both `rounded` is set by `_case`.
MOVES: tuple[tuple[Setting, Setting], ...] = (
    (Setting(2, 2), Setting(1, 2)),
    (Setting(1, 0), Setting(2, 3)),
    (Setting(2, 1, ema=True), Setting(2, 0, ema=True)),
    (Setting(2, 3), Setting(1, 3, offload=True)),
    (Setting(2, 2, lora=True, ema=True), Setting(1, 1, lora=True, ema=True)),
    (Setting(1, 2, offload=True), Setting(2, 2)),
)


def move(scene: Scene, to: Setting) -> None:
    """The whole job is killed at a moment of a phase, and started again under `to`."""
    job = scene.start()
    if scene.reach(job, scene.draw.choice(("rollout", "update", "checkpoint"))):
        scene.send(job, "SIGKILL", "group")
    scene.end(job, (-9,))
    scene.end(scene.start(setting=to), says="equal to rounding, not to the bit")
    scene.finished = True


def _case(first: Setting, then: Setting) -> Case:
    first, then = replace(first, rounded=True), replace(then, rounded=True)
    return Case(f"the whole job killed; goes on with {then}", first, partial(move, to=then), compare="rounding")


CASES = [_case(first, then) for first, then in MOVES]
