"""The directory of a run: what is in it, and whether a job may use it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prdp_fast.core.errors import UserError
from prdp_fast.core.files import partial_path, read_json, write_json
from prdp_fast.core.paths import check_output, shortened, told
from prdp_fast.core.ranks import RANKS
from prdp_fast.core.run_lock import LOCK, lock

RUN = "run.json"  # the job: resolved recipe, DeepSpeed configuration, ranks, digests of what it reads, versions
BEGINNING = {LOCK, partial_path(Path(RUN)).name}  # what a job puts there first, and leaves if it is killed at that moment
SUMMARY = "summary.json"  # of a finished run
METRICS = "metrics.jsonl"
MESSAGES = "messages.txt"  # what the run told its user, with the time
TENSORBOARD = "tensorboard"
TRACKERS = "trackers"  # what each tracker has been sent
ACCELERATION = "acceleration.json"  # what was chosen when the run first started
CHECKPOINTS = "checkpoints"
SAMPLES = "samples"
COMPARISON = "samples/before_after.png"
EXPORT = "model"
EVALUATION = "evaluation"  # what `prdp evaluate` found
EVALUATION_BEFORE, EVALUATION_AFTER = "evaluation_before.pt", "evaluation_after.pt"

# What a resumed run may change: how long it goes on, what it keeps, and what decides about memory and speed alone, whose results
# differ by rounding, and where its numbers go. Never what an epoch computes: the recipe's mathematics, and the precision
# that they are computed in. A section stands for all that is in it.
MAY_CHANGE = (
    "schedule.epochs", "schedule.time_limit_minutes", "schedule.on_failure", "schedule.max_repeats",
    "schedule.reward_timeout_s", "schedule.stop_after", "schedule.collective_timeout_minutes", "schedule.max_skipped_updates",
    "schedule.max_nonfinite_epochs", "schedule.micro_batch", "sampler.rollout_batch", "performance.activation_checkpointing",
    "checkpoint.every", "checkpoint.keep", "checkpoint.keep_every", "checkpoint.keep_best", "checkpoint.async_save",
    "model.push_to_hub", "performance.coalesce_gradients", "tracking", "prompts.cache_dir", "prompts.cache_gb",
    "prompts.fetch_timeout_s", "evaluation.on_over_optimised",
)  # fmt: skip
# Of these, what other sums come of: the user is told.
ROUNDS = ("schedule.micro_batch", "sampler.rollout_batch", "performance.coalesce_gradients")
# How a job is spread over ranks and devices may change likewise: a checkpoint is resharded. Not what rounds to fewer bits.
SPREAD, QUANTISED = "deepspeed.zero_optimization", "deepspeed.zero_optimization.zero_quantized"
# They follow from the micro-batch, the ranks, the stage and the precision, and from settings that may not change and are compared
# by their own names.
DERIVED = (
    "deepspeed.train_micro_batch_size_per_gpu", "deepspeed.gradient_accumulation_steps", "deepspeed.bf16.check_grad_overflow",
    "deepspeed.steps_per_print",
)  # fmt: skip


# What the record holds beside what the job is: digests of the files that it reads, versions of libraries, and the machine.
CONTENT, VERSIONS, EARLIER_VERSIONS = "content", "versions", "earlier_versions"
MACHINE = "machine"  # processor and accelerator of the last start, without its name
FILES, FOLDERS = (
    (METRICS, MESSAGES, SUMMARY, ACCELERATION, EVALUATION_BEFORE, EVALUATION_AFTER),
    (CHECKPOINTS, SAMPLES, EXPORT, TENSORBOARD, TRACKERS, RANKS),
)


def claim(
    directory: Path, job: dict[str, Any], resume: str, *, complete: Callable[[dict[str, Any]], dict[str, Any]] = lambda old: old
) -> list[str]:
    """Make `directory` this job's, or refuse it. It stays this process's until the process ends, whatever ends it.

    Args:
        job: resolved recipe, DeepSpeed configuration and rank count, as JSON; CONTENT and VERSIONS, if they are known.
        resume: "never" wants a directory without a run; anything else continues the same job's run.
        complete: fills in what the record of an earlier version of this program did not have yet.
    Returns: lines for the user: what is otherwise than when the run started, and does not make it another run.
    Raises: UserError; nothing in the directory is touched then.
    """
    check_output("--output", directory)
    job = json.loads(json.dumps(job))
    with told(f"--output {shortened(directory)} cannot be used", "name a directory that can be written"):
        check(directory, job, resume, complete)
        directory.mkdir(parents=True, exist_ok=True)
        lock(directory)
        earlier, damage = check(directory, job, resume, complete)  # again: another job may have come first
        if earlier is None:
            write_json(directory / RUN, job)
            return [f"{RUN} was damaged ({damage}) and is written again: the run had not begun"] if damage else []
        notes, versions = version_notes(earlier, job)
        notes = spread_notes(complete(earlier), job) + notes
        write_json(directory / RUN, job | versions)
        return notes


def check(
    directory: Path, job: dict[str, Any], resume: str, complete: Callable[[dict[str, Any]], dict[str, Any]]
) -> tuple[dict[str, Any] | None, str]:
    """The record of the run that is there, None if none has begun; and what is wrong with a damaged one.

    Raises: UserError if the directory is not for this job.
    """
    record, another = directory / RUN, "choose another directory"
    # One look: another job may be putting its files there, and its lock, not this, decides about that.
    names = set(os.listdir(directory)) if directory.is_dir() else set()
    if RUN not in names:
        if names - BEGINNING:
            raise UserError(f"--output {directory} is not empty and holds no run of prdp_fast; choose a new directory")
        return None, ""
    if resume == "never":
        raise UserError(f"--output {directory} holds a run already; {another}, or continue it with --resume auto")
    earlier, damage = read_record(record)
    check_kinds(directory)
    if earlier is None:
        # Nothing computed: the record can be made again. Otherwise nobody can tell whether this is the same job.
        if (directory / METRICS).exists() or any((directory / CHECKPOINTS).glob("epoch-*")):
            raise UserError(
                f"{record} is damaged ({damage}), and says which job the run is; put it back from a copy, or {another}"
            )
        return None, damage
    refuse_another(directory, complete(earlier), job)
    return earlier, ""


def read_record(path: Path) -> tuple[dict[str, Any] | None, str]:
    """A run's record; None and why not, if it is damaged. Raises: OSError."""
    try:
        value = read_json(path)
    except ValueError as error:
        return None, "it is empty" if not path.stat().st_size else str(error)
    if not isinstance(value, dict) or not isinstance(value.get("recipe"), dict):
        return None, "it holds no recipe"
    return value, ""


def check_kinds(directory: Path) -> None:
    """Raises: UserError if a directory stands where the run writes a file, or the other way round. Links count as what they lead
    to; one that leads nowhere is neither."""
    for name in FILES:
        if (directory / name).is_dir():
            raise UserError(f"{directory / name} is a directory, and the run writes a file there; remove it, or move it away")
    for name in FOLDERS:
        if os.path.lexists(directory / name) and not (directory / name).is_dir():
            raise UserError(f"{directory / name} is no directory, and the run needs one there; remove it, or move it away")


def refuse_another(directory: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Raises: UserError if the records are of two jobs. What decides the rest is compared first."""
    computed, wanted = precision(old), precision(new)
    if computed != wanted:
        section = {"bfloat16": "bf16", "float16": "fp16"}.get(computed)
        mend = f'"{section}": {{"enabled": true}}' if section else '"bf16": {"enabled": false}'
        raise UserError(
            f"--output {directory}: this run computes in {computed}, now {wanted}, which is more than rounding of what it has; "
            f"write {mend} into --config, or choose another directory"
        )
    contents = {CONTENT, VERSIONS, EARLIER_VERSIONS, MACHINE, "prompts"}
    for section in ("recipe", *sorted((old.keys() | new.keys()) - contents - {"recipe", "world_size"})):
        difference = first_difference(old.get(section), new.get(section), section)
        if difference:
            raise UserError(
                f"--output {directory} holds another run: {difference}; choose another directory, or give the same job"
            )
    found = [("prompts.source", old.get("prompts"), new.get("prompts"))]
    kept = old.get(CONTENT)
    if isinstance(kept, dict):  # runs of earlier versions have none
        found += [(name, kept.get(name), digest) for name, digest in new.get(CONTENT, {}).items()]
    for name, was, digest in found:
        if was is not None and was != digest:
            raise UserError(
                f"--output {directory}: the content of {name} is not what the run started with (SHA-256 was {was}..., now "
                f"{digest}...); put the earlier files back, or choose another directory"
            )


def precision(job: dict[str, Any]) -> str:
    """That a job computes in, by its DeepSpeed configuration."""
    config = job.get("deepspeed")
    on = [
        name for section, name in (("bf16", "bfloat16"), ("fp16", "float16"))
        if isinstance(config, dict) and isinstance(config.get(section), dict) and config[section].get("enabled")
    ]  # fmt: skip
    return on[0] if on else "float32"


def spread_notes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """A line if a run that goes on is spread otherwise over ranks and devices, or computed in other portions."""
    ranks, own = old.get("world_size"), new.get("world_size")
    changed = [f"on {own} rank{'s' * (own != 1)} instead of {ranks}"] if isinstance(ranks, int) and ranks != own else []
    before, after = (flat(job.get("deepspeed", {}).get("zero_optimization", {})) for job in (old, new))
    for key in sorted(before.keys() | after.keys(), key=lambda key: (key != "stage", key)):
        if before.get(key) != after.get(key):
            name = "at ZeRO stage" if key == "stage" else f"with {key}"
            changed.append(f"{name} {spoken(after.get(key))} instead of {spoken(before.get(key))}")
    before, after = (flat(job.get("recipe", {})) for job in (old, new))
    changed += [
        f"with {key} {spoken(after.get(key))} instead of {spoken(before.get(key))}" for key in ROUNDS
        if before.get(key) != after.get(key)
    ]  # fmt: skip
    return [f"continuing {', '.join(changed)}: equal to rounding, not to the bit"] if changed else []


def flat(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by their dotted names."""
    found: dict[str, Any] = {}
    for key, value in section.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def spoken(value: Any) -> str:
    return "none" if value is None else value if isinstance(value, str) else json.dumps(value)


def version_notes(old: dict[str, Any], new: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """A line if libraries have changed since the last start; and what the record says of versions beside the new ones."""
    was, now, earlier = old.get(VERSIONS), new.get(VERSIONS), old.get(EARLIER_VERSIONS)
    earlier = earlier if isinstance(earlier, list) else []
    notes = []
    if isinstance(was, dict) and isinstance(now, dict) and was != now:
        changed = [
            f"{name} {was.get(name) or 'none'} > {now.get(name) or 'none'}" for name in sorted(was.keys() | now.keys())
            if was.get(name) != now.get(name)
        ]  # fmt: skip
        notes.append(f"versions have changed since the run's last start, and results may round differently: {', '.join(changed)}")
        earlier = [*earlier, was]
    return notes, {EARLIER_VERSIONS: earlier} if earlier else {}


def finished_epochs(directory: Path) -> int | None:
    """Of a run that came to an end, by its summary; None of one that did not, or whose summary is damaged."""
    try:
        epochs = read_json(directory / SUMMARY)["epochs"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return epochs if isinstance(epochs, int) else None


def read_acceleration(directory: Path) -> tuple[dict[str, Any], bool]:
    """What was chosen when the run first started, empty if nothing is known; and whether the file is damaged."""
    path = directory / ACCELERATION
    if not path.exists():
        return {}, False
    try:
        found = read_json(path)
        usable = isinstance(found, dict) and all(isinstance(one["value"], str) for one in found.values())
    except (OSError, ValueError, KeyError, TypeError):
        usable = False
    return (found, False) if usable else ({}, True)


def first_difference(old: Any, new: Any, place: str = "") -> str | None:
    """The first setting in which two jobs differ, as 'schedule.epochs was 3, now 4'; None if they may share a directory."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            found = first_difference(old.get(key), new.get(key), f"{place}.{key}" if place else key)
            if found:
                return found
        return None
    setting = place.removeprefix("recipe.")
    allowed = any(setting == one or setting.startswith(f"{one}.") for one in MAY_CHANGE) or place in DERIVED
    allowed |= place.startswith(f"{SPREAD}.") and not place.startswith(QUANTISED)
    return None if old == new or allowed else f"{place} was {brief(old)}, now {brief(new)}"


def brief(value: Any, most: int = 120) -> str:
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."
