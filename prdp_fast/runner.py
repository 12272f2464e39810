"""One job, top to bottom.

prompts -> embeddings -> rollout -> rewards -> reference log-probs -> weights -> gradient pass -> optimizer step
"""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from prdp_fast import checkpoint as checkpoints
from prdp_fast import cost, memory, reporting, zero
from prdp_fast.errors import RewardError, UserError
from prdp_fast.evaluation import Evaluation, compare, evaluate
from prdp_fast.files import write_json
from prdp_fast.models.acceleration import Acceleration, Ranks, UNets, accelerate
from prdp_fast.models.lora import adapter_off, add_adapter
from prdp_fast.models.pipeline import Pipeline, load_scheduler
from prdp_fast.models.process import choose_fused_optimizer, prepare_process
from prdp_fast.models.shapes import Shapes
from prdp_fast.models.text import TextEncoder
from prdp_fast.objectives import build_objective
from prdp_fast.prompts.embeddings import PROBES, StoredEmbeddings, has_embeddings
from prdp_fast.prompts.stream import PromptSet, PromptStream
from prdp_fast.publishing import push, write_model_card
from prdp_fast.records import Prompt, Scores, TextEmbeddings, Trajectories
from prdp_fast.rewards import BackgroundScores, WeightedRewards, build_rewards
from prdp_fast.sampling.policy import Policy
from prdp_fast.sampling.rollout import rollout
from prdp_fast.sampling.transitions import Transitions
from prdp_fast.settings import Settings
from prdp_fast.telemetry import Telemetry
from prdp_fast.update import Reference, drift_warning, reference_pass, run_updates
from prdp_kernels import dispatch

ACCELERATION = "acceleration.json"  # of a run directory: what was chosen when it first started
GRID_PROMPTS = 24  # pictures of a sample grid
COMPARED_PROMPTS = 12  # of the picture that sets before against after

Result = TypeVar("Result")


@dataclass(frozen=True)
class Job:
    """Everything that can be checked without a weight in memory."""

    settings: Settings
    config: zero.ZeroConfig
    world_size: int
    transitions: Transitions
    train_prompts: PromptSet
    evaluation_prompts: dict[str, list[Prompt]]  # "seen", "unseen"
    rewards: WeightedRewards

    @classmethod
    def prepare(cls, settings: Settings, config_name: str, *, world_size: int, cuda: bool) -> Job:
        """Resolve and check the whole job. Raises: UserError, before anything is loaded."""
        settings.check_ranks(world_size)
        check_kernels(settings.kernels, cuda)
        evaluation, prompts = settings.evaluation, settings.prompts
        if 0 < evaluation.prompts < world_size:
            raise UserError(f"evaluation.prompts is {evaluation.prompts}, fewer than the {world_size} ranks; raise it or set 0")
        rewards = build_rewards(settings.rewards)
        scheduler = load_scheduler(settings.model.pretrained)
        if settings.model.lora is not None:
            Shapes.load(settings.model.pretrained, settings.model.lora).meta_unet()  # refuses an adapter that does not fit
        transitions = Transitions.from_scheduler(scheduler, settings.sampler.num_inference_steps, settings.sampler.eta)
        config = zero.resolve_config(
            config_name, settings, world_size=world_size, stochastic_steps=len(transitions.stochastic), cuda=cuda
        )
        if settings.model.ema_decay is not None and config.stage == 3:
            raise UserError(
                f"model.ema_decay with config {config.path.name}: at ZeRO stage 3 no average is kept; use stage 0, 1 or 2, or "
                "set ema_decay null"
            )
        check_steps(settings, transitions)
        train = PromptSet.open(prompts.source, prompts.train, limit=prompts.limit)
        if prompts.stored_embeddings and not has_embeddings(train.directory):
            raise UserError(
                f"prompts.stored_embeddings is set, but {train.directory} has none; run 'prdp embed {train.directory} --model "
                f"{settings.model.pretrained}', or set it false"
            )
        PromptStream(train, seed=settings.seed, prompts_per_epoch=settings.schedule.prompts_per_epoch, world_size=world_size)
        held = {}
        if evaluation.prompts:
            # With a limited training set, "seen" means the prompts that are trained on.
            seen = train if prompts.limit else PromptSet.open(prompts.source, prompts.seen)
            unseen = PromptSet.open(prompts.source, prompts.unseen)
            for name, prompt_set in (("seen", seen), ("unseen", unseen)):
                held[name] = prompt_set.draw(min(evaluation.prompts, len(prompt_set)), seed=evaluation.seed)
        return cls(settings, config, world_size, transitions, train, held, rewards)

    def record(self) -> dict[str, Any]:
        """What identifies the job in its run directory."""
        return {
            "recipe": self.settings.model_dump(mode="json"),
            "prompts": self.train_prompts.fingerprint,  # a directory may have been rebuilt under the same name
            "deepspeed": self.config.values,
            "world_size": self.world_size,
        }

    def forwards_per_epoch(self) -> dict[str, int]:
        """U-Net rows of one epoch over all ranks, on the fast path (DESIGN: rollout 2T, reference 2T, update K 2T)."""
        return {name: round(phase.forward) for name, phase in self.epoch_rows().items()}

    def epoch_rows(self) -> dict[str, cost.PhaseRows]:
        policy = build_policy(self.settings, self.transitions)
        return cost.epoch_rows(self.settings.schedule, policy, needs_reference=self.needs_reference)

    @property
    def needs_reference(self) -> bool:
        return build_objective(self.settings.objective).needs_reference

    def dry_run(self, device_name: str | None) -> list[str]:
        """What an epoch costs and a rank holds, line by line, from configurations alone. Nothing is loaded.

        Args: device_name: of the GPU, whose peak may be known; None on a CPU.
        """
        settings, schedule, cuda = self.settings, self.settings.schedule, device_name is not None
        recompute = settings.performance.activation_checkpointing
        shapes = Shapes.load(settings.model.pretrained, settings.model.lora)
        peak = cost.device_peak(device_name, self.config.dtype) if device_name else None
        lines = cost.describe(
            self.epoch_rows(), cost.unet_flop(shapes), recompute=recompute, peak=peak, gpus=self.world_size,
            backward=cost.backward_per_forward(shapes),
        )  # fmt: skip
        if shapes.lora is not None:
            trained, whole = shapes.trained_parameters, shapes.unet_parameters
            lines.insert(0, f"LoRA of rank {shapes.lora.rank}: {trained} weights are trained, {whole - trained} stay as they are")
        job = self.footprint(shapes, cuda=cuda)
        job = replace(job, activations=memory.fake_activations(shapes, self.config.dtype, checkpointing=recompute))
        available = memory.free_bytes(torch.device("cuda" if cuda else "cpu"), zero.launched_local_ranks())
        size, about = schedule.micro_batch, ""
        if size == "auto":
            most = self.rows_per_update if cuda else min(self.rows_per_update, memory.CPU_MICRO_BATCH)
            size, about = memory.choose_micro_batch(job, available, most=most), "auto, about "
        plan = memory.plan_memory(replace(job, micro_batch=size))
        each = " (2 U-Net rows each with guidance)" if job.evaluations == 2 else ""
        lines.append(
            f"one update of a rank: {self.rows_per_update} rows (trajectory, timestep){each}, "
            f"micro-batch {about}{size}: {-(-self.rows_per_update // size)} backward passes"
        )
        verdict = "fits" if plan.fits(available) else "may not fit"
        return [*lines, plan.table(), f"  {verdict}: {memory.human(available)} free on this machine's {'GPU' if cuda else 'CPU'}"]

    def footprint(self, shapes: Shapes, *, cuda: bool, micro_batch: int = 1) -> memory.Footprint:
        """What the job holds; activations are still to be measured."""
        return memory.Footprint.of(
            self.settings, self.config, shapes, memory.Activations(0), micro_batch, world_size=self.world_size,
            needs_reference=self.needs_reference, cuda=cuda,
        )  # fmt: skip

    @property
    def rows_per_update(self) -> int:
        """Of one rank: more in a micro-batch there never are."""
        schedule, stochastic = self.settings.schedule, len(self.transitions.stochastic)
        images = schedule.prompts_per_epoch * schedule.images_per_prompt // self.world_size
        return images * min(schedule.update_timesteps or stochastic, stochastic)


def build_policy(settings: Settings, transitions: Transitions) -> Policy:
    sampler = settings.sampler
    return Policy(transitions, sampler.guidance_scale, settings.kernels, sampler.guidance_interval)


def check_kernels(kernels: str, cuda: bool) -> None:
    """Raises: UserError if the recipe insists on kernels that cannot run here."""
    if kernels == "triton" and not (dispatch.HAS_TRITON and (cuda or dispatch.interpreted())):
        raise UserError(
            f"kernels is 'triton', but {'there is no CUDA device' if dispatch.HAS_TRITON else 'triton is not installed'}; "
            "set kernels to 'auto', or TRITON_INTERPRET=1 in the environment to run them, slowly, on a CPU"
        )


def check_steps(settings: Settings, transitions: Transitions) -> None:
    """Raises: UserError where the recipe speaks of steps that the schedule does not have."""
    count = len(transitions.stochastic)
    for name in ("update_timesteps", "reference_timesteps"):
        wanted = getattr(settings.schedule, name)
        if wanted is not None and wanted > count:
            raise UserError(
                f"schedule.{name} is {wanted}, more than the {count} stochastic steps of the sampler; lower it or remove it"
            )
    policy = build_policy(settings, transitions)
    if settings.sampler.guidance_interval is not None and not policy.guided.any():
        raise UserError(
            f"sampler.guidance_interval {list(settings.sampler.guidance_interval)} holds none of the sampler's timesteps "
            f"{transitions.timesteps.tolist()}; widen it, or set guidance_scale null to sample without guidance"
        )


@dataclass
class Progress:
    """What a resumed run needs beside weights and optimizer; everything else follows from the epoch number."""

    epoch: int = 0  # epochs finished, and so the position in the prompt stream
    images: int = 0
    wall_s: float = 0.0
    last_drift: float | None = None
    micro_batch: int | None = None  # what it came down to, chosen or halved
    seen_rewards: dict[str, list[float]] = field(default_factory=dict)  # moments of those with a running normalisation
    unet_forwards: dict[str, int] = field(default_factory=lambda: {"rollout": 0, "reference": 0, "update": 0})


def train(job: Job, output: Path, device: torch.device) -> dict[str, Any]:
    """Run or continue the job in `output`, which is claimed already. Returns: the summary, also written to summary.json."""
    settings, schedule = job.settings, job.settings.schedule
    rank, world_size = zero.launched_rank(), job.world_size
    is_main = rank == 0

    # Build.
    performance = settings.performance
    process = prepare_process(performance, device, job.config.dtype)
    fused = choose_fused_optimizer(performance.fused_optimizer, device, job.config.offloads_optimizer)
    pipeline = Pipeline.load(settings.model.pretrained, device, frozen_dtype=job.config.dtype)
    encode = choose_encoder(job, TextEncoder(pipeline, job.config.dtype), device)
    policy = build_policy(settings, job.transitions)
    objective = build_objective(settings.objective, settings.kernels)
    lora = settings.model.lora
    # With an adapter the reference is the same U-Net without it.
    reference = pipeline.reference_unet(job.config.dtype) if objective.needs_reference and lora is None else None
    if lora is not None:
        add_adapter(pipeline.unet, lora, settings.seed)
    if performance.activation_checkpointing:
        pipeline.unet.enable_gradient_checkpointing()
    store = checkpoints.Checkpoints(output, keep=settings.checkpoint.keep, is_main=is_main, barrier=zero.barrier)
    latest = store.latest()
    progress = Progress(**checkpoints.read_state(latest)) if latest else Progress()
    shapes = Shapes.load(settings.model.pretrained, lora)
    # A resumed job keeps its micro-batch, whatever is free now: another one would round differently.
    wanted = progress.micro_batch or (None if schedule.micro_batch == "auto" else schedule.micro_batch)
    progress.micro_batch, plan, available = memory.fit(
        job.footprint(shapes, cuda=device.type == "cuda"), pipeline.unet, shapes, wanted=wanted, most=job.rows_per_update,
        local_ranks=zero.launched_local_ranks(), agree=lambda size: zero.all_reduce([size], "min")[0],
    )  # fmt: skip
    engine = zero.ZeroEngine(
        pipeline.unet, settings.optimizer, job.config, device, performance.coalesce_gradients, fused.value == "on",
        settings.model.ema_decay,
    )  # fmt: skip
    speed = speed_up(job, engine, reference, shapes, progress.micro_batch, device, output / ACCELERATION)
    speed.decisions |= process | {"fused_optimizer": fused}
    # On a CPU the rewards would take the U-Net's own cores.
    scorer = BackgroundScores(
        performance.background_rewards == "on" or (performance.background_rewards == "auto" and device.type != "cpu")
    )
    stream = PromptStream(
        job.train_prompts, seed=settings.seed, prompts_per_epoch=schedule.prompts_per_epoch, rank=rank, world_size=world_size
    )
    if latest:
        engine.load(latest)
    started = time.monotonic() - progress.wall_s

    def save() -> None:
        progress.wall_s = time.monotonic() - started
        store.save(progress.epoch, engine.save, progress.__dict__)

    def evaluate_sets(names: list[str]) -> dict[str, Evaluation]:
        results = {}
        with engine.averaged(), engine.sampling_unet() as unet:
            for name in names:
                prompts = job.evaluation_prompts[name]
                with agree_on_rewards():
                    part = evaluate(
                        policy, unet, pipeline, encode, job.rewards, prompts[rank::world_size],
                        images_per_prompt=settings.evaluation.images_per_prompt, batch=settings.sampler.rollout_batch,
                        seed=settings.evaluation.seed,
                    )  # fmt: skip
                results[name] = Evaluation.merge(zero.gather_objects(part), len(prompts))
        return results

    telemetry_files = Telemetry(output if is_main else None, total_epochs=schedule.epochs, first_epoch=progress.epoch)
    with telemetry_files as telemetry, contextlib.closing(scorer):
        telemetry.message(plan.table())
        telemetry.message(str(speed))
        if is_main and not (output / ACCELERATION).exists():
            write_json(output / ACCELERATION, speed.record())
        if schedule.micro_batch == "auto":
            telemetry.message(f"schedule.micro_batch auto: {progress.micro_batch}")
        if not plan.fits(available):
            telemetry.message(f"that may not fit: {memory.human(available)} is free, and a tenth should stay so")
        if latest:
            telemetry.message(f"continuing after epoch {progress.epoch} from {latest.name}")

        def unless_rewards_fail(what: str, run: Callable[[], Result]) -> Result:
            """run(), and again if a reward fails in it and the recipe says so; then the run stops, with a checkpoint."""
            repeats = schedule.max_repeats if schedule.on_failure == "repeat" else 0
            for repeat in itertools.count(1):
                try:
                    return run()
                except RewardError as error:  # every rank has it, see agree_on_rewards
                    if repeat > repeats:
                        if progress.epoch:
                            save()  # the weights are those after the last finished epoch: nothing computed is lost
                        raise RewardError(
                            f"{error}; stopped in {what}, {progress.epoch} finished epochs are saved: mend the reward and give "
                            f"the same command with --resume {output}"
                        ) from error
                    telemetry.message(f"{what}: {error}; repeating it, {repeat} of {repeats}")
            raise AssertionError("unreachable")

        def collect(epoch: int) -> tuple[Trajectories, Scores, Reference | None]:
            """What an epoch learns from. Noise and subsets follow from the seed and the epoch: a repetition has the same."""
            assert progress.micro_batch is not None
            with telemetry.phase("prompts"):
                prompts = stream.epoch(epoch)
                embeddings = encode(prompts)
            with telemetry.phase("rollout"), engine.sampling_unet() as unet:
                trajectories = rollout(
                    policy, unet, prompts, embeddings, images_per_prompt=schedule.images_per_prompt,
                    latent_shape=pipeline.latent_shape, batch=settings.sampler.rollout_batch, seed=settings.seed, epoch=epoch,
                )  # fmt: skip
            with telemetry.phase("decode"):
                images = pipeline.decode(trajectories.latents[:, -1])
            rows = [prompt for prompt in prompts for _ in range(schedule.images_per_prompt)]
            scoring = scorer.start(partial(job.rewards.score, images, [row.text for row in rows], [row.metadata for row in rows]))
            reference_rows = None
            if objective.needs_reference and engine.updates > 0:  # before the first update the policy is the reference
                with telemetry.phase("reference"), reference_unet(engine, reference) as frozen:
                    reference_rows = reference_pass(
                        policy, frozen, trajectories, progress.micro_batch, schedule.reference_timesteps
                    )  # fmt: skip
            with telemetry.phase("reward"), agree_on_rewards():
                scores = scoring()
            return trajectories, scores, reference_rows

        def evaluate_all() -> dict[str, Evaluation]:
            return unless_rewards_fail("evaluation", lambda: evaluate_sets(list(job.evaluation_prompts)))

        before = load_or_run(output / "evaluation_before.pt", evaluate_all, is_main)
        if is_main and before and progress.epoch == 0:
            write_grid(before["unseen"], output / "samples" / "before.png", telemetry, 0)

        # Train.
        told_drift = 0.0
        for epoch in range(progress.epoch, schedule.epochs):
            if schedule.time_limit_minutes is not None:
                # The slowest clock decides for all ranks.
                elapsed = zero.all_reduce([time.monotonic() - started], "max")[0] / 60
                if elapsed > schedule.time_limit_minutes:
                    telemetry.message(f"schedule.time_limit_minutes: stopping after {epoch} of {schedule.epochs} epochs")
                    break

            trajectories, scores, reference_rows = unless_rewards_fail(f"epoch {epoch}", partial(collect, epoch))
            scores, progress.seen_rewards, divisors = job.rewards.normalised(scores, progress.seen_rewards, zero.all_reduce)
            with telemetry.phase("update"):
                report = run_updates(
                    policy, engine, objective, trajectories, scores.total, reference=reference_rows,
                    updates=schedule.updates_per_epoch, micro_batch=progress.micro_batch, last_drift=progress.last_drift,
                    reduce=zero.all_reduce, timesteps=schedule.update_timesteps, say=telemetry.message,
                )  # fmt: skip
            progress.micro_batch = report.micro_batch

            count = len(scores.total) * world_size
            progress.epoch, progress.images = epoch + 1, progress.images + count
            progress.last_drift = zero.all_reduce([report.drift], "max")[0]
            if warning := drift_warning(progress.last_drift, settings.objective.clip_range, told_drift):
                told_drift = progress.last_drift
                telemetry.message(f"epoch {epoch}: {warning}")
            progress.unet_forwards["rollout"] += count * policy.evaluations(torch.arange(len(job.transitions)))
            own_rows = [0.0 if reference_rows is None else float(reference_rows.unet_rows), float(report.unet_rows)]
            for name, unet_rows in zip(("reference", "update"), zero.all_reduce(own_rows, "sum"), strict=True):
                progress.unet_forwards[name] += int(unet_rows)
            metrics = reduce_metrics(scores, report.metrics)
            metrics |= {f"reward_divisor/{name}": value for name, value in divisors.items()}
            metrics["free_first_pass"] = float(report.free_first_pass)
            if report.drift_by_step is not None:
                metrics |= {f"drift/step_{step:03d}": float(value) for step, value in enumerate(report.drift_by_step)}
            telemetry.log_epoch(epoch, metrics, count)
            if report.skipped_updates:
                telemetry.message(f"epoch {epoch}: {report.skipped_updates} update(s) had a non-finite gradient and were skipped")

            if progress.epoch % settings.checkpoint.every == 0:
                with telemetry.phase("checkpoint", throughput=False):
                    save()
            if settings.evaluation.every and progress.epoch % settings.evaluation.every == 0 and before:
                with telemetry.phase("evaluate", throughput=False):
                    during = unless_rewards_fail("evaluation", lambda: evaluate_sets(["seen"]))["seen"]
                telemetry.log_scalars(epoch, {"evaluation/seen": during.summary()["mean"]})
                if is_main:
                    write_grid(during, output / "samples" / f"epoch-{progress.epoch:06d}.png", telemetry, epoch)

        # Finish.
        save()
        summary: dict[str, Any] = {"evaluation": {}}
        if before:
            after = evaluate_all()
            summary["evaluation"] = {name: compare(before[name], after[name]) for name in before}
            if is_main:
                torch.save({name: vars(evaluation) for name, evaluation in after.items()}, output / "evaluation_after.pt")
                write_grid(after["unseen"], output / "samples" / "after.png", telemetry, progress.epoch)
                write_comparison(before["unseen"], after["unseen"], output / "samples" / "before_after.png")
        with engine.averaged():
            state = engine.full_state_dict()
        if is_main:
            pipeline.export(output / "model", state, lora)
            summary |= {
                "epochs": progress.epoch,
                "images": progress.images,
                "wall_s": round(time.monotonic() - started, 3),
                "unet_forwards": progress.unet_forwards,
                "phase_s": {name: round(seconds, 3) for name, seconds in telemetry.phase_seconds.items()},
            }
            picture = output / "samples" / "before_after.png"
            write_model_card(output / "model", settings, type(pipeline.whole).__name__, summary, picture)
            write_json(output / checkpoints.SUMMARY, summary)
        zero.barrier()
        if is_main and settings.model.push_to_hub is not None:  # the others do not wait for it
            telemetry.message(push(output / "model", settings.model.push_to_hub))
    return summary


@contextlib.contextmanager
def reference_unet(engine: zero.ZeroEngine, copy: torch.nn.Module | None) -> Iterator[torch.nn.Module]:
    """The frozen model: a copy made before training, or the trained U-Net without its adapter."""
    if copy is not None:
        yield copy
        return
    with engine.whole_unet() as unet, adapter_off(unet):
        yield unet


@contextlib.contextmanager
def agree_on_rewards() -> Iterator[None]:
    """A reward that fails on one rank stops every rank, with the same line, instead of leaving them in a collective."""
    fault: RewardError | None = None
    try:
        yield
    except RewardError as error:
        fault = error
    messages = [message for message in zero.gather_objects(None if fault is None else str(fault)) if message]
    if messages:
        raise RewardError(messages[0]) from fault


def speed_up(
    job: Job,
    engine: zero.ZeroEngine,
    reference: torch.nn.Module | None,
    shapes: Shapes,
    micro_batch: int,
    device: torch.device,
    path: Path | None = None,
) -> Acceleration:
    """Make the job's U-Nets cheaper. path: of the run's record, whose choices are kept if it exists."""
    sampler = job.settings.sampler
    images = job.settings.schedule.prompts_per_epoch * job.settings.schedule.images_per_prompt // job.world_size
    evaluations = 1 if sampler.guidance_scale is None else 2
    remembered = json.loads(path.read_text()) if path and path.exists() else None
    speed = accelerate(
        UNets(engine.engine.module, engine.gathered, reference), job.settings.performance, shapes,
        train_rows=min(micro_batch, job.rows_per_update) * evaluations,
        sample_rows=min(sampler.rollout_batch, images) * evaluations,
        stage=job.config.stage, device=device, dtype=job.config.dtype, remembered=remembered,
        ranks=Ranks(zero.launched_rank(), zero.gather_objects),
    )  # fmt: skip
    engine.sampling_view = speed.sampling_view
    return speed


def choose_encoder(job: Job, text: TextEncoder, device: torch.device) -> Callable[[list[Prompt]], TextEmbeddings]:
    """Prompts to embeddings: the pipeline's encoder, or what it left beside the shards.

    Raises: UserError if those are another model's.
    """
    directory = job.train_prompts.directory
    stored = StoredEmbeddings.open(directory) if job.settings.prompts.stored_embeddings else None
    if stored is None:
        return text.encode
    stored.check(text.encode, list(itertools.islice(job.train_prompts, PROBES)))
    return stored.encoder(device, text.dtype)


def load_or_run(path: Path, run: Callable[[], dict[str, Evaluation]], is_main: bool) -> dict[str, Evaluation]:
    """The evaluation before training, from the run directory if an earlier start left it there."""
    if zero.gather_objects(path.exists())[0]:  # rank 0's eyes: another rank could look after rank 0 has written
        return {name: Evaluation(**fields) for name, fields in torch.load(path, weights_only=True).items()}
    results = run()
    if is_main:
        partial = path.with_suffix(".partial")
        torch.save({name: vars(evaluation) for name, evaluation in results.items()}, partial)
        partial.replace(path)
    zero.barrier()
    return results


def reduce_metrics(scores: Scores, own: dict[str, float]) -> dict[str, float]:
    """Means over the ranks: rewards over images with a score, everything else over ranks."""
    local = {"reward": scores.total} | {f"reward/{name}": part for name, part in (scores.parts | scores.details).items()}
    sums = []
    for values in local.values():
        finite = values[values.isfinite()].double()
        sums += [float(finite.sum()), float(finite.square().sum()), float(len(finite))]
    reduced = zero.all_reduce(sums + [*own.values(), 1.0], "sum")
    metrics = {}
    for number, name in enumerate(local):
        total, squares, count = reduced[3 * number : 3 * number + 3]
        metrics[name] = total / max(count, 1.0)
        if name == "reward":
            metrics["reward_std"] = max(squares / max(count, 1.0) - metrics[name] ** 2, 0.0) ** 0.5
    ranks = reduced[-1]
    return metrics | {name: value / ranks for name, value in zip(own, reduced[3 * len(local) : -1], strict=True)}


def write_grid(evaluation: Evaluation, path: Path, telemetry: Telemetry, step: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    images_per_prompt = len(evaluation.images) // len(evaluation.prompts)
    captions = [prompt for prompt in evaluation.prompts for _ in range(images_per_prompt)]
    reporting.image_grid(evaluation.images[:GRID_PROMPTS], path, columns=6, captions=captions[:GRID_PROMPTS])
    telemetry.log_image(f"samples/{path.stem}", path, step)


def write_comparison(before: Evaluation, after: Evaluation, path: Path) -> None:
    """The first image of the first prompts, before above after, with its prompt's reward."""
    part = slice(0, COMPARED_PROMPTS)
    images_per_prompt = len(before.images) // len(before.prompts)
    reporting.comparison_grid(
        before.images[::images_per_prompt][part], after.images[::images_per_prompt][part], before.prompts[part], path,
        before.rewards[part].tolist(), after.rewards[part].tolist(),
    )  # fmt: skip
