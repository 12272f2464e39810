"""What an epoch did, as numbers over all ranks. `core/metric_names.py` says what each of them is."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

from prdp_fast.core import distributed
from prdp_fast.training.update import Experience, UpdateReport

QUANTILES = (5, 25, 50, 75, 95)  # percent
MOST_SOURCES = 16  # of prompts; the most frequent ones


def epoch_metrics(experience: Experience, report: UpdateReport) -> dict[str, float]:
    """Numbers for a row of metrics.jsonl. Every rank calls this.

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
    of_ranks = distributed.gather_objects(
        {
            "names": (list(rewards), list(report.metrics)), "rewards": scores.total.tolist(), "sources": experience.sources,
            "peaks": report.by_step.peaks | peak_memory(), "means": report.by_step.means,
        }
    )  # fmt: skip
    reward_names, own_names = (agreed(one["names"][place] for one in of_ranks) for place in range(2))

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
    metrics |= quantiles([one["rewards"] for one in of_ranks], [one["sources"] for one in of_ranks])
    metrics |= {name: total / count for name, total, count in zip(own_names, totals, counts, strict=True)}
    metrics |= {f"reward_divisor/{name}": value for name, value in experience.divisors.items()}
    metrics["nonfinite_images"] = float(experience.nonfinite_images)
    metrics["free_first_pass"] = float(report.free_first_pass)
    return metrics | largest([one["peaks"] for one in of_ranks]) | means([one["means"] for one in of_ranks])


def agreed(lists: Iterable[list[str]]) -> list[str]:
    """The names that any rank has, in one order on every rank: rank 0's first."""
    return list(dict.fromkeys(name for names in lists for name in names))


def largest(of_ranks: list[Mapping[str, float]]) -> dict[str, float]:
    return {name: max(one[name] for one in of_ranks if name in one) for name in sorted(set().union(*of_ranks))}


def means(of_ranks: list[Mapping[str, tuple[float, float]]]) -> dict[str, float]:
    """Args: sums and counts."""
    found = {}
    for name in sorted(set().union(*of_ranks)):
        total, count = (sum(column) for column in zip(*(one[name] for one in of_ranks if name in one), strict=True))
        found[name] = total / count if count else math.nan
    return found


def quantiles(rewards: list[list[float]], sources: list[list[Any]]) -> dict[str, float]:
    """Of all ranks' images, and of those of each source. Args: lists of ranks; a rank without sources has an empty one."""
    found = {}
    values = np.array([value for of_rank in rewards for value in of_rank])
    finite = np.isfinite(values)
    groups = {"reward_quantile": finite}
    named = [
        source for own, of_rank in zip(sources, rewards, strict=True) for source in (own or [None] * len(of_rank))
    ]  # fmt: skip
    common = Counter(source for source in named if source is not None).most_common(MOST_SOURCES)
    for source in sorted(source for source, _ in common):
        groups[f"reward_quantile/{source}"] = finite & np.array([one == source for one in named])
    for name, chosen in groups.items():
        if chosen.any():
            for percent, value in zip(QUANTILES, np.percentile(values[chosen], QUANTILES), strict=True):
                found[f"{name}/q{percent:02d}"] = float(value)
    return found


def peak_memory() -> dict[str, float]:
    """Of this process since it started. Asks the allocator and the system, not the device."""
    found = {}
    if sys.platform != "win32":
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        found["memory/host_peak_bytes"] = float(unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    if torch.cuda.is_available():
        found["memory/device_peak_bytes"] = float(torch.cuda.max_memory_allocated())
    return found
