"""A model out of a checkpoint: its weights are put together from the shards by one process, without a job."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from prdp_fast.config.recipe import Settings
from prdp_fast.core import checkpoint_files
from prdp_fast.core.errors import UserError, brief
from prdp_fast.core.files import partial_path
from prdp_fast.core.paths import told
from prdp_fast.core.run_directory import CHECKPOINTS, CONTENT, RUN, read_record
from prdp_fast.core.visible import visible
from prdp_fast.core.weight_files import write_safetensors
from prdp_fast.models.families import read_family
from prdp_fast.models.pipeline import Pipeline, write_adapter
from prdp_fast.models.weights import pipeline_digest
from prdp_fast.reporting.model_card import write_model_card
from prdp_fast.training.shards import Shards

SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Extract:
    """What a checkpoint has trained."""

    run: Path
    checkpoint: Path
    record: dict[str, Any]  # the run's
    settings: Settings
    weights: dict[str, torch.Tensor]  # by name, float32 on the CPU: an adapter's, or all of the denoiser's
    averaged: bool  # the weights are their moving average

    def __str__(self) -> str:
        kind = "moving average" if self.averaged else "weights"
        return f"the {kind} of {self.checkpoint}, {sum(value.numel() for value in self.weights.values()):,} numbers"


def extract(path: Path, *, last: bool, best: bool = False, say: Callable[[str], None] = print) -> Extract:
    """
    Args:
        path: a run's directory, whose newest whole checkpoint is taken, or a checkpoint in it.
        last: the weights themselves where a moving average of them is kept.
        best: of a run's directory, the checkpoint with the best evaluation.
    Raises: UserError.
    """
    run, found = find(path)
    if best:
        found = [find_best(path, run)]
    checkpoint = newest_whole(found, say)
    record, damage = read_record(run / RUN)
    if record is None:
        raise UserError(f"{run / RUN} is damaged ({damage}), and says which job the run is; put it back from a copy")
    try:
        settings = Settings.model_validate(record["recipe"])
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(
            f"{run / RUN} holds no recipe of this version ({'.'.join(map(str, first['loc']))}: {first['msg']}); put it back from "
            "a copy, or take the version of its 'versions'"
        ) from None
    try:
        shards = Shards(checkpoint)
        if shards.on_nvme:
            raise UserError(f"checkpoint {checkpoint} has its float32 weights in files of DeepSpeed's for NVMe; finish the run")
        averaged = shards.has_average and not last
        weights = shards.state_dict(averaged=averaged)
        return Extract(run, checkpoint, record, settings, weights, averaged)
    except UserError:
        raise
    except Exception as error:  # of torch, pickle and zip: bytes that no manifest vouches for
        raise UserError(f"checkpoint {checkpoint} cannot be read ({brief(error)}); take another one") from None


def find(path: Path) -> tuple[Path, list[Path]]:
    """The run, and its checkpoints that may be taken, oldest first. Raises: UserError."""
    if (path / RUN).is_file():
        found = checkpoint_files.find(path / CHECKPOINTS)
        if not found:
            raise UserError(f"{path} has no checkpoint yet; wait for its first, checkpoint.every epochs after the start")
        return path, found
    path = path.absolute()
    run = path.parent.parent
    if path not in checkpoint_files.find(path.parent) or not (run / RUN).is_file():
        raise UserError(
            f"{path} is neither a run directory, in which there is {RUN}, nor a checkpoint of one, such as "
            f"RUN/{CHECKPOINTS}/epoch-000050; 'prdp checkpoint list RUN' lists them"
        )
    return run, [path]


def find_best(path: Path, run: Path) -> Path:
    """Raises: UserError if `path` is no run's directory, or no checkpoint has a best evaluation."""
    if path.absolute() != run.absolute():
        raise UserError(f"{path} is one checkpoint, and --best chooses one of a run's; give {run}, or leave --best out")
    best = checkpoint_files.find_best(run / CHECKPOINTS)
    if best is None:
        raise UserError(
            f"{run} has no best checkpoint: it needs checkpoint.keep_best and an evaluation; leave --best out for the newest one"
        )
    return best


def newest_whole(found: list[Path], say: Callable[[str], None]) -> Path:
    """The newest that holds what was written. Raises: UserError if there is none."""
    faults = []
    for checkpoint in reversed(found):
        files, fault = checkpoint_files.look(checkpoint)
        fault = fault or checkpoint_files.content_fault(checkpoint, sorted(files.items()))
        if fault is None:
            return checkpoint
        faults.append(f"checkpoint {checkpoint}: {fault}")
        if len(found) > 1:
            say(visible(f"{faults[-1]}; the one before it is taken"))
    raise UserError(f"{faults[0]}; {'take another one' if len(found) == 1 else 'no checkpoint of the run is whole'}")


def export(taken: Extract, directory: Path, say: Callable[[str], None] = print) -> None:
    """Write the directory that the run itself would export: a pipeline, or what an adapter's loaders open, and its model card.

    Raises: UserError if the base is not what the run began with, or the directory cannot be written.
    """
    settings = taken.settings
    partial = partial_path(directory.absolute())
    with told(f"{directory} cannot be written", "make room, or name another directory"):
        if os.path.lexists(directory) and (not directory.is_dir() or any(directory.iterdir())):
            raise UserError(f"{directory} exists already; name a new directory")
        shutil.rmtree(partial, ignore_errors=True)
        partial.parent.mkdir(parents=True, exist_ok=True)
        try:
            family = read_family(settings.model.pretrained, settings.model.lora).for_sampler(settings.sampler)
            if settings.model.lora is not None:
                write_adapter(partial, family, family.scheduler(settings.sampler.scheduler), taken.weights)
            else:
                check_base(taken)
                pipeline = Pipeline.load(family, torch.device("cpu"), torch.float32, settings.sampler.scheduler)
                kept = pipeline.denoiser.state_dict().keys()
                tables = {name: value for name, value in pipeline.denoiser.named_buffers() if name in kept}
                for note in pipeline.export(partial, tables | taken.weights):
                    say(note)
            progress = checkpoint_files.read_state(taken.checkpoint)
            summary = {"epochs": progress["epoch"], "images": progress["images"]}
            write_model_card(partial, settings, family, summary, partial / "no picture")
            if directory.is_dir():
                directory.rmdir()
            partial.rename(directory)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def check_base(taken: Extract) -> None:
    """Raises: UserError if what is exported beside the trained weights is not what the run used."""
    was, pretrained = (taken.record.get(CONTENT) or {}).get("model.pretrained"), taken.settings.model.pretrained
    if was is not None and was != (now := pipeline_digest(pretrained)):
        raise UserError(
            f"model.pretrained {pretrained!r} is not what {taken.run} started with (SHA-256 was {was}..., now {now}...); put the "
            "earlier files back"
        )


def consolidate(taken: Extract, file: Path) -> None:
    """Write the trained weights alone, by their names in the denoiser, float32. Raises: UserError."""
    if file.suffix != SUFFIX:
        raise UserError(f"{file} is to hold weights; expected a name that ends in {SUFFIX}")
    if os.path.lexists(file):
        raise UserError(f"{file} exists already; name a new file")
    epoch = str(checkpoint_files.epoch_of(taken.checkpoint))
    with told(f"{file} cannot be written", "make room, or name another place"):
        file.absolute().parent.mkdir(parents=True, exist_ok=True)
        write_safetensors(
            file, taken.weights, {"format": "pt", "epochs": epoch, "averaged": str(taken.averaged).lower()}
        )  # fmt: skip
