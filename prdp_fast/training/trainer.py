"""PRDP's Algorithm 1 (arXiv:2402.08714) as one loop: `Trainer.build` makes a job's parts, `Trainer.train` runs them.

deepspeed prdp_fast/train.py --config zero2.json
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from torch import nn

from prdp_fast.acceleration import channels_last
from prdp_fast.acceleration.choose import Acceleration, Denoisers, Ranks, accelerate
from prdp_fast.acceleration.payback import WorkLeft
from prdp_fast.acceleration.process import choose_fused_optimizer, prepare_process
from prdp_fast.core import distributed, run_directory
from prdp_fast.core.errors import NotFiniteError, OneRankError, RewardError, UserError
from prdp_fast.core.files import write_json
from prdp_fast.core.format import format_bytes
from prdp_fast.core.memory import smaller_on_oom
from prdp_fast.core.records import Prompt, TextEmbeddings, Trajectories
from prdp_fast.evaluation.run import Evaluation, evaluate
from prdp_fast.models.finite import first_nonfinite
from prdp_fast.models.lora import add_adapter
from prdp_fast.models.pipeline import Pipeline
from prdp_fast.models.text import TextEncoder
from prdp_fast.objectives import Objective, build_objective
from prdp_fast.planning import micro_batch
from prdp_fast.planning.cost import epoch_rows
from prdp_fast.planning.job import Job
from prdp_fast.planning.memory import MemoryPlan
from prdp_fast.prompts.embeddings import choose_encoder
from prdp_fast.prompts.stream import PromptStream
from prdp_fast.rewards import BackgroundScores
from prdp_fast.sampling.rollout import finite_images, remove, rollout
from prdp_fast.training import results
from prdp_fast.training.checkpoint import Checkpoints
from prdp_fast.training.engine import ZeroEngine
from prdp_fast.training.health import first_of_ranks, reward_fault, skipping_cause
from prdp_fast.training.metrics import epoch_metrics
from prdp_fast.training.passes import Reference, reference_pass
from prdp_fast.training.state import TrainState
from prdp_fast.training.telemetry import Telemetry
from prdp_fast.training.update import Experience, UpdateReport, drift_warning, run_updates

Result = TypeVar("Result")


@dataclass
class Trainer:
    """One rank's part of a job."""

    job: Job
    output: Path | None  # the run directory; None keeps nothing
    state: TrainState
    checkpoints: Checkpoints
    pipeline: Pipeline
    encode: Callable[[list[Prompt]], TextEmbeddings]
    objective: Objective
    engine: ZeroEngine
    reference: nn.Module | None  # frozen copy of the denoiser; None with an adapter, where it is the denoiser without it
    acceleration: Acceleration
    stream: PromptStream
    scorer: BackgroundScores
    telemetry: Telemetry
    memory_plan: MemoryPlan
    available_bytes: int  # that this rank may fill
    told_drift: float = 0.0  # the largest that the user has been told of, nats

    @classmethod
    def build(cls, job: Job, device: torch.device, output: Path | None = None, *, pipeline: Pipeline | None = None) -> Trainer:
        """Make everything that the job needs. Every rank calls this.

        Args:
            output: the run directory, claimed already. What an earlier start of the run decided stays decided.
            pipeline: to train in place of the one that the recipe names; benchmarks have random weights.
        Raises: UserError.
        """
        settings, schedule, performance, dtype = job.settings, job.settings.schedule, job.settings.performance, job.config.dtype
        with agree():  # first: what their models hold is no longer free when the micro-batch is chosen
            job.rewards.prepare()
        decisions = prepare_process(performance, device, dtype)
        fused = choose_fused_optimizer(performance.fused_optimizer, device, job.config.offloads_optimizer)

        pipeline = pipeline or Pipeline.load(job.family, device, dtype, settings.sampler.scheduler)
        objective, lora = build_objective(settings.objective, settings.kernels), settings.model.lora
        reference = pipeline.frozen_denoiser(dtype) if objective.needs_reference and lora is None else None
        if lora is not None:
            add_adapter(pipeline.denoiser, lora, settings.seed)
        if performance.activation_checkpointing:
            pipeline.denoiser.enable_gradient_checkpointing()
        encode = choose_encoder(
            TextEncoder(pipeline, dtype).encode, job.train_prompts, stored=settings.prompts.stored_embeddings, device=device,
            dtype=dtype,
        )  # fmt: skip

        checkpoints = Checkpoints(output, keep=settings.checkpoint.keep)
        state = checkpoints.latest_state()
        state.follow(
            {"micro_batch": schedule.micro_batch, "reference": schedule.micro_batch, "rollout": settings.sampler.rollout_batch}
        )
        state.micro_batch, plan, available = micro_batch.fit(
            job.footprint(cuda=device.type == "cuda"), pipeline.denoiser, job.family,
            # A resumed run keeps its micro-batch, whatever is free now: another one would round differently.
            wanted=state.micro_batch or (None if schedule.micro_batch == "auto" else schedule.micro_batch),
            most=job.rows_per_update, local_ranks=distributed.local_ranks(),
            agree=lambda size: distributed.all_reduce([size], "min")[0],
        )  # fmt: skip
        engine = ZeroEngine(
            pipeline.denoiser, settings.optimizer, job.config, device, performance.coalesce_gradients, fused.value == "on",
            settings.model.ema_decay,
        )  # fmt: skip
        acceleration = speed_up(job, engine, reference, state, device, output)
        acceleration.decisions |= decisions | {"fused_optimizer": fused}
        if acceleration.decisions["channels_last"].value == "on":
            channels_last.enable(pipeline.vae.decoder)
        if acceleration.shares_halves:  # in every pass alike, so that log-probs that are compared round alike
            job = replace(job, policy=replace(job.policy, predict=partial(job.policy.predict, shared=True)))

        stream = PromptStream(
            job.train_prompts, seed=settings.seed, prompts_per_epoch=schedule.prompts_per_epoch, rank=distributed.rank(),
            world_size=job.world_size,
        )  # fmt: skip
        # On a CPU the rewards would take the denoiser's own cores.
        in_background = {"on": True, "off": False, "auto": device.type != "cpu"}[performance.background_rewards]
        telemetry = Telemetry(
            output if distributed.is_main() else None, total_epochs=schedule.epochs, first_epoch=state.epoch
        )  # fmt: skip
        return cls(
            job, output, state, checkpoints, pipeline, encode, objective, engine, reference, acceleration, stream,
            BackgroundScores(in_background), telemetry, plan, available,
        )  # fmt: skip

    # The loop.

    def train(self) -> dict[str, Any]:
        """Run the job, or what is left of it. Algorithm 1 of the paper, E epochs of:

            collect   N prompts; B trajectories of each, sampled from the policy (its step is eq. 4); their images' rewards; and
                      the same steps' log-probs under the reference
            update    K gradient steps on the proximal loss (Appendix G)

        Returns: the summary, also in summary.json.
        """
        with self.telemetry, contextlib.closing(self.scorer):
            self.say_hello()
            self.resume()
            before = self.evaluate_before()
            while not self.finished():
                with self.one_line_if_out_of_memory():
                    experience = self.repeatable(f"epoch {self.state.epoch}", self.collect)
                    report = self.update(experience)
                self.log(experience, report)
                self.save_if_due()
                self.evaluate_if_due(before)
            return self.finish(before)

    def collect(self) -> Experience:
        """What one epoch learns from. Noise and subsets follow from the seed and the epoch: a repetition has the same."""
        with self.telemetry.phase("prompts"):
            prompts = self.stream.epoch(self.state.epoch)
            embeddings = self.encode(prompts)
        trajectories = self.sample(prompts, embeddings)
        with self.telemetry.phase("decode"):
            images, shown = self.pipeline.decode_checked(trajectories.latents[:, -1], say=self.telemetry.message)
            lost, lost_anywhere = self.lost_images(trajectories, shown)
        rows = [prompt for prompt in prompts for _ in range(self.job.settings.schedule.images_per_prompt)]
        scoring = self.scorer.start(
            partial(self.job.rewards.score, images, [row.text for row in rows], [row.metadata for row in rows])
        )
        reference = None
        if self.objective.needs_reference and self.engine.updates > 0:  # before the first update the policy is the reference
            reference = self.reference_log_probs(trajectories)
            self.check_reference(reference, lost)
        with self.telemetry.phase("reward"), agree():
            scores = scoring().without(lost)
        return Experience(trajectories, scores, reference, nonfinite_images=lost_anywhere)

    def sample(self, prompts: list[Prompt], embeddings: TextEmbeddings) -> Trajectories:
        """B trajectories of each prompt from the current policy. embeddings: one row per prompt."""
        settings = self.job.settings
        with self.telemetry.phase("rollout"), self.engine.sampling_denoiser() as denoiser:
            return self.in_batches(
                "rollout", self.rollout_batch,
                lambda size: rollout(
                    self.job.policy, denoiser, prompts, embeddings, images_per_prompt=settings.schedule.images_per_prompt,
                    latent_shape=self.pipeline.latent_shape, batch=size, seed=settings.seed, epoch=self.state.epoch,
                ),
            )  # fmt: skip

    def reference_log_probs(self, trajectories: Trajectories) -> Reference:
        """Log-probs of the stored steps under the reference."""
        timesteps = self.job.settings.schedule.reference_timesteps
        with self.telemetry.phase("reference"), self.reference_denoiser() as frozen:
            return self.in_batches(
                "reference", self.state.batches.get("reference", self.micro_batch),
                lambda size: reference_pass(self.job.policy, frozen, trajectories, size, timesteps),
            )  # fmt: skip

    def update(self, experience: Experience) -> UpdateReport:
        """K gradient steps on what was collected."""
        schedule, state = self.job.settings.schedule, self.state
        experience.scores, state.seen_rewards, experience.divisors = self.job.rewards.normalised(
            experience.scores, state.seen_rewards, distributed.all_reduce
        )
        if fault := reward_fault(self.objective, self.job.rewards, experience.scores, schedule.images_per_prompt):
            self.stop(f"epoch {state.epoch}: {fault}")
        applied = self.engine.updates
        with self.telemetry.phase("update"):
            try:
                report = run_updates(
                    self.job.policy, self.engine, self.objective, experience.trajectories, experience.scores.total,
                    reference=experience.reference, updates=schedule.updates_per_epoch, micro_batch=self.micro_batch,
                    last_drift=state.last_drift, reduce=distributed.all_reduce, timesteps=schedule.update_timesteps,
                    skipped_in_row=state.skipped_in_row, say=self.telemetry.message,
                )  # fmt: skip
            except OneRankError:
                raise
            except UserError as error:  # on every rank: out of memory
                if self.engine.updates > applied:  # the weights are between two epochs
                    raise
                self.stop(str(error))
        state.micro_batch = report.micro_batch
        return report

    def log(self, experience: Experience, report: UpdateReport) -> None:
        """Count the epoch as finished, and tell what it did."""
        state, epoch, count = self.state, self.state.epoch, len(experience.scores.total) * self.job.world_size
        state.skipped_in_row, state.nonfinite_in_row = report.skipped_in_row, self.nonfinite_in_row(experience.nonfinite_images)
        phases = ("rollout", "reference")
        own_batches = [-float(state.batches.get(phase, math.inf)) for phase in phases]
        state.last_drift, *batches = distributed.all_reduce([report.drift, *own_batches], "max")
        state.batches = {phase: int(-size) for phase, size in zip(phases, batches, strict=True) if size > -math.inf}
        if warning := drift_warning(state.last_drift, self.job.settings.objective.clip_range, self.told_drift):
            self.told_drift = state.last_drift
            self.telemetry.message(f"epoch {epoch}: {warning}")
        steps = torch.arange(len(self.job.transitions))
        own_rows = [float(experience.reference.denoiser_rows if experience.reference else 0), float(report.denoiser_rows)]
        reference_rows, update_rows = distributed.all_reduce(own_rows, "sum")
        state.finish_epoch(
            count, rollout=count * self.job.policy.evaluations(steps), reference=int(reference_rows), update=int(update_rows)
        )  # fmt: skip
        self.telemetry.log_epoch(epoch, epoch_metrics(experience, report), count)
        if report.skipped_updates:
            self.telemetry.message(
                f"epoch {epoch}: {report.skipped_updates} update(s) had a non-finite gradient and were skipped"
            )
        if state.skipped_in_row >= self.job.settings.schedule.max_skipped_updates:
            self.stop(
                f"epoch {epoch}: {state.skipped_in_row} updates in a row had a non-finite gradient and were skipped (loss scale "
                f"{report.scale:g}): {skipping_cause(self.job.config.dtype)}"
            )

    def finished(self) -> bool:
        schedule, state = self.job.settings.schedule, self.state
        if state.epoch >= schedule.epochs:
            return True
        if schedule.time_limit_minutes is None or state.epoch == self.telemetry.first_epoch:  # every start gets on by one
            return False
        elapsed = distributed.all_reduce([state.elapsed_here()], "max")[0] / 60  # the slowest clock decides for all ranks
        if elapsed <= schedule.time_limit_minutes:
            return False
        self.telemetry.message(
            f"schedule.time_limit_minutes: stopping after {state.epoch} of {schedule.epochs} epochs; the same command goes on"
        )
        return True

    # Before and after the loop.

    def say_hello(self) -> None:
        """What was planned and chosen."""
        say, state = self.telemetry.message, self.state
        for note in self.job.family.notes:
            say(note)
        say(self.memory_plan.table())
        say(str(self.acceleration))
        self.record_acceleration()
        if self.job.settings.schedule.micro_batch == "auto":
            say(f"schedule.micro_batch auto: {state.micro_batch}")
        if not self.memory_plan.fits(self.available_bytes):
            say(f"that may not fit: {format_bytes(self.available_bytes)} is free, and a tenth should stay so")

    def record_acceleration(self) -> None:
        """Keep the choices in the run directory: a resumed run that chose alike rounds alike. Tell where it could not."""
        if self.output is None or not distributed.is_main():
            return
        path, record = self.output / run_directory.ACCELERATION, self.acceleration.record()
        earlier, damaged = run_directory.read_acceleration(self.output)
        if damaged:
            self.telemetry.message(f"{path.name} was damaged: chosen anew, so results may round differently from here on")
        changed = [name for name in earlier if name in record and record[name]["value"] != earlier[name]["value"]]
        for name in changed:
            self.telemetry.message(
                f"{name} was {earlier[name]['value']!r} when the run started and is {record[name]['value']!r} now "
                f"({record[name]['reason']}): results round differently from here on"
            )
        if changed or not earlier:
            write_json(path, record)

    def resume(self) -> None:
        """Continue after the newest checkpoint, if there is one: weights, optimizer, moving average; `state` is read already."""
        latest = self.checkpoints.load(self.engine.load)
        if latest is not None:
            if fault := self.weight_fault():
                raise UserError(self.checkpoints.damaged(latest, fault))
            self.telemetry.message(f"continuing after epoch {self.state.epoch} from {latest.name}")
        self.state.start_clock()

    def finish(self, before: dict[str, Evaluation]) -> dict[str, Any]:
        """Save, evaluate again, export. Returns: the summary. Raises: UserError if nothing was learnt."""
        self.save()
        if self.engine.updates == 0:
            reason = (
                f"every one of them was skipped: {skipping_cause(self.job.config.dtype)}" if self.state.epoch
                else "schedule.time_limit_minutes was over before the first epoch; raise it"
            )  # fmt: skip
            raise UserError(
                f"no update was applied in {self.state.epoch} epochs: nothing was learnt, and nothing is exported; {reason}"
            )
        after = self.evaluate(list(before)) if before else {}
        with self.engine.averaged():
            weights = self.engine.full_state_dict()
        summary: dict[str, Any] = {"evaluation": results.compare_all(before, after)}
        if distributed.is_main() and self.output is not None:
            phase_s = {name: round(seconds, 3) for name, seconds in self.telemetry.phase_seconds.items()}
            summary |= self.state.summary() | {"phase_s": phase_s}
            results.write(self.output, self.job, self.pipeline, weights, before, after, summary, self.telemetry)
        distributed.barrier()
        repository = self.job.settings.model.push_to_hub
        if distributed.is_main() and self.output is not None and repository is not None:  # the others do not wait for it
            self.telemetry.message(results.push(self.output / run_directory.EXPORT, repository))
        return summary

    def save(self) -> None:
        """Raises: NotFiniteError, on every rank, rather than write weights that are not finite."""
        if fault := self.weight_fault():
            latest = self.checkpoints.latest()
            raise NotFiniteError(
                f"after {self.state.epoch} epochs {fault}, and is not saved: training has driven it out of range; lower "
                f"optimizer.learning_rate; the last good state is {latest or 'that of the beginning'}"
            )
        self.checkpoints.save(self.state, self.engine.save)

    def save_if_due(self) -> None:
        if self.state.epoch % self.job.settings.checkpoint.every == 0:
            with self.telemetry.phase("checkpoint", throughput=False):
                self.save()

    # Evaluation.

    def evaluate(self, names: list[str]) -> dict[str, Evaluation]:
        """Sample and score evaluation sets with the current weights, or their moving average. Every rank does its share."""

        def run() -> dict[str, Evaluation]:
            with self.engine.averaged(), self.engine.sampling_denoiser() as denoiser:
                return {name: self.evaluate_set(denoiser, name) for name in names}

        return self.repeatable("evaluation", run)

    def evaluate_reference(self, names: list[str]) -> dict[str, Evaluation]:
        """The same with the weights that the run began with."""
        if self.state.epoch == 0:
            return self.evaluate(names)  # no update has moved them
        if self.reference is None and not self.engine.has_adapter:
            raise UserError(
                f"{self.output} has no whole {run_directory.EVALUATION_BEFORE}, and objective {self.objective.name!r} keeps "
                "no reference to make it again; put the file back, or go on with --set evaluation.prompts=0 in another --output"
            )
        self.telemetry.message(f"{run_directory.EVALUATION_BEFORE} is missing or damaged: the reference is evaluated again")

        def run() -> dict[str, Evaluation]:
            with self.reference_denoiser() as denoiser:
                return {name: self.evaluate_set(denoiser, name) for name in names}

        return self.repeatable("evaluation", run)

    def evaluate_set(self, denoiser: Any, name: str) -> Evaluation:
        settings, prompts = self.job.settings, self.job.evaluation_prompts[name]
        with agree():
            part = evaluate(
                self.job.policy, denoiser, self.pipeline, self.encode, self.job.rewards,
                prompts[distributed.rank() :: self.job.world_size], images_per_prompt=settings.evaluation.images_per_prompt,
                batch=self.rollout_batch, seed=settings.evaluation.seed,
            )  # fmt: skip
        whole = Evaluation.merge(distributed.gather_objects(part), len(prompts))
        if whole.unscored == len(whole.images):  # the same on every rank
            raise RewardError(
                f"none of the {len(whole.images)} images of evaluation set {name!r} has a score by "
                f"{' + '.join(reward.name for reward in settings.rewards)}; expected at least one finite one: check the rewards"
            )
        return whole

    def evaluate_before(self) -> dict[str, Evaluation]:
        """The reference on every evaluation set: measured when the run starts, read again when it goes on."""
        if not self.job.evaluation_prompts:
            return {}
        before = results.load_or_run(self.output, lambda: self.evaluate_reference(list(self.job.evaluation_prompts)))
        if before and self.state.epoch == 0:
            results.write_samples(self.output, "before", before["unseen"], self.telemetry, 0)
        return before

    def evaluate_if_due(self, before: dict[str, Evaluation]) -> None:
        every, state = self.job.settings.evaluation.every, self.state
        if not before or not every or state.epoch % every:
            return
        with self.telemetry.phase("evaluate", throughput=False):
            seen = self.evaluate(["seen"])["seen"]
        self.telemetry.log_scalars(state.epoch - 1, {"evaluation/seen": seen.summary()["mean"]})
        results.write_samples(self.output, f"epoch-{state.epoch:06d}", seen, self.telemetry, state.epoch - 1)

    # What the methods above share.

    @property
    def micro_batch(self) -> int:
        assert self.state.micro_batch is not None  # since `build`
        return self.state.micro_batch

    @property
    def rollout_batch(self) -> int:
        return self.state.batches.get("rollout", self.job.settings.sampler.rollout_batch)

    def in_batches(self, phase: str, size: int, attempt: Callable[[int], Result]) -> Result:
        """attempt(size), with a smaller size from here on if the memory is too small for it. The phase is this rank's alone."""
        size = min(size, self.job.images_per_rank if phase == "rollout" else self.job.rows_per_update)
        result, used = smaller_on_oom(
            attempt, size, phase=phase, say=self.telemetry.message,
            advice=f"use a higher ZeRO stage or more memory, and go on with --resume {self.output}",
        )  # fmt: skip
        if used < size:
            self.state.batches[phase] = used
        return result

    @contextlib.contextmanager
    def one_line_if_out_of_memory(self) -> Iterator[None]:
        """Where no smaller batch was of help, or none was tried: a reward, the optimizer."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise OneRankError(
                f"epoch {self.state.epoch}: out of memory ({' '.join(str(error).split())[:120]}); lower schedule.micro_batch, "
                "set performance.activation_checkpointing true or take a higher ZeRO stage, and go on with --resume "
                f"{self.output}"
            ) from error

    # Numbers that go wrong.

    def lost_images(self, trajectories: Trajectories, shown: torch.Tensor) -> tuple[torch.Tensor, int]:
        """Which of this rank's images are not finite, (N,) bool on the CPU, and how many are over all ranks.

        Their trajectories are made harmless. Every rank calls this.

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
        """Every rank calls this. Raises: UserError if a log-prob of the reference is not finite where the rollout is."""
        kept = ~lost.to(reference.log_probs.device)[:, None]
        (bad,) = distributed.all_reduce([float((kept & ~reference.log_probs.isfinite()).sum())], "sum")
        if bad:
            with self.reference_denoiser() as denoiser:
                fault = first_nonfinite({f"reference {self.pipeline.family.denoiser_component}": denoiser})
            reason = f"{fault}: fetch the model again" if fault else skipping_cause(self.job.config.dtype)
            self.stop(f"epoch {self.state.epoch}, reference: {int(bad)} log-probs are not finite; {reason}")

    def weight_fault(self) -> str | None:
        """The first weight of the trained denoiser that is not finite; None if all are. Every rank calls this."""
        with self.engine.whole_denoiser() as denoiser:
            fault = first_nonfinite({self.pipeline.family.denoiser_component: denoiser})
        return first_of_ranks(fault)

    def stop(self, reason: str) -> NoReturn:
        """End the run on every rank, with a checkpoint where there is something to keep.

        The weights have to be those after the last finished epoch. Raises: UserError.
        """
        if self.state.epoch and self.output is not None:
            fault = self.weight_fault()
            if fault is None:
                self.save()
                reason += f"; {self.state.epoch} finished epochs are saved in {self.output}"
            else:
                reason += f"; the weights ({fault}) are not saved, the last good state is {self.checkpoints.latest()}"
        raise UserError(reason)

    @contextlib.contextmanager
    def reference_denoiser(self) -> Iterator[nn.Module]:
        """The frozen model: a copy made before training, or the trained denoiser without its adapter."""
        if self.reference is not None:
            yield self.reference
            return
        with self.engine.base_denoiser() as denoiser:
            yield denoiser

    def repeatable(self, what: str, run: Callable[[], Result]) -> Result:
        """run(), and again if a reward fails in it and the recipe says so; then the run stops, with a checkpoint."""
        schedule = self.job.settings.schedule
        repeats = schedule.max_repeats if schedule.on_failure == "repeat" else 0
        for repeat in itertools.count(1):
            try:
                return run()
            except RewardError as error:  # on every rank, see `agree`
                if repeat > repeats:
                    if self.state.epoch:
                        self.save()  # the weights are those after the last finished epoch: nothing computed is lost
                    raise RewardError(
                        f"{error}; stopped in {what}, {self.state.epoch} finished epochs are saved: mend the reward and give "
                        f"the same command with --resume {self.output}"
                    ) from error
                self.telemetry.message(f"{what}: {error}; repeating it, {repeat} of {repeats}")
        raise AssertionError("unreachable")


@contextlib.contextmanager
def agree() -> Iterator[None]:
    """A reward or a model that fails on one rank stops every rank, with the same line, and leaves none in a collective."""
    fault: RewardError | NotFiniteError | None = None
    try:
        yield
    except (RewardError, NotFiniteError) as error:
        fault = error
    found = [one for one in distributed.gather_objects(None if fault is None else (type(fault), str(fault))) if one]
    if found:
        kind, message = found[0]
        raise kind(message) from fault


def speed_up(
    job: Job, engine: ZeroEngine, reference: nn.Module | None, state: TrainState, device: torch.device, output: Path | None
) -> Acceleration:
    """Make the job's denoisers cheaper; as an earlier start of the run did, if there was one."""
    remembered = None if output is None else run_directory.read_acceleration(output)[0] or None
    acceleration = accelerate(
        Denoisers(engine.engine.module, engine.gathered, reference, engine.has_adapter), job.settings.performance, job.family,
        train_rows=min(state.micro_batch or 1, job.rows_per_update) * job.evaluations,
        sample_rows=min(job.settings.sampler.rollout_batch, job.images_per_rank) * job.evaluations,
        stage=job.config.stage, device=device, dtype=job.config.dtype, guided=job.evaluations == 2, remembered=remembered,
        ranks=Ranks(distributed.rank(), distributed.gather_objects), work=work_left(job, state),
    )  # fmt: skip
    engine.sampling_view = acceleration.sampling_view
    return acceleration


def work_left(job: Job, state: TrainState) -> WorkLeft:
    """Denoiser rows of one rank until the job's end, for which something may be compiled."""
    schedule = job.settings.schedule
    rows = epoch_rows(schedule, job.policy, needs_reference=job.needs_reference)
    left = (schedule.epochs - state.epoch) / job.world_size
    per_role = {
        "trained": rows["update"].backward, "rollout": rows["rollout"].forward, "reference": rows["reference"].forward
    }  # fmt: skip
    limit = None if schedule.time_limit_minutes is None else schedule.time_limit_minutes * 60  # of this start
    return WorkLeft({role: left * count for role, count in per_role.items()}, limit)
