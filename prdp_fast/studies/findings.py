"""What a study found: each arm over its seeds, and each arm against the baseline, seed by seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prdp_fast.core.files import read_json
from prdp_fast.core.run_directory import SUMMARY
from prdp_fast.studies.declaration import Run, Study
from prdp_fast.studies.runner import failure_of, is_finished

# 97.5% quantiles of Student's t distribution with 1, 2, ... degrees of freedom: three seeds have two.
STUDENT_T = (
    12.706205, 4.302653, 3.182446, 2.776445, 2.570582, 2.446912, 2.364624, 2.306004, 2.262157, 2.228139, 2.200985, 2.178813,
    2.160369, 2.144787, 2.131450, 2.119905, 2.109816, 2.100922, 2.093024, 2.085963,
)  # fmt: skip
NORMAL = 1.959964


def over_seeds(values: Sequence[float]) -> dict[str, float]:
    """Mean, standard error and 95% t interval of one number a seed, as JSON. The interval of one seed is NaN."""
    kept = np.asarray([value for value in values if math.isfinite(value)], dtype=np.float64)
    count = len(kept)
    if count == 0:
        return {"mean": math.nan, "stderr": math.nan, "low": math.nan, "high": math.nan, "n": 0}
    mean = float(kept.mean())
    if count == 1:
        return {"mean": mean, "stderr": math.nan, "low": math.nan, "high": math.nan, "n": 1}
    error = float(kept.std(ddof=1)) / math.sqrt(count)
    quantile = STUDENT_T[count - 2] if count - 2 < len(STUDENT_T) else NORMAL
    return {"mean": mean, "stderr": error, "low": mean - quantile * error, "high": mean + quantile * error, "n": count}


def verdict(difference: dict[str, float]) -> str:
    """Of a difference to the baseline: higher or lower where its interval leaves 0 out."""
    if not (math.isfinite(difference["low"]) and math.isfinite(difference["high"])):
        return "too few seeds"
    if difference["low"] > 0:
        return "higher"
    return "lower" if difference["high"] < 0 else "not told apart"


def measurements(summary: dict[str, Any]) -> dict[str, dict[str, float]]:
    """By prompt set and reward: before, after and gain; of the trained reward under the set's own name.

    The share of images that are all right is measured too, where a reward gives verdicts.
    """
    found = {}
    for name, sets in summary["evaluation"].items():
        found[name] = values_of(sets)
        for reward, held in sets.get("held", {}).items():
            found[f"{name}, {reward} (held out)"] = values_of(held)
        if "strict" in sets["after"]:
            before, after = sets["before"]["strict"], sets["after"]["strict"]
            found[f"{name}, all right"] = {"before": before, "after": after, "gain": after - before}
    return found


def values_of(sets: dict[str, Any]) -> dict[str, float]:
    return {"before": sets["before"]["mean"], "after": sets["after"]["mean"], "gain": sets["difference"]["mean"]}


def collect(study: Study, runs: list[Run], output: Path) -> dict[str, Any]:
    """Everything that was found, as JSON.

    Returns: by arm, "seeds" (finished ones), "failures" by seed, "measured" by quantity (before, after and gain over the seeds;
        "against", the gain less the baseline's of the same seed, with its verdict) and what it cost over the seeds.
    """
    summaries: dict[str, dict[int, dict[str, Any]]] = {arm: {} for arm in dict.fromkeys(run.arm for run in runs)}
    failures: dict[str, dict[str, Any]] = {arm: {} for arm in summaries}
    for run in runs:
        if is_finished(output / run.name):
            summaries[run.arm][run.seed] = read_json(output / run.name / SUMMARY)
        elif (failure := failure_of(output, run)) is not None:
            failures[run.arm][str(run.seed)] = failure
    by_seed = {arm: {seed: measurements(summary) for seed, summary in of_arm.items()} for arm, of_arm in summaries.items()}
    arms = {}
    for arm, of_seeds in by_seed.items():
        quantities = dict.fromkeys(name for found in of_seeds.values() for name in found)
        arms[arm] = {
            "seeds": sorted(of_seeds), "failures": failures[arm], "cost": cost(list(summaries[arm].values())),
            "measured": {name: compare(name, of_seeds, by_seed[study.baseline]) for name in quantities},
        }  # fmt: skip
    return arms


def compare(name: str, own: dict[int, Any], baseline: dict[int, Any]) -> dict[str, Any]:
    """One quantity of an arm, and against the baseline's on the same seeds."""
    known = {seed: found[name] for seed, found in own.items() if name in found}
    found: dict[str, Any] = {
        moment: over_seeds([values[moment] for values in known.values()]) for moment in ("before", "after", "gain")
    }
    shared = [seed for seed in known if name in baseline.get(seed, {})]
    against: dict[str, Any] = over_seeds([known[seed]["gain"] - baseline[seed][name]["gain"] for seed in shared])
    return found | {"against": against | {"verdict": verdict(against)}}


def cost(summaries: list[dict[str, Any]]) -> dict[str, Any]:
    """Images (which are reward queries) and rows of the denoiser of a run, and its minutes, each the mean over the seeds."""
    if not summaries:
        return {}
    rows = [sum(summary["unet_forwards"].values()) for summary in summaries]
    return {
        "images": float(np.mean([summary["images"] for summary in summaries])), "denoiser_rows": float(np.mean(rows)),
        "minutes": float(np.mean([summary["wall_s"] / 60 for summary in summaries])),
    }  # fmt: skip
