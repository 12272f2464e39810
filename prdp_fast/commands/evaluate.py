"""Score a run or a model: the same prompts and the same noise for base and finetuned.

prdp evaluate runs/tiny-seed0-1a2b3c4d --prompts unseen --rewards jpeg_size --samples 64
prdp evaluate DIR_OR_HUB_ID --base OTHER --prompts animals:unseen_eval --rewards jpeg_size:quality=80
torchrun --nproc_per_node 8 -m prdp_fast.cli evaluate RUN

RUN is an output directory of training; its base is the recipe's model. Work is kept in blocks of prompts under --output: the same
command goes on where a killed one stopped. The path of evaluation.json is printed last.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from prdp_fast.core.errors import OneRankError, RewardError, UserError

if TYPE_CHECKING:
    import torch

    from prdp_fast.evaluation.blocks import Block, BlockName, Work
    from prdp_fast.evaluation.plan import Model, Plan
    from prdp_fast.models.pipeline import Pipeline

PROGRESS_S = 30.0  # between two lines of progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="RUN|MODEL", help="an output directory of training, or a diffusers directory or hub id")
    parser.add_argument(
        "--base", metavar="MODEL", help="what to compare with (default: a run's own base; without a run, nothing)"
    )
    parser.add_argument(
        "--prompts", nargs="+", metavar="SET", default=[],
        help="seen, unseen or another set of a run's source; SOURCE:NAME; a .txt file (default: a run's seen and unseen)",
    )  # fmt: skip
    parser.add_argument(
        "--rewards", nargs="+", metavar="NAME[:KEY=VALUE,...]", default=[], help="beside those of a run's recipe; values are YAML"
    )
    parser.add_argument("--samples", type=int, default=64, metavar="N", help="images a prompt (default: %(default)s)")
    parser.add_argument(
        "--limit",
        type=int,
        metavar="N",
        help="prompts drawn from a set (default: a run's evaluation.prompts; without a run, all)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="draws prompts, noise and intervals (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: RUN/evaluation, or evaluations/MODEL")
    parser.add_argument("--restart", action="store_true", help="begin anew, whatever is in --output")
    sampling = parser.add_argument_group("sampling, by default a run's own, or the recipes' defaults")
    sampling.add_argument("--scheduler", metavar="CLASS", help="DDPMScheduler or DDIMScheduler, on the model's noise schedule")
    sampling.add_argument("--steps", type=int, metavar="T")
    sampling.add_argument("--guidance", metavar="S", help="guidance scale, or none")
    sampling.add_argument("--guidance-interval", nargs=2, type=int, metavar=("FIRST", "LAST"), help="timesteps that are guided")
    sampling.add_argument("--eta", type=float, metavar="ETA")
    sampling.add_argument("--batch", type=int, metavar="N", help="images a U-Net call")
    sampling.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="default: float32 on a CPU, a run's own on a GPU"
    )
    parser.add_argument("--features", metavar="DIR", help="of a CLIP model, for diversity (default: colours on an 8 x 8 grid)")


def run(args: argparse.Namespace) -> int:
    """Raises: UserError before any work for what cannot be evaluated, RewardError if a reward fails."""
    rank = int(os.environ.get("RANK", "0"))
    try:
        return evaluate(args)
    except OneRankError:
        raise
    except UserError:
        if rank:  # every rank finds the same fault; one line is enough
            return 2
        raise


def evaluate(args: argparse.Namespace) -> int:
    import torch

    from prdp_fast.core import distributed
    from prdp_fast.core.files import write_json
    from prdp_fast.evaluation.blocks import Work
    from prdp_fast.evaluation.plan import prepare
    from prdp_fast.evaluation.report import file_name, markdown, measure, write_picture

    rank, world_size = distributed.rank(), distributed.world_size()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // distributed.local_ranks()))
    plan = prepare(args, cuda=torch.cuda.is_available())
    work = Work(plan.output)

    device, missing = agree(plan, work, restart=args.restart)
    say = (lambda text: print(text, flush=True)) if rank == 0 else (lambda text: None)
    compute(plan, work, missing[rank::world_size], device, say)
    if rank:
        return 0
    names = plan.blocks()
    work.wait(names, say)
    sets = {}
    pictures = []
    for number, (label, prompts) in enumerate(plan.prompts.items()):
        blocks = {role: [work.load(name) for name in names if name[:2] == (role, number)] for role in plan.models}
        texts = [prompt.text for prompt in prompts]
        sets[label] = measure(texts, blocks, plan.trained, args.seed)
        pictures.append(write_picture(texts, blocks, plan.output / "samples" / f"{number}-{file_name(label)}.png"))
    result = {"settings": plan.settings, "sets": sets}
    path = plan.output / "evaluation.json"
    write_json(path, result, indent=None)  # a line a number would be most of the file
    text = markdown(result)
    partial = plan.output / ".evaluation.md.partial"
    partial.write_text(text, encoding="utf-8")
    partial.replace(plan.output / "evaluation.md")
    print(text)
    print(*pictures, path, sep="\n", flush=True)
    return 0


def agree(plan: Plan, work: Work, *, restart: bool) -> tuple[torch.device, list[BlockName]]:
    """This rank's device, and the blocks that are still to be done, the same on every rank. Raises: UserError on every rank."""
    import torch

    from prdp_fast.core import distributed

    if distributed.world_size() == 1:
        work.claim(plan.settings, restart=restart)
        return torch.device("cuda" if torch.cuda.is_available() else "cpu"), work.missing(plan.blocks())
    # Rank 0 looks at the directory, and every rank hears its verdict. After that none waits for another in a collective, which
    # would time out: how long a share takes differs.
    device = distributed.init()
    try:
        fault, missing = "", []
        if distributed.rank() == 0:
            try:
                work.claim(plan.settings, restart=restart)
                missing = work.missing(plan.blocks())
            except UserError as error:
                fault = str(error)
        fault, missing = distributed.gather_objects((fault, missing))[0]
    finally:
        distributed.shutdown()
    if fault:
        raise UserError(fault)
    return device, missing


def compute(plan: Plan, work: Work, names: list[BlockName], device: torch.device, say: Callable[[str], None]) -> None:
    """Sample and score this rank's blocks. Raises: OneRankError if a reward fails, or the GPU's memory is too small."""
    import torch

    from prdp_fast.acceleration.process import prepare_process
    from prdp_fast.config.recipe import PerformanceSettings
    from prdp_fast.models.text import TextEncoder

    dtype = getattr(torch, plan.dtype)
    prepare_process(PerformanceSettings(), device, dtype)
    if names:
        try:
            for reward in plan.rewards.values():
                reward.prepare()
        except RewardError as error:
            raise OneRankError(str(error)) from error
    for role, model in plan.models.items():
        own = [name for name in names if name.role == role]
        if not own:
            continue
        say(f"{model.name} ({role}): {len(own)} blocks of up to {plan.block} prompts, {plan.settings['samples']} images each")
        pipeline = load(model, device, dtype)
        encoder, told = TextEncoder(pipeline, dtype), time.monotonic()
        for number, name in enumerate(own):
            try:
                work.save(name, compute_block(plan, name, pipeline, encoder.encode))
            except RewardError as error:
                raise OneRankError(str(error)) from error
            except torch.OutOfMemoryError as error:
                raise OneRankError(
                    f"out of GPU memory with {plan.batch} images a U-Net call; give a smaller --batch, and --restart"
                ) from error
            if time.monotonic() - told > PROGRESS_S:
                told = time.monotonic()
                say(f"{model.name} ({role}): {number + 1} of {len(own)} blocks")
        del pipeline, encoder


def compute_block(plan: Plan, name: BlockName, pipeline: Pipeline, encode: Callable) -> Block:
    import torch

    from prdp_fast.evaluation.blocks import Block
    from prdp_fast.evaluation.report import SHOWN_PROMPTS
    from prdp_fast.evaluation.run import sample_images
    from prdp_fast.evaluation.statistics import diversity

    prompts, start = plan.part(name)
    samples = plan.settings["samples"]
    images = sample_images(
        plan.policies[name.role], pipeline.denoiser, pipeline, encode, prompts, images_per_prompt=samples, batch=plan.batch,
        seed=plan.settings["seed"],
    )  # fmt: skip
    rows = [prompt for prompt in prompts for _ in range(samples)]
    scores: dict[str, torch.Tensor] = {}
    for label, reward in plan.rewards.items():
        scored = reward.score(images, [prompt.text for prompt in rows], [prompt.metadata for prompt in rows])
        (scores[label],) = scored.parts.values()
        scores |= {f"{label}/{key.partition('/')[2]}": value for key, value in scored.details.items()}
    features = plan.features(images)
    return Block(
        {label: values.view(len(prompts), samples) for label, values in scores.items()},
        torch.from_numpy(diversity(features.reshape(len(prompts), samples, -1))),
        images[::samples][: max(0, SHOWN_PROMPTS - start)].clone(),
    )


def load(model: Model, device: torch.device, dtype: torch.dtype) -> Pipeline:
    from prdp_fast.models.lora import WEIGHTS
    from prdp_fast.models.pipeline import Pipeline

    pipeline = Pipeline.load(model.pretrained, device, frozen_dtype=dtype)
    if model.adapter is not None:
        try:
            pipeline.whole.load_lora_weights(str(model.adapter))
            pipeline.whole.fuse_lora()
            pipeline.whole.unload_lora_weights()
        except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
            raise UserError(
                f"{model.adapter / WEIGHTS} does not load onto {model.pretrained!r}: {' '.join(str(error).split())[:300]}; "
                "give the model it was trained on as --base"
            ) from None
    pipeline.denoiser.to(dtype).requires_grad_(False).eval()
    return pipeline
