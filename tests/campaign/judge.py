"""The verdicts of a case, each a list of what was found: none is good."""

from __future__ import annotations

from campaign import facts
from campaign.scene import Case, Scene
from campaign.settings import RATE

VERDICTS = ("lost", "silent", "hung", "traceback", "differs", "unexpected")
HEADINGS = {
    "lost": "lost checkpoints", "silent": "silent corruptions", "hung": "hangs", "traceback": "tracebacks",
    "differs": "resumed runs that differ", "unexpected": "otherwise than documented",
}  # fmt: skip


def judge(case: Case, scene: Scene) -> dict[str, list[str]]:
    return {
        "lost": scene.lost,
        "silent": silent(scene),
        "hung": scene.hung,
        "traceback": tracebacks(case, scene),
        "differs": differs(case, scene),
        "unexpected": scene.unexpected,
    }


def tracebacks(case: Case, scene: Scene) -> list[str]:
    if not case.mendable:
        return []
    return [f"start {n} shows a traceback" for n, one in enumerate(scene.starts, 1) if "Traceback" in one.text]


def silent(scene: Scene) -> list[str]:
    """Damage that no line names, and a run that ended well with a damaged checkpoint or without numbers."""
    found = list(scene.untold)
    for name, number in scene.told_by.items():
        if not any(name in one.text for one in scene.starts[number:]):
            found.append(f"no line names {name}")
    if scene.finished and scene.starts[-1].status == 0:
        for path in facts.checkpoints(scene.run).values():
            if fault := facts.fault_of(path):
                found.append(f"{path.name} is not whole ({fault}), and the run ended well")
        if any(not tensor.isfinite().all() for tensor in facts.weights(scene.run).values()):
            found.append("weights that are not finite were exported")
    return found


def differs(case: Case, scene: Scene) -> list[str]:
    """From a run that nothing was done to."""
    if case.compare == "no" or not scene.starts:
        return []
    if not scene.finished:
        return ["it never came to its end"]
    if scene.starts[-1].status != 0:
        return []  # told by the status already, or by a hang
    found = facts.difference(scene.run, scene.reference(), rate=RATE if case.compare == "rounding" else None)
    return [found] if found else []
