"""Rewards that fail, hang, leave, or answer with numbers that nothing can be learnt from; and a recipe of that kind."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

from campaign.cases.signals import ONE, ONE_EMA, ONE_LORA, ONE_OFFLOAD, THREE, TWO, TWO_EMA, TWO_LORA, TWO_PLAIN
from campaign.scene import Case, Scene

ONCE = {"schedule__reward_timeout_s": 5, "schedule__collective_timeout_minutes": 0.5}


def fails(scene: Scene, *, says: str, status: int = 2, on_the_way: bool = True, **fault: object) -> None:
    """The run stops with one line, finished epochs saved; mended, the same command goes on.

    Args: on_the_way: in an epoch drawn from the seed; the fault has no `call` of its own.
    """
    if on_the_way:
        fault["call"] = scene.draw.randrange(4, 6)  # the second epoch or the third
    scene.injected.append(", ".join(f"{name} {value}" for name, value in fault.items()))
    job = scene.start(env={"CAMPAIGN_FAULT": json.dumps(fault)}, **ONCE, checkpoint__every=100, evaluation__every=0)
    start = scene.end(job, (status,), says, within=180 + scene.bound_s)
    lines = [line for line in start.text.splitlines() if line.startswith("error: ")]
    if len(lines) != 1:
        scene.unexpected.append(f"{len(lines)} lines of errors, expected one")
    scene.finish(evaluation__every=0)


def repeated(scene: Scene, **fault: object) -> None:
    """One call fails, and schedule.on_failure=repeat makes the epoch again."""
    fault["call"] = scene.draw.randrange(4, 6)
    scene.injected.append(", ".join(f"{name} {value}" for name, value in fault.items()))
    env = {"CAMPAIGN_FAULT": json.dumps(fault)}
    scene.finish(env=env, says="repeating it, 1 of 3", schedule__on_failure="repeat", evaluation__every=0, **ONCE)


def always(scene: Scene) -> None:
    """Some rewards are NaN in every epoch: the run goes on, and after a kill it ends as one without it."""
    job = scene.start()
    if scene.reach(job, scene.draw.choice(("rollout", "update", "checkpoint"))):
        scene.send(job, "SIGKILL", "group")
    scene.end(job, (-9,))
    scene.finish()


def tiny_kl_weight(scene: Scene) -> None:
    """The target of the loss is beyond float32: one line, and nothing is saved that is not finite."""
    scene.injected.append("objective.kl_weight 1e-300")
    scene.end(scene.start(objective__kl_weight=1e-300), (2,), "error: .*objective.kl_weight")
    if (scene.run / "model").exists():
        scene.untold.append("a model was exported")


SOME, GROUP = json.dumps({"do": "nan of some"}), json.dumps({"do": "nan of a prompt"})
LARGE = "error: .*lower rewards.0.weight"
PYTHON = r"error: reward 'python': .* \(on rank 1\)"
CASES = [
    Case("a reward raises on one rank", TWO_LORA, partial(fails, says=PYTHON, do="raise", rank=1)),
    Case("a reward raises", ONE_EMA, partial(fails, says="error: .*KeyError: 'boom'", do="raise")),
    Case("a reward hangs on one rank", TWO_EMA, partial(fails, says="error: .*within 5 s", do="hang", rank=1)),
    Case("a reward hangs on every rank", TWO_PLAIN, partial(fails, says="error: .*within 5 s", do="hang")),
    Case("a reward hangs", ONE_OFFLOAD, partial(fails, says="error: .*within 5 s", do="hang"), short=True),
    Case("a reward calls sys.exit(0) on one rank", TWO, partial(fails, says=PYTHON, do="exit", rank=1)),
    Case("a reward calls sys.exit(0)", ONE, partial(fails, says="error: .*SystemExit: 0", do="exit")),
    Case("a reward calls os._exit(0) on one rank", TWO_LORA, partial(
        fails, says=r"error: rank 1 of 2 .*ended without a word in phase reward", status=1, do="leave", rank=1), short=True),
    Case("a reward answers NaN for some images", replace(TWO, fault=SOME), always),
    Case("a reward answers NaN for a prompt", replace(TWO_PLAIN, fault=GROUP), always),
    Case("a reward answers NaN for every image", TWO_EMA, partial(fails, says="NaN or infinity for all", do="nan of all")),
    Case("a reward answers 1e39", ONE, partial(fails, says="error: .*", do="huge")),
    Case("a reward answers 1e39 on every rank, sharded", THREE, partial(fails, says="error: .*", do="huge")),
    Case("a reward answers 1e38", ONE_EMA, partial(fails, says=LARGE, do="large")),
    Case("a reward answers 1e38 on one rank", TWO_PLAIN, partial(fails, says=LARGE, do="large", rank=1)),
    Case("a reward answers with words", ONE_OFFLOAD, partial(fails, says="error: .*", do="text")),
    Case("a reward answers too few numbers on one rank", TWO_LORA, partial(fails, says="error: .*", do="too few", rank=1)),
    Case("a reward raises once, and the epoch is repeated", TWO, partial(repeated, do="raise", rank=1)),
    Case("a reward hangs once, and the epoch is repeated", ONE, partial(repeated, do="hang")),
    Case("objective.kl_weight 1e-300", TWO, tiny_kl_weight, compare="no"),
    Case("objective.kl_weight 1e-300 on one rank", ONE_LORA, tiny_kl_weight, compare="no"),
]  # fmt: skip
