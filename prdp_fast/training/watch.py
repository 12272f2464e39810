"""Numbers that go wrong in a run: what is looked for, how long the run goes on with it, and how it ends.

Every rank calls these methods, and all of them go on or stop together.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from torch import nn

from prdp_fast.core import distributed
from prdp_fast.core.errors import NotFiniteError, UserError
from prdp_fast.core.records import Scores, Trajectories
from prdp_fast.models.finite import first_nonfinite
from prdp_fast.models.pipeline import Pipeline
from prdp_fast.objectives import Objective
from prdp_fast.planning.job import Job
from prdp_fast.sampling.rollout import finite_images, remove
from prdp_fast.training.checkpoint import Checkpoints
from prdp_fast.training.engine import ZeroEngine
from prdp_fast.training.health import first_of_ranks, reward_fault, skipping_cause
from prdp_fast.training.passes import Reference
from prdp_fast.training.state import TrainState
from prdp_fast.training.telemetry import Telemetry
from prdp_fast.training.update import UpdateReport


@dataclass
class Watch:
    """What keeps an eye on one rank's part of a job."""

    job: Job
    output: Path | None
    state: TrainState
    checkpoints: Checkpoints
    pipeline: Pipeline
    objective: Objective
    engine: ZeroEngine
    telemetry: Telemetry
    reference_denoiser: Callable[[], contextlib.AbstractContextManager[nn.Module]]

    def lost_images(self, trajectories: Trajectories, shown: torch.Tensor) -> tuple[torch.Tensor, int]:
        """Which of this rank's images are not finite, (N,) bool on the CPU, and how many are over all ranks.

        Their trajectories are made harmless.

        Args: shown: (N,) bool on the CPU, which pictures are finite.
        Raises: UserError where the run should not go on: in its first epoch, without any finite image, or time after time.
        """
        latents = finite_images(trajectories).cpu()
        lost = ~(latents & shown)
        counts = distributed.all_reduce([float(n) for n in ((~latents).sum(), lost.sum(), len(lost))], "sum")
        bad_latents, bad, images = (int(count) for count in counts)
        if not bad:
            return lost, 0
        epoch, limit = self.state.epoch, self.job.settings.schedule.max_nonfinite_epochs
        what = (
            f"epoch {epoch}, rollout: the latents of {bad_latents} of {images} images are not finite" if bad_latents
            else f"epoch {epoch}, decoding: {bad} of {images} pictures are not finite, although their latents are"
        )  # fmt: skip
        if epoch == 0 or bad == images or self.nonfinite_in_row(bad) >= limit:
            with self.engine.whole_denoiser() as denoiser:
                reason = self.pipeline.explain(
                    denoiser, trajectories.embeddings, latents=bad_latents > 0, trained=self.engine.updates > 0
                )
            self.stop(f"{what}; {first_of_ranks(reason if lost.any() else None)}")
        self.telemetry.message(f"{what}: they have no reward; schedule.max_nonfinite_epochs {limit} in a row stop the run")
        remove(trajectories, ~latents)
        return lost, bad

    def nonfinite_in_row(self, images: int) -> int:
        """Epochs in a row, this one included, with an image that is not finite. Args: images: of this one."""
        return self.state.nonfinite_in_row + 1 if images else 0

    def check_reference(self, reference: Reference, lost: torch.Tensor) -> None:
        """Raises: UserError if a log-prob of the reference is not finite where the rollout is."""
        kept = ~lost.to(reference.log_probs.device)[:, None]
        (bad,) = distributed.all_reduce([float((kept & ~reference.log_probs.isfinite()).sum())], "sum")
        if bad:
            with self.reference_denoiser() as denoiser:
                fault = first_nonfinite({f"reference {self.pipeline.family.denoiser_component}": denoiser})
            reason = f"{fault}: fetch the model again" if fault else skipping_cause(self.job.config.dtype)
            self.stop(f"epoch {self.state.epoch}, reference: {int(bad)} log-probs are not finite; {reason}")

    def check_rewards(self, scores: Scores) -> None:
        """Raises: UserError if nothing could be learnt from an epoch's rewards."""
        per_prompt = self.job.settings.schedule.images_per_prompt
        if fault := reward_fault(self.objective, self.job.rewards, scores, per_prompt):
            self.stop(f"epoch {self.state.epoch}: {fault}")

    def count(self, report: UpdateReport, nonfinite_images: int) -> None:
        """What the next epochs, and a resumed run, know of this one."""
        self.state.skipped_in_row = report.skipped_in_row
        self.state.nonfinite_in_row = self.nonfinite_in_row(nonfinite_images)

    def check_updates(self, epoch: int, report: UpdateReport) -> None:
        """Tell of updates that an epoch skipped. Raises: UserError if there were too many in a row."""
        skipped, in_row = report.skipped_updates, self.state.skipped_in_row
        if skipped:
            self.telemetry.message(f"epoch {epoch}: {skipped} update(s) had a non-finite gradient and were skipped")
        if in_row >= self.job.settings.schedule.max_skipped_updates:
            self.stop(
                f"epoch {epoch}: {in_row} updates in a row had a non-finite gradient and were skipped (loss scale "
                f"{report.scale:g}): {skipping_cause(self.job.config.dtype)}"
            )

    def check_learnt(self) -> None:
        """At the end of a run. Raises: UserError if no update was applied."""
        if self.engine.updates:
            return
        reason = (
            f"every one of them was skipped: {skipping_cause(self.job.config.dtype)}" if self.state.epoch
            else "schedule.time_limit_minutes was over before the first epoch; raise it"
        )  # fmt: skip
        raise UserError(
            f"no update was applied in {self.state.epoch} epochs: nothing was learnt, and nothing is exported; {reason}"
        )

    def weight_fault(self) -> str | None:
        """The first weight of the trained denoiser that is not finite; None if all are."""
        with self.engine.whole_denoiser() as denoiser:
            fault = first_nonfinite({self.pipeline.family.denoiser_component: denoiser})
        return first_of_ranks(fault)

    def settle(self, *, wait: bool = True) -> None:
        """Tell what has become of the checkpoint that is on its way, if it cannot be written. Args: wait: for its end."""
        if unsaved := self.checkpoints.settle(wait=wait):
            self.telemetry.message(f"WARNING: {unsaved}; make room: the next one is tried when it is due, or at the end")

    def save(self, then: str | None = None, *, behind: bool = False) -> str | None:
        """
        Args:
            then: what the user is told to come next if the checkpoint cannot be written; None leaves that to the caller.
            behind: only a copy is made now, which is written while training goes on.
        Returns: why it cannot be written; the last whole one is as it was then.
        Raises: NotFiniteError, on every rank, rather than write weights that are not finite.
        """
        self.settle()
        if fault := self.weight_fault():
            raise NotFiniteError(
                f"after {self.state.epoch} epochs {fault}, and is not saved: training has driven it out of range; lower "
                f"optimizer.learning_rate; the last good state is {self.checkpoints.newest or 'that of the beginning'}"
            )
        if behind:
            unsaved = self.checkpoints.save_behind(self.state, self.engine.copy)
        else:
            unsaved = self.checkpoints.save(self.state, self.engine.save)
        if unsaved and then:
            self.telemetry.message(f"WARNING: {unsaved}; {then}")
        return unsaved

    def save_last(self) -> str:
        """Before the run stops. Returns: words for the line that says why it does."""
        return self.save() or f"{self.state.epoch} finished epochs are saved in {self.output}"

    def stop(self, reason: str) -> NoReturn:
        """End the run on every rank, with a checkpoint where there is something to keep.

        The weights have to be those after the last finished epoch. Raises: UserError.
        """
        if self.state.epoch and self.output is not None:
            self.settle()
            fault = self.weight_fault()
            if fault is None:
                reason += f"; {self.save_last()}"
            else:
                last = self.checkpoints.newest or "that of the beginning"
                reason += f"; the weights ({fault}) are not saved, the last good state is {last}"
        raise UserError(reason)
