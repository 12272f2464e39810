"""What an epoch did, as numbers over all ranks."""

from __future__ import annotations

from prdp_fast.core import distributed
from prdp_fast.training.update import Experience, UpdateReport


def epoch_metrics(experience: Experience, report: UpdateReport) -> dict[str, float]:
    """A row of metrics.jsonl. Every rank calls this.

    Means over the ranks: rewards over images with a score, everything else over ranks.
    """
    scores, own = experience.scores, report.metrics
    local = {"reward": scores.total} | {f"reward/{name}": part for name, part in (scores.parts | scores.details).items()}
    sums = []
    for values in local.values():
        finite = values[values.isfinite()].double()
        sums += [float(finite.sum()), float(finite.square().sum()), float(len(finite))]
    reduced = distributed.all_reduce(sums + [*own.values(), 1.0], "sum")
    metrics = {}
    for number, name in enumerate(local):
        total, squares, count = reduced[3 * number : 3 * number + 3]
        metrics[name] = total / max(count, 1.0)
        if name == "reward":
            metrics["reward_std"] = max(squares / max(count, 1.0) - metrics[name] ** 2, 0.0) ** 0.5
    ranks = reduced[-1]
    metrics |= {name: value / ranks for name, value in zip(own, reduced[3 * len(local) : -1], strict=True)}
    metrics |= {f"reward_divisor/{name}": value for name, value in experience.divisors.items()}
    metrics["free_first_pass"] = float(report.free_first_pass)
    if report.drift_by_step is not None:
        metrics |= {f"drift/step_{step:03d}": float(value) for step, value in enumerate(report.drift_by_step)}
    return metrics
