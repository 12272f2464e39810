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
from typing import Any, TypeVar

import torch
from torch import nn

from prdp_fast.acceleration.choose import Acceleration
from prdp_fast.acceleration.process import choose_fused_optimizer, prepare_process
from prdp_fast.config.objectives import DdpoSettings
from prdp_fast.core import distributed, ranks, run_directory
from prdp_fast.core.errors import AgreedError, OneRankError, RewardError, UserError
from prdp_fast.core.format import format_bytes
from prdp_fast.core.memory import smaller_on_oom
from prdp_fast.core.records import Prompt, TextEmbeddings, Trajectories
from prdp_fast.core.stops import Stopped
from prdp_fast.evaluation.run import Evaluation, evaluate
from prdp_fast.evaluation.statistics import mean_and_error, over_optimised
from prdp_fast.models.lora import add_adapter, cast_frozen
from prdp_fast.models.pipeline import Pipeline
from prdp_fast.models.text import TextEncoder
from prdp_fast.objectives import Objective, build_objective, update_statistics
from prdp_fast.planning import micro_batch
from prdp_fast.planning.job import Job
from prdp_fast.planning.memory import MemoryPlan, choose_async_save, free_bytes
from prdp_fast.prompts.embeddings import choose_encoder
from prdp_fast.prompts.stream import PromptSet, PromptStream
from prdp_fast.reporting.private import recipe_for_others
from prdp_fast.rewards import BackgroundScores
from prdp_fast.sampling.rollout import rollout
from prdp_fast.training import results
from prdp_fast.training.agreement import agree
from prdp_fast.training.checkpoint import Checkpoints
from prdp_fast.training.engine import ZeroEngine
from prdp_fast.training.metrics import epoch_metrics
from prdp_fast.training.passes import Reference, reference_pass
from prdp_fast.training.speed import remember, speed_up
from prdp_fast.training.state import TrainState
from prdp_fast.training.step_weights import step_weights
from prdp_fast.training.telemetry import Telemetry
from prdp_fast.training.update import Experience, UpdateReport, drift_warning, run_updates
from prdp_fast.training.watch import Watch

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
    reference: nn.Module | None  # frozen copy of the denoiser; None where not needed, or with an adapter
    acceleration: Acceleration
    stream: PromptStream
    scorer: BackgroundScores
    telemetry: Telemetry
    memory_plan: MemoryPlan
    available_bytes: int  # that this rank may fill
    async_save: bool  # periodic checkpoints are written while training goes on
    stopped_over_optimised: bool = False  # as evaluation.on_over_optimised says
    told_drift: float = 0.0  # the largest that the user has been told of, nats

    def __post_init__(self) -> None:
        self.watch = Watch(
            self.job, self.output, self.state, self.checkpoints, self.pipeline, self.objective, self.engine, self.telemetry,
            self.reference_denoiser,
        )  # fmt: skip

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
            if job.held_rewards is not None:
                job.held_rewards.prepare()
        decisions = prepare_process(performance, device, dtype)
        fused = choose_fused_optimizer(performance.fused_optimizer, device, job.config.offloads_optimizer)

        kept = settings.checkpoint
        checkpoints = Checkpoints(
            output, keep=kept.keep, milestone=kept.keep_every and kept.every * kept.keep_every, keep_best=kept.keep_best
        )
        state = checkpoints.choose()
        if settings.prompts.on_corrupt == "skip":
            job = replace(job, train_prompts=whole_shards(job.train_prompts, state))

        known = job.knows_embeddings()
        pipeline = pipeline or Pipeline.load(job.family, device, dtype, settings.sampler.scheduler, texts=not known)
        objective, lora = build_objective(settings.objective, settings.kernels), job.family.lora
        reference = pipeline.frozen_denoiser(dtype) if job.keeps_reference and lora is None else None
        if lora is not None:
            add_adapter(pipeline.denoiser, lora, settings.seed)
            cast_frozen(pipeline.denoiser, dtype)
        if performance.activation_checkpointing:
            pipeline.denoiser.enable_gradient_checkpointing()
        encode = choose_encoder(
            TextEncoder(pipeline, dtype).encode, job.train_prompts, stored=settings.prompts.stored_embeddings, device=device,
            dtype=dtype, known=known,
        )  # fmt: skip
        if settings.prompts.stored_embeddings:  # evaluation prompts and the empty one are there too
            pipeline.release_text_encoders()

        state.follow(
            {
                "micro_batch": schedule.micro_batch, "reference": schedule.micro_batch, "rollout": settings.sampler.rollout_batch,
                "spread": [job.world_size, job.config.stage, job.config.offloads],
            }
        )  # fmt: skip
        footprint = job.footprint(cuda=device.type == "cuda")
        state.micro_batch, plan, available = micro_batch.fit(
            footprint, pipeline.denoiser, job.family,
            # A resumed run keeps its micro-batch, whatever is free now: another one would round differently.
            wanted=state.micro_batch or (None if schedule.micro_batch == "auto" else schedule.micro_batch),
            most=job.rows_per_update, local_ranks=distributed.local_ranks(),
            agree=lambda size: distributed.all_reduce([size], "min")[0],
        )  # fmt: skip
        async_save, plan = choose_async_save(
            kept.async_save, plan, footprint, available, free_bytes(torch.device("cpu"), distributed.local_ranks()),
            agree=lambda fits: distributed.all_reduce([float(fits)], "min")[0] > 0,
        )  # fmt: skip
        engine = ZeroEngine(
            pipeline.denoiser, settings.optimizer, job.config, device, performance.coalesce_gradients, fused.value == "on",
            settings.model.ema_decay,
        )  # fmt: skip
        acceleration = speed_up(job, engine, reference, pipeline.vae, state, device, output)
        acceleration.decisions |= decisions | {"fused_optimizer": fused}
        if acceleration.shares_halves:  # in every pass alike, so that log-probs that are compared round alike
            job = replace(job, policy=replace(job.policy, predict=partial(job.policy.predict, shared=True)))

        stream = PromptStream(
            job.train_prompts, seed=settings.seed, prompts_per_epoch=schedule.prompts_per_epoch, rank=distributed.rank(),
            world_size=job.world_size,
        )  # fmt: skip
        # On a CPU the rewards would take the denoiser's own cores.
        in_background = {"on": True, "off": False, "auto": device.type != "cpu"}[performance.background_rewards]
        telemetry = Telemetry(
            output if distributed.is_main() else None, total_epochs=schedule.epochs, first_epoch=state.epoch,
            tracking=settings.tracking, recipe=recipe_for_others(settings.model_dump(mode="json")), run_ids=state.trackers,
        )  # fmt: skip
        state.trackers |= telemetry.run_ids
        return cls(
            job, output, state, checkpoints, pipeline, encode, objective, engine, reference, acceleration, stream,
            BackgroundScores(in_background), telemetry, plan, available, async_save,
        )  # fmt: skip

    # The loop.

    def train(self) -> dict[str, Any]:
        """Run the job, or what is left of it. Algorithm 1 of the paper, E epochs of:

            collect   N prompts; B trajectories of each, sampled from the policy (its step is eq. 4); their images' rewards; and
                      the same steps' log-probs under the reference
            update    K gradient steps on the proximal loss (Appendix G)

        Returns: the summary, also in summary.json.
        """
        with self.telemetry, contextlib.closing(self.scorer), self.saved_if_stopped():
            self.say_hello()
            self.resume()
            before = self.evaluate_before()
            while not self.finished():
                with self.one_line_if_out_of_memory():
                    experience = self.repeatable(f"epoch {self.state.epoch}", self.collect)
                    report = self.update(experience)
                self.log(experience, report)
                best = self.evaluate_if_due(before)
                self.save_if_due(best)
            return self.finish(before)

    def collect(self) -> Experience:
        """What one epoch learns from. Noise and subsets follow from the seed and the epoch: a repetition has the same."""
        with self.telemetry.phase("prompts"), agree():  # prompts may have to come from far
            prompts = self.stream.epoch(self.state.epoch)
            embeddings = self.encode(prompts)
        trajectories = self.sample(prompts, embeddings)
        with self.telemetry.phase("decode"), agree():
            images, shown = self.pipeline.decode_checked(trajectories.latents[:, -1], say=self.telemetry.message)
        with self.telemetry.phase("decode"):
            lost, lost_anywhere = self.watch.lost_images(trajectories, shown)
        rows = [prompt for prompt in prompts for _ in range(self.job.settings.schedule.images_per_prompt)]
        scoring = self.scorer.start(
            partial(self.job.rewards.score, images, [row.text for row in rows], [row.metadata for row in rows])
        )
        reference = None
        if self.objective.needs_reference and self.engine.updates > 0:  # before the first update the policy is the reference
            reference = self.reference_log_probs(trajectories)
            self.watch.check_reference(reference, lost)
        with self.telemetry.phase("reward"), agree():
            scores = scoring().without(lost)
        return Experience(trajectories, scores, reference, nonfinite_images=lost_anywhere)

    def sample(self, prompts: list[Prompt], embeddings: TextEmbeddings) -> Trajectories:
        """B trajectories of each prompt from the current policy. embeddings: one row per prompt."""
        settings = self.job.settings
        sampling = self.engine.sampling_denoiser if self.job.on_policy else self.base_denoiser
        with self.telemetry.phase("rollout"), sampling() as denoiser, agree():
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
        with self.telemetry.phase("reference"), self.reference_denoiser() as frozen, agree():
            return self.in_batches(
                "reference", self.state.batches.get("reference", self.micro_batch),
                lambda size: reference_pass(
                    self.job.policy, frozen, trajectories, size, timesteps, self.step_weights(trajectories)
                ),
            )  # fmt: skip

    def update(self, experience: Experience) -> UpdateReport:
        """K gradient steps on what was collected."""
        schedule, state = self.job.settings.schedule, self.state
        experience.scores, state.seen_rewards, experience.divisors = self.job.rewards.normalised(
            experience.scores, state.seen_rewards, distributed.all_reduce
        )
        self.watch.check_rewards(experience.scores)
        statistics = self.prompt_statistics(experience)
        applied = self.engine.updates
        with self.telemetry.phase("update"):
            try:
                report = run_updates(
                    self.job.policy, self.engine, self.objective, experience.trajectories, experience.scores.total,
                    reference=experience.reference, updates=schedule.updates_per_epoch, micro_batch=self.micro_batch,
                    last_drift=state.last_drift, reduce=distributed.all_reduce, timesteps=schedule.update_timesteps,
                    step_weights=self.step_weights(experience.trajectories), skipped_in_row=state.skipped_in_row,
                    say=self.telemetry.message, statistics=statistics, on_policy=self.job.on_policy,
                )  # fmt: skip
            except OneRankError:
                raise
            except UserError as error:  # on every rank: out of memory
                if self.engine.updates > applied:  # the weights are between two epochs
                    raise
                self.watch.stop(str(error))
        state.micro_batch = report.micro_batch
        return report

    def prompt_statistics(self, experience: Experience) -> torch.Tensor | None:
        """(G, 2): what the run has seen of the rewards of each prompt, this epoch's included; None if nothing asks for it."""
        objective = self.job.settings.objective
        if not isinstance(objective, DdpoSettings) or objective.normalization != "running":
            return None
        trajectories = experience.trajectories
        return update_statistics(
            self.state.prompt_rewards, [prompt.index for prompt in trajectories.prompts],
            experience.scores.total.view(-1, trajectories.images_per_prompt), buffer=objective.running_buffer,
            min_count=objective.running_min_count, gather=distributed.gather_objects,
        )  # fmt: skip

    def log(self, experience: Experience, report: UpdateReport) -> None:
        """Count the epoch as finished, and tell what it did."""
        state, epoch, count = self.state, self.state.epoch, len(experience.scores.total) * self.job.world_size
        self.watch.count(report, experience.nonfinite_images)
        phases = ("rollout", "reference")
        own_batches = [-float(state.batches.get(phase, math.inf)) for phase in phases]
        state.last_drift, *batches = distributed.all_reduce([report.drift, *own_batches], "max")
        state.batches = {phase: int(-size) for phase, size in zip(phases, batches, strict=True) if size > -math.inf}
        if warning := drift_warning(state.last_drift, self.job.clip_range, self.told_drift):
            self.told_drift = state.last_drift
            self.telemetry.message(f"epoch {epoch}: {warning}")
        steps = torch.arange(len(self.job.transitions))
        own_rows = [float(experience.reference.denoiser_rows if experience.reference else 0), float(report.denoiser_rows)]
        reference_rows, update_rows = distributed.all_reduce(own_rows, "sum")
        state.finish_epoch(
            count, rollout=count * self.job.policy.evaluations(steps), reference=int(reference_rows), update=int(update_rows)
        )  # fmt: skip
        finished, drawn = self.stream.position(state.epoch)
        position = {"position/pass": finished, "position/prompt": drawn}
        if state.skipped_shards is not None:
            position["skipped_shards"] = len(state.skipped_shards)
        self.telemetry.log_epoch(epoch, epoch_metrics(experience, report) | position, count)
        self.watch.check_updates(epoch, report)

    def finished(self) -> bool:
        schedule, state = self.job.settings.schedule, self.state
        if state.epoch >= schedule.epochs or self.stopped_over_optimised:
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
        for note in (*self.job.family.notes, *self.job.step_lines()):
            say(note)
        for file in state.skipped_shards or ():
            place = self.job.train_prompts.directory.place(file)
            say(f"prompts.on_corrupt skip: prompt shard {place} is damaged, and no pass over the set has its prompts")
        say(self.memory_plan.table())
        say(str(self.acceleration))
        if self.output is not None and distributed.is_main():
            remember(self.acceleration, self.output, say)
        if self.job.settings.schedule.micro_batch == "auto":
            say(f"schedule.micro_batch auto: {state.micro_batch}")
        if not self.memory_plan.fits(self.available_bytes):
            say(f"that may not fit: {format_bytes(self.available_bytes)} is free, and a tenth should stay so")
        if self.job.settings.checkpoint.async_save == "auto" and not self.async_save:
            say("checkpoint.async_save auto: off, there is no room for a copy of what a checkpoint consists of")

    def resume(self) -> None:
        """Continue after the chosen checkpoint, if there is one: weights, optimizer, moving average; `state` is read already."""
        ranks.enter("resume", self.state.epoch)
        latest = self.checkpoints.load(self.engine.load)
        if latest is not None:
            if fault := self.watch.weight_fault():
                raise UserError(self.checkpoints.damaged(fault))
            resharded = f", resharded from {self.engine.resharded}" if self.engine.resharded else ""
            self.telemetry.message(f"continuing after epoch {self.state.epoch} from {latest.name}{resharded}")
        self.state.start_clock()

    def finish(self, before: dict[str, Evaluation]) -> dict[str, Any]:
        """Save, evaluate again, export.

        Returns: the summary.
        Raises: UserError if nothing was learnt, or if the last checkpoint could not be saved.
        """
        unsaved = self.watch.save(then="evaluation and export follow all the same")
        self.watch.check_learnt()
        after = self.evaluate(list(before)) if before else {}
        with self.engine.averaged():
            weights = self.engine.full_state_dict()
        summary: dict[str, Any] = {"evaluation": results.compare_all(before, after)}
        for warning in over_optimised(summary["evaluation"]):
            self.telemetry.message(warning)
        if distributed.is_main() and self.output is not None:
            phase_s = {name: round(seconds, 3) for name, seconds in self.telemetry.phase_seconds.items()}
            summary |= self.state.summary() | {"phase_s": phase_s}
            results.write(self.output, self.job, self.pipeline, weights, before, after, summary, self.telemetry)
        distributed.barrier()
        repository = self.job.settings.model.push_to_hub
        if distributed.is_main() and self.output is not None and repository is not None:  # the others do not wait for it
            self.telemetry.message(results.push(self.output / run_directory.EXPORT, repository))
        if unsaved:
            raise UserError(
                f"the model is exported, but the run's last {unsaved}; make room, or lift a limit of file sizes, and go on with "
                f"--resume {self.output} for the epochs after that one"
            )
        return summary

    @contextlib.contextmanager
    def saved_if_stopped(self) -> Iterator[None]:
        """A stop leaves a checkpoint of the last finished epoch, in whose weights a run is wherever it may be stopped.

        An error that every rank has waits for the checkpoint that is on its way.
        """
        try:
            yield
        except Exception as error:
            if self.job.world_size == 1 or (isinstance(error, UserError) and not isinstance(error, OneRankError)):
                self.watch.settle()
            raise
        except Stopped as stop:
            ranks.enter("checkpoint", self.state.epoch)
            if self.state.epoch:
                unsaved = self.watch.save()
                stop.kept = (
                    unsaved or f"{self.state.epoch} of {self.job.settings.schedule.epochs} epochs are saved in {self.output}"
                )
                if unsaved:
                    stop.request = stop.request._replace(status=2)
            raise

    def save_if_due(self, best: bool) -> None:
        """Args: best: the epoch has been evaluated, and is the best so far by `checkpoint.keep_best`."""
        every, epoch = self.job.settings.checkpoint.every, self.state.epoch
        if best or epoch % every == 0:
            with self.telemetry.phase("checkpoint", throughput=False):
                due = (epoch // every + 1) * every
                self.watch.save(
                    f"make room: training goes on, and tries again after epoch {due} or at the end",
                    # After the last epoch there is nothing that could go on meanwhile.
                    behind=self.async_save and epoch < self.job.settings.schedule.epochs,
                )
        elif self.checkpoints.behind is not None:
            with self.telemetry.phase("checkpoint", throughput=False):
                self.watch.settle(wait=False)

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
        self.telemetry.message(
            f"{run_directory.EVALUATION_BEFORE} is missing or damaged, or another run's: the reference is evaluated again"
        )

        def run() -> dict[str, Evaluation]:
            with self.base_denoiser() as denoiser:
                return {name: self.evaluate_set(denoiser, name) for name in names}

        return self.repeatable("evaluation", run)

    def evaluate_set(self, denoiser: Any, name: str) -> Evaluation:
        settings, prompts = self.job.settings, self.job.evaluation_prompts[name]
        ranks.enter("evaluate")
        with agree():
            part = evaluate(
                self.job.policy, denoiser, self.pipeline, self.encode, self.job.rewards,
                prompts[distributed.rank() :: self.job.world_size], images_per_prompt=settings.evaluation.images_per_prompt,
                batch=self.rollout_batch, seed=settings.evaluation.seed, held_rewards=self.job.held_rewards,
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
        prompts = {name: [prompt.text for prompt in held] for name, held in self.job.evaluation_prompts.items()}
        before = results.load_or_run(self.output, prompts, lambda: self.evaluate_reference(list(prompts)))
        if before and self.state.epoch == 0:
            results.write_samples(self.output, "before", before["unseen"], self.telemetry, 0)
        return before

    def evaluate_if_due(self, before: dict[str, Evaluation]) -> bool:
        """The seen set, and the unseen one if `checkpoint.keep_best` is of it. Returns: whether it is the best so far by that."""
        every, state, keep_best = self.job.settings.evaluation.every, self.state, self.job.settings.checkpoint.keep_best
        if not before or not every or state.epoch % every:
            return False
        names = ["seen", *(["unseen"] if keep_best and keep_best.split("/")[1] == "unseen" else [])]
        with self.telemetry.phase("evaluate", throughput=False):
            found = self.evaluate(names)
        scalars: dict[str, float] = {}
        for name, one in found.items():
            scalars[f"evaluation/{name}"] = one.summary()["mean"]
            scalars |= {f"evaluation/{name}/held/{reward}": mean_and_error(held)["mean"] for reward, held in one.held.items()}
        self.telemetry.log_scalars(state.epoch - 1, scalars)
        for warning in over_optimised(results.compare_all({name: before[name] for name in names}, found)):
            self.telemetry.message(f"epoch {state.epoch - 1}: {warning}")
            self.stopped_over_optimised = self.job.settings.evaluation.on_over_optimised == "stop"
        if self.stopped_over_optimised:
            self.telemetry.message(
                f"evaluation.on_over_optimised: stopping after {state.epoch} of {self.job.settings.schedule.epochs} epochs; "
                f"model/ is of these weights, those of the best evaluation by {keep_best} are exported by "
                f"prdp checkpoint export {self.output} DIR --best"
            )
        results.write_samples(self.output, f"epoch-{state.epoch:06d}", found["seen"], self.telemetry, state.epoch - 1)
        if keep_best is None or not self.checkpoints.evaluated(scalars[keep_best]):
            return False
        self.telemetry.message(
            f"{keep_best} is the best so far after epoch {state.epoch}, {scalars[keep_best]:.6g}: that checkpoint is kept"
        )
        return True

    # What the methods above share.

    def step_weights(self, trajectories: Trajectories) -> torch.Tensor | None:
        return step_weights(self.job.transitions, self.job.step_weights, trajectories.steps)

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

    @contextlib.contextmanager
    def reference_denoiser(self) -> Iterator[nn.Module]:
        """What log-ratios are taken to: the frozen model, or the moving average of the policy."""
        if self.job.averages_reference:
            with self.engine.averaged(), self.engine.whole_denoiser() as denoiser:
                yield denoiser
            return
        with self.base_denoiser() as denoiser:
            yield denoiser

    @contextlib.contextmanager
    def base_denoiser(self) -> Iterator[nn.Module]:
        """The frozen model: a copy made before training, or the trained denoiser without its adapter."""
        if self.reference is not None:
            yield self.reference
            return
        with self.engine.base_denoiser() as denoiser:
            yield denoiser

    def repeatable(self, what: str, run: Callable[[], Result]) -> Result:
        """run(), and again if a reward fails in it and the recipe says so; then the run stops, with a checkpoint, as it does for
        whatever else a rank finds in it."""
        schedule = self.job.settings.schedule
        repeats = schedule.max_repeats if schedule.on_failure == "repeat" else 0
        for repeat in itertools.count(1):
            try:
                return run()
            except RewardError as error:  # on every rank, see `agree`
                if repeat > repeats:
                    # The weights are those after the last finished epoch: nothing computed is lost.
                    saved = self.watch.save_last() if self.state.epoch else "no epoch is finished"
                    raise RewardError(
                        f"{error}; stopped in {what}, {saved}: mend the reward and give the same command with --resume "
                        f"{self.output}"
                    ) from error
                self.telemetry.message(f"{what}: {error}; repeating it, {repeat} of {repeats}")
            except AgreedError as error:
                fault = str(error)  # and not the error, whose traceback may hold what the memory is full of
                break
        self.watch.stop(f"{fault}; stopped in {what}")


def whole_shards(prompts: PromptSet, state: TrainState) -> PromptSet:
    """The trained set without its damaged shards. Rank 0 looks for them before the first epoch; from then on they are these.

    Raises: UserError.
    """
    if state.skipped_shards is None:
        with agree():
            found = prompts.corrupt_shards() if distributed.is_main() else []
        state.skipped_shards = distributed.from_main(found)
    return prompts.without(state.skipped_shards)
