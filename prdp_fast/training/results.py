"""What a run leaves in its directory beside checkpoints and metrics: evaluations, pictures, the exported model and its card."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from prdp_fast.core import distributed, run_directory
from prdp_fast.core.digest import tensors_digest
from prdp_fast.core.files import write_json, write_tensors
from prdp_fast.core.hub import upload
from prdp_fast.evaluation.run import Evaluation, compare_evaluations
from prdp_fast.models.pipeline import Pipeline
from prdp_fast.planning.job import Job
from prdp_fast.reporting.images import comparison_grid, image_grid
from prdp_fast.reporting.model_card import write_model_card
from prdp_fast.training.telemetry import Telemetry

DIGEST = "sha256"  # beside the fields of an evaluation in its file: of their values
GRID_PROMPTS = 24  # pictures of a sample grid
COMPARED_PROMPTS = 12  # of the picture that sets before against after

Evaluations = dict[str, Evaluation]  # by prompt set


def load_or_run(output: Path | None, prompts: dict[str, list[str]], run: Callable[[], Evaluations]) -> Evaluations:
    """The evaluation before training, from the run directory if an earlier start left it there. Every rank calls this.

    Args: prompts: of each set. A file of others is another run's.
    """
    if output is None:
        return {}
    path = output / run_directory.EVALUATION_BEFORE
    # Rank 0 looks for all: another rank could look when rank 0 has written already.
    found = distributed.from_main(load(path) if distributed.is_main() else None)
    if found is not None and {name: evaluation.prompts for name, evaluation in found.items()} == prompts:
        return found
    evaluations = run()
    if distributed.is_main():
        save(path, evaluations)
    distributed.barrier()
    return evaluations


def load(path: Path) -> Evaluations | None:
    """None if there is no such file, or a damaged one: torch compares nothing with what was written."""
    try:
        sets = torch.load(path, weights_only=True)
        for name, values in sets.items():
            digest = values.pop(DIGEST, None)  # files of earlier versions have none
            if digest is not None and digest != tensors_digest({name: values}):
                return None
        return {name: Evaluation(**values) for name, values in sets.items()}
    except Exception:  # missing, or what pickle, zip and torch say of a damaged file; what it held can be made again
        return None


def save(path: Path, evaluations: Evaluations) -> None:
    sets = {name: dict(vars(evaluation)) for name, evaluation in evaluations.items()}
    write_tensors(path, {name: values | {DIGEST: tensors_digest({name: values})} for name, values in sets.items()})


def compare_all(before: Evaluations, after: Evaluations) -> dict[str, Any]:
    return {name: compare_evaluations(before[name], after[name]) for name in before}


def write(
    output: Path, job: Job, pipeline: Pipeline, weights: dict[str, torch.Tensor], before: Evaluations, after: Evaluations,
    summary: dict[str, Any], telemetry: Telemetry,
) -> None:  # fmt: skip
    """Everything a finished run leaves. One rank calls this.

    Args: weights: the trained ones, whole, float32.
    """
    if before:
        save(output / run_directory.EVALUATION_AFTER, after)
        write_samples(output, "after", after["unseen"], telemetry, summary["epochs"] - 1)  # beside the last epoch's numbers
        write_comparison(before["unseen"], after["unseen"], output / run_directory.COMPARISON)
    export = output / run_directory.EXPORT
    for note in pipeline.export(export, weights):
        telemetry.message(note)
    write_model_card(export, job.settings, pipeline.family, summary, output / run_directory.COMPARISON)
    write_json(output / run_directory.SUMMARY, summary)


def write_samples(output: Path | None, name: str, evaluation: Evaluation, telemetry: Telemetry, step: int) -> None:
    """A grid of an evaluation's first images with their prompts, in samples/ and in the trackers. Rank 0 alone writes."""
    if output is None or not distributed.is_main():
        return
    path = output / run_directory.SAMPLES / f"{name}.png"
    images_per_prompt = len(evaluation.images) // len(evaluation.prompts)
    captions = [prompt for prompt in evaluation.prompts for _ in range(images_per_prompt)]
    try:
        image_grid(evaluation.images[:GRID_PROMPTS], path, columns=6, captions=captions[:GRID_PROMPTS])
    except OSError as error:  # a full disk; no run ends for a picture
        telemetry.message(f"WARNING: {path} cannot be written ({error.strerror or error}); make room: the run goes on without it")
        return
    telemetry.log_image(f"{run_directory.SAMPLES}/{name}", path, step)


def write_comparison(before: Evaluation, after: Evaluation, path: Path) -> None:
    """The first image of the first prompts, before above after, with its prompt's reward."""
    part = slice(0, COMPARED_PROMPTS)
    images_per_prompt = len(before.images) // len(before.prompts)
    comparison_grid(
        before.images[::images_per_prompt][part], after.images[::images_per_prompt][part], before.prompts[part], path,
        before.rewards[part].tolist(), after.rewards[part].tolist(),
    )  # fmt: skip


def push(directory: Path, repository: str) -> str:
    """Upload `directory` to the hub.

    Returns: a line for the user. A failure is one too: a run is never lost for want of a network.
    """
    try:
        place = upload(directory, repository)
    except Exception as error:  # of the network, the hub's answer, a token, the disk: for all of them the model lies here
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        return f"warning: model.push_to_hub {repository} failed ({reason}); by hand: hf upload {repository} {directory}"
    return f"pushed to {place}"
