"""The directory of a run: what is in it, and whether a job may use it."""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from pathlib import Path
from typing import IO, Any

from prdp_fast.core import environment
from prdp_fast.core.errors import UserError
from prdp_fast.core.files import write_json

LOCK = ".lock"  # held by the job that runs here: its host, process and start
RUN = "run.json"  # the job: resolved recipe, DeepSpeed configuration, ranks
SUMMARY = "summary.json"  # of a finished run
METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
ACCELERATION = "acceleration.json"  # what was chosen when the run first started
CHECKPOINTS = "checkpoints"
SAMPLES = "samples"
COMPARISON = "samples/before_after.png"
EXPORT = "model"
EVALUATION = "evaluation"  # what `prdp evaluate` found
EVALUATION_BEFORE, EVALUATION_AFTER = "evaluation_before.pt", "evaluation_after.pt"

# What a resumed run may change: how long it goes on, what it keeps, and what decides about memory and speed alone, whose results
# differ by rounding. Never what an epoch computes.
MAY_CHANGE = (
    "schedule.epochs", "schedule.time_limit_minutes", "schedule.on_failure", "schedule.max_repeats",
    "schedule.reward_timeout_s", "schedule.max_skipped_updates", "schedule.max_nonfinite_epochs", "schedule.micro_batch",
    "sampler.rollout_batch", "performance.activation_checkpointing", "checkpoint.every", "checkpoint.keep", "model.push_to_hub",
)  # fmt: skip
# They follow from the micro-batch, and from settings that may not change and are compared by their own names.
DERIVED = ("deepspeed.train_micro_batch_size_per_gpu", "deepspeed.gradient_accumulation_steps")


_held: dict[Path, IO[str]] = {}  # by this process, until it ends


def claim(directory: Path, job: dict[str, Any], resume: str) -> None:
    """Make `directory` this job's, or refuse it. It stays this process's until the process ends, whatever ends it.

    Args:
        job: resolved recipe, DeepSpeed configuration and rank count, as JSON.
        resume: "never" wants a directory without a run; anything else continues the same job's run.
    Raises: UserError; nothing in the directory is touched then.
    """
    check(directory, job, resume)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {directory} cannot be made ({error.strerror}); choose a directory that can") from error
    lock(directory)
    check(directory, job, resume)  # again: another job may have come first
    write_json(directory / RUN, job)


def check(directory: Path, job: dict[str, Any], resume: str) -> None:
    """Raises: UserError if the directory is not for this job."""
    record = directory / RUN
    if not record.exists():
        if directory.is_dir() and any(path.name != LOCK for path in directory.iterdir()):
            raise UserError(f"--output {directory} is not empty and holds no run of prdp_fast; choose a new directory")
        return
    if resume == "never":
        raise UserError(f"--output {directory} holds a run already; choose another directory, or continue it with --resume auto")
    difference = first_difference(json.loads(record.read_text()), json.loads(json.dumps(job)))
    if difference:
        raise UserError(f"--output {directory} holds another run: {difference}; choose another directory, or give the same job")


def lock(directory: Path) -> None:
    """Keep other jobs out, before anything in the directory is cleaned. The kernel drops the lock when the process ends.

    Raises: UserError if another job has it.
    """
    place = directory.resolve()
    if place in _held:
        return
    try:
        import fcntl

        file = (directory / LOCK).open("a+", encoding="utf-8")
    except ImportError:  # not a Unix
        return
    except OSError as error:
        raise UserError(f"--output {directory} cannot be written ({error.strerror}); choose a directory that can") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            file.seek(0)
            who = holder(file.read())
            file.close()
            raise UserError(
                f"--output {directory} is in use by a job {who}; wait for its end, or choose another directory"
            ) from None
        file.close()
        environment.say(f"{directory}: its file system has no locks ({error.strerror}); see that no second job is started in it")
        return
    file.truncate(0)
    file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}) + "\n")
    file.flush()
    _held[place] = file


def holder(text: str) -> str:
    """Who wrote a lock file."""
    try:
        found = json.loads(text)
        return f"on {found['host']}, process {found['pid']}, since {found['since']}"
    except (ValueError, KeyError, TypeError):
        return "that has just started"


def first_difference(old: Any, new: Any, place: str = "") -> str | None:
    """The first setting in which two jobs differ, as 'schedule.epochs was 3, now 4'; None if they may share a directory."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            found = first_difference(old.get(key), new.get(key), f"{place}.{key}" if place else key)
            if found:
                return found
        return None
    allowed = place.removeprefix("recipe.") in MAY_CHANGE or place in DERIVED
    return None if old == new or allowed else f"{place} was {old!r}, now {new!r}"
