"""One job, top to bottom.

prompts -> embeddings -> rollout -> rewards -> reference log-probs -> weights -> gradient pass -> optimizer step
"""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from prdp_fast import checkpoint as checkpoints
from prdp_fast import memory, reporting, zero
from prdp_fast.errors import RewardError
from prdp_fast.evaluation.held import Evaluation, compare, evaluate
from prdp_fast.files import write_json
from prdp_fast.job import Job, build_policy
from prdp_fast.models.acceleration import Acceleration, Ranks, UNets, accelerate
from prdp_fast.models.lora import adapter_off, add_adapter
from prdp_fast.models.pipeline import Pipeline
from prdp_fast.models.process import choose_fused_optimizer, prepare_process
from prdp_fast.models.shapes import Shapes
from prdp_fast.models.text import TextEncoder
from prdp_fast.objectives import build_objective
from prdp_fast.prompts.embeddings import PROBES, StoredEmbeddings
from prdp_fast.prompts.stream import PromptStream
from prdp_fast.publishing import push, write_model_card
from prdp_fast.records import Prompt, Scores, TextEmbeddings, Trajectories
from prdp_fast.rewards import BackgroundScores
from prdp_fast.sampling.rollout import rollout
from prdp_fast.telemetry import Telemetry
from prdp_fast.update import Reference, drift_warning, reference_pass, run_updates

ACCELERATION = "acceleration.json"  # of a run directory: what was chosen when it first started
GRID_PROMPTS = 24  # pictures of a sample grid
COMPARED_PROMPTS = 12  # of the picture that sets before against after

Result = TypeVar("Result")


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

    # Build. Rewards first: what their models hold is no longer free when the micro-batch is chosen.
    with agree_on_rewards():
        job.rewards.prepare()
    performance = settings.performance
    process = prepare_process(performance, device, job.config.dtype)
    fused = choose_fused_optimizer(performance.fused_optimizer, device, job.config.offloads_optimizer)
    pipeline = Pipeline.load(settings.model.pretrained, device, job.config.dtype, settings.sampler.scheduler)
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
