"""What an epoch did, as numbers over all ranks."""

from __future__ import annotations

import math

from prdp_fast.core import distributed
from prdp_fast.training.update import Experience, UpdateReport


def epoch_metrics(experience: Experience, report: UpdateReport) -> dict[str, float]:
    """A row of metrics.jsonl. Every rank calls this.

    Means over the ranks: rewards over images with a score, NaN if there is none; everything else over the ranks that have it. A
    reward may give details on some ranks only, so that names are agreed upon before numbers are reduced. "unscored" counts the
    images without a reward, which are left out; it is there from one on.
    """
    scores = experience.scores
    rewards = {"reward": scores.total} | {f"reward/{name}": part for name, part in (scores.parts | scores.details).items()}
    moments = {}
    for name, values in rewards.items():
        finite = values[values.isfinite()].double()
        moments[name] = [float(finite.sum()), float(finite.square().sum()), float(len(finite))]
    reward_names, own_names = agree_on_names(list(rewards), list(report.metrics))

    sums = [number for name in reward_names for number in moments.get(name, [0.0, 0.0, 0.0])]
    own = [number for name in own_names for number in ((report.metrics[name], 1.0) if name in report.metrics else (0.0, 0.0))]
    *reduced, images = distributed.all_reduce([*sums, *own, float(len(scores.total))], "sum")
    metrics = {}
    for number, name in enumerate(reward_names):
        total, squares, count = reduced[3 * number : 3 * number + 3]
        metrics[name] = total / count if count else math.nan
        if name == "reward":
            metrics["reward_std"] = max(squares / max(count, 1.0) - metrics[name] ** 2, 0.0) ** 0.5
    totals, counts = reduced[len(sums) :: 2], reduced[len(sums) + 1 :: 2]
    scored = reduced[3 * reward_names.index("reward") + 2]
    if unscored := round(images - scored):
        metrics["unscored"] = float(unscored)
    metrics |= {name: total / count for name, total, count in zip(own_names, totals, counts, strict=True)}
    metrics |= {f"reward_divisor/{name}": value for name, value in experience.divisors.items()}
    metrics["nonfinite_images"] = float(experience.nonfinite_images)
    metrics["free_first_pass"] = float(report.free_first_pass)
    metrics |= {f"drift/step_{step:03d}": value for step, value in report.drift_by_step.items()}
    return metrics


def agree_on_names(*lists: list[str]) -> list[list[str]]:
    """For each list the names that any rank has in it, in one order on every rank: rank 0's first. Every rank calls this."""
    of_ranks = distributed.gather_objects(lists)
    return [list(dict.fromkeys(name for names in of_list for name in names)) for of_list in zip(*of_ranks, strict=True)]
