"""The numbers of metrics.jsonl: every name, its unit, what it means, and when a row has it.

`docs/metrics.md` has this table word for word. A name in capitals stands for any that fits, NN and NNN for a number.
"""

from __future__ import annotations

import re
from functools import cache
from typing import NamedTuple

# In every row. It is raised when a name, a unit or a meaning changes; a new name does not raise it.
SCHEMA = 1


class Metric(NamedTuple):
    name: str
    unit: str
    meaning: str
    when: str = "always"


PRDP, PPO = "PRDP", "DDPO, DPOK, GRPO"
REFERENCE = "where there is a reference, from the second epoch on"
SEVERAL = "more than one update an epoch"
METRICS = (
    Metric("schema", "", "version of this table"),
    Metric("epoch", "epochs", "number of the epoch, from 0"),
    # Rewards.
    Metric("reward", "", "mean total reward over the images of all ranks that have one, normalised as the objective sees it"),
    Metric("reward_std", "", "its standard deviation over the same images"),
    Metric("reward/NAME", "", "mean of one reward, or of a detail that it gives, not normalised"),
    Metric("reward_quantile/qNN", "", "quantile of the total reward over the images of all ranks: 5, 25, 50, 75, 95 %"),
    Metric(
        "reward_quantile/SOURCE/qNN", "", "the same over the prompts of one source: `source`, or else `part`, of their metadata",
        "prompts have a source; at most 16",
    ),
    Metric("reward_divisor/NAME", "", "what a reward with `normalise` was divided by", "such a reward"),
    Metric("unscored", "images", "without a reward, over all ranks: they are left out", "from one on"),
    Metric("nonfinite_images", "images", "that came out NaN or infinite, over all ranks: they have no reward"),
    # The update.
    Metric("loss", "", "the objective's loss"),
    Metric("grad_norm", "", "global norm of the gradient before it is scaled down"),
    Metric("skipped_updates", "updates", "without a finite gradient, which were not applied"),
    Metric("log_prob", "nats", "mean log-prob of a sampled step under the policy, a mean over the elements of the latent"),
    Metric("kl_to_reference", "nats", "mean log-ratio of policy to reference, of a step", "where there is a reference"),
    Metric("kl_to_reference/step_NNN", "nats", "the same of one step of the sampler, in the last update", REFERENCE),
    Metric("clip_fraction", "share", "of steps whose ratio to the start of the epoch is out of the clip range", f"{PRDP}, {PPO}"),
    Metric("clip_fraction/step_NNN", "share", "the same of one step of the sampler", f"{PRDP}, {PPO}; {SEVERAL}"),
    Metric("ratio/step_NNN", "nats", "largest log-ratio of one step to the start of the epoch, without its sign", SEVERAL),
    Metric("drift", "nats", "largest difference between sampler's and trainer's log-prob of a step, a mean over ranks"),
    Metric("drift/step_NNN", "nats", "the same of one step of the sampler, the largest of all ranks"),
    Metric("first_ratio_error", "nats", "largest error of a log-ratio in the first update, where it should be 0"),
    Metric("free_first_pass", "0 or 1", "whether the rollout's own log-probs served as those of the first update"),
    Metric(
        "reference_weight_error", "share", "estimated error of the weights by `schedule.reference_timesteps`",
        "`schedule.reference_timesteps` leaves steps out",
    ),
    # Of objectives.
    Metric("pairs", "pairs", "of images with different rewards, on one rank", PRDP),
    Metric("groups_without_pair", "prompts", "whose images all have the same reward, on one rank", PRDP),
    Metric("dropped_images", "images", "without a reward, on one rank", "all objectives"),
    Metric("clipped_pairs", "share", "of pairs whose error is that of the clipped log-ratios", PRDP),
    Metric("mean_log_ratio", "nats", "mean log-ratio of a trajectory to the reference", f"{PRDP}, REBEL"),
    Metric("pair_accuracy", "share", "of pairs whose log-ratios are in the order of their rewards", PRDP),
    Metric("mean_abs_target", "nats", "mean difference of rewards of a pair over beta", PRDP),
    Metric("mean_abs_advantage", "", "mean absolute advantage", PPO),
    Metric("kl_penalty", "", "the term of the KL divergence in the loss", "DPOK, GRPO with `objective.kl_weight`"),
    Metric("largest_share", "share", "mean weight of the best image of a prompt", "RWR"),
    # The machine and the data.
    Metric("images_per_s", "images/s", "sampled and trained on, over all ranks, evaluations and checkpoints left out"),
    Metric("seconds/PHASE", "s", "of rank 0 in a phase, since the row before"),
    Metric("memory/host_peak_bytes", "bytes", "most resident memory of a rank since it started, the largest of all ranks"),
    Metric("memory/device_peak_bytes", "bytes", "most memory of tensors on a rank's GPU since it started, likewise", "on a GPU"),
    Metric("position/pass", "passes", "finished passes over the prompts, at the end of the epoch"),
    Metric("position/prompt", "prompts", "of the pass after those, that have been drawn"),
    Metric("skipped_shards", "shards", "of the trained set that are damaged and left out", "`prompts.on_corrupt: skip`"),
)  # fmt: skip


@cache
def _patterns() -> list[tuple[re.Pattern[str], Metric]]:
    """Plain names first, then those with fewer parts that may be anything."""
    found = []
    for metric in METRICS:
        parts = re.split(r"([A-Z]{2,})", metric.name)
        pattern = "".join(
            re.escape(part) if number % 2 == 0 else r"\d+" if set(part) == {"N"} else ".+" for number, part in enumerate(parts)
        )
        found.append((len(parts), re.compile(pattern), metric))
    return [(pattern, metric) for _, pattern, metric in sorted(found, key=lambda one: one[0])]


def find(name: str) -> Metric | None:
    """What a name of a row means; None if the table does not have it."""
    return next((metric for pattern, metric in _patterns() if pattern.fullmatch(name)), None)


def describe(name: str) -> str:
    """A line about what stands before a name's first slash: its own metric's meaning, or that of the first one inside."""
    first = name.partition("/")[0]
    metric = find(first) or find(name)
    if metric is None:
        return first
    return f"{metric.meaning} ({metric.unit})" if metric.unit else metric.meaning


def table() -> str:
    """Markdown."""
    head = "| name | unit | meaning | when |\n|---|---|---|---|\n"
    return head + "".join(f"| `{metric.name}` | {metric.unit} | {metric.meaning} | {metric.when} |\n" for metric in METRICS)
