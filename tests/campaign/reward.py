"""The reward of the campaign's jobs: a user's file, which does what the variable CAMPAIGN_FAULT says.

It holds JSON: `do`; for what happens once `call`, the number of the call in this process from 1 on; and `rank` of a single one.
An evaluation before training is two calls, so the first epoch's is the third.
"""

import json
import os
import resource
import time

FAULT = json.loads(os.environ.get("CAMPAIGN_FAULT", "{}"))
RANK = int(os.environ.get("RANK", "0"))
calls = 0


def score(images, prompts):
    global calls
    calls += 1
    if FAULT and FAULT.get("rank", RANK) == RANK:
        if calls == FAULT.get("call", calls):
            happen(FAULT["do"])
        if calls == FAULT.get("room_at"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    scores = images.double().mean((1, 2, 3)).div(255).float()
    return changed(scores, images, prompts)


def happen(what):
    """Before an answer, or instead of one."""
    if what == "raise":
        raise KeyError("boom")
    if what == "hang":
        time.sleep(600)
    if what == "slow":
        time.sleep(FAULT["seconds"])
    if what == "exit":
        raise SystemExit(0)
    if what == "leave":
        os._exit(0)
    if what == "empty":
        open(FAULT["path"], "w").close()
    if what == "full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (FAULT["bytes"], resource.RLIM_INFINITY))


def changed(scores, images, prompts):
    """The answer, or what is given for it. Which images are hit depends on them alone, so that a resumed run hits the same."""
    what, now = FAULT.get("do"), calls == FAULT.get("call", calls)
    if what == "nan of some":
        scores[images.long().sum((1, 2, 3)) % 3 == 0] = float("nan")
    if what == "nan of a prompt" and len(set(prompts)) > 1:
        for number, prompt in enumerate(prompts):
            if prompt == max(prompts):
                scores[number] = float("nan")
    if what == "nan of all" and now:
        scores[:] = float("nan")
    if what == "huge" and now:
        return [1e39] * len(scores)
    if what == "large" and now:
        return scores.double() * 1e38
    if what == "text" and now:
        return ["good"] * len(scores)
    if what == "too few" and now:
        return scores[:-1]
    return scores
