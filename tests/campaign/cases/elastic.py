"""Runs that go on with other ranks, or another ZeRO stage, than they began with. A move is one line of MOVES."""

from __future__ import annotations

from functools import partial

from campaign.scene import Case, Scene
from campaign.settings import Setting

# From what, and to what. Of both `rounded` is set by `_case`.
MOVES: tuple[tuple[Setting, Setting], ...] = ()


def move(scene: Scene, to: Setting) -> None:
    """The whole job is killed at a moment of a phase, and started again under `to`."""
    job = scene.start()
    if scene.reach(job, scene.draw.choice(("rollout", "update", "checkpoint"))):
        scene.send(job, "SIGKILL", "group")
    scene.end(job, (-9,))
    scene.end(scene.start(setting=to))
    scene.finished = True


def _case(first: Setting, then: Setting) -> Case:
    return Case(f"goes on as {then} (from {first})", first, partial(move, to=then), compare="rounding")


CASES = [_case(first, then) for first, then in MOVES]
