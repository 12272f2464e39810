"""Score a run or a model: the same prompts and the same noise for base and finetuned.

prdp evaluate runs/tiny-seed0-1a2b3c4d --prompts unseen --rewards jpeg_size --samples 64
prdp evaluate DIR_OR_HUB_ID --base OTHER --prompts animals:unseen_eval --rewards jpeg_size:quality=80
torchrun --nproc_per_node 8 -m prdp_fast.cli evaluate RUN

RUN is an output directory of training; its base is the recipe's model. Work is kept in blocks of prompts under --output: the same
command goes on where a killed one stopped. The path of evaluation.json is printed last.
"""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

from prdp_fast.core.errors import OneRankError, UserError
from prdp_fast.core.visible import visible
from prdp_fast.evaluation.request import EvaluationRequest


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
    parser.add_argument(
        "--trust-code", action="store_true", help="run the Python file that a run's own reward is, as its run.json names it"
    )
    parser.add_argument(
        "--samples", type=int, default=EvaluationRequest.samples, metavar="N", help="images a prompt (default: %(default)s)"
    )
    parser.add_argument(
        "--limit", type=int, metavar="N",
        help="prompts drawn from a set (default: a run's evaluation.prompts; without a run, all)",
    )  # fmt: skip
    parser.add_argument(
        "--seed", type=int, default=EvaluationRequest.seed, metavar="N",
        help="draws prompts, noise and intervals (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: RUN/evaluation, or evaluations/MODEL")
    parser.add_argument("--restart", action="store_true", help="begin anew, whatever is in --output")
    sampling = parser.add_argument_group("sampling, by default a run's own, or the recipes' defaults")
    sampling.add_argument("--scheduler", metavar="CLASS", help="DDPMScheduler or DDIMScheduler, on the model's noise schedule")
    sampling.add_argument("--steps", type=int, metavar="T")
    sampling.add_argument("--guidance", metavar="S", help="guidance scale, or none")
    sampling.add_argument("--guidance-interval", nargs=2, type=int, metavar=("FIRST", "LAST"), help="timesteps that are guided")
    sampling.add_argument("--eta", type=float, metavar="ETA")
    sampling.add_argument("--method", metavar="NAME", help="how a flow-matching model's noisy steps are taken, e.g. flow_sde")
    sampling.add_argument("--noise-level", type=float, metavar="A", help="of a flow-matching model's noisy steps")
    sampling.add_argument(
        "--stochastic-steps", nargs="+", metavar="STEP", help="first and last step that is noisy, counted from 0; or all"
    )
    sampling.add_argument("--batch", type=int, metavar="N", help="images a call of the denoiser")
    sampling.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="default: float32 on a CPU, a run's own on a GPU"
    )
    parser.add_argument("--features", metavar="DIR", help="of a CLIP model, for diversity (default: colours on an 8 x 8 grid)")


def run(args: argparse.Namespace) -> int:
    """Raises: UserError before any work for what cannot be evaluated, OneRankError if a reward fails or memory runs out."""
    from prdp_fast.core import distributed

    request = EvaluationRequest(**{field.name: getattr(args, field.name) for field in fields(EvaluationRequest)})
    try:
        evaluate(request, restart=args.restart)
    except OneRankError:
        raise
    except UserError:
        if not distributed.is_main():  # every rank finds the same fault; one line is enough
            return 2
        raise
    return 0


def evaluate(request: EvaluationRequest, *, restart: bool) -> None:
    """Every rank does its share of the blocks. Rank 0 then waits for the others, and writes and prints what was found."""
    import torch

    from prdp_fast.core import distributed
    from prdp_fast.core.files import write_json, write_text
    from prdp_fast.evaluation.blocks import PAGE, RESULT, EvaluationDirectory
    from prdp_fast.evaluation.measure import measure_set
    from prdp_fast.evaluation.plan import plan_evaluation
    from prdp_fast.evaluation.run import claim_and_share, compute_blocks
    from prdp_fast.evaluation.statistics import LEVEL
    from prdp_fast.reporting.evaluation_page import evaluation_page
    from prdp_fast.reporting.images import file_name, model_grid

    def say(text: str) -> None:
        if distributed.is_main():
            print(visible(text, lines=True), flush=True)

    plan = plan_evaluation(request, cuda=torch.cuda.is_available())
    directory = EvaluationDirectory(plan.output)
    device, own = claim_and_share(plan, directory, say, restart=restart)
    compute_blocks(plan, directory, own, device, say)
    if not distributed.is_main():
        return
    directory.wait(plan.blocks(), say)
    sets, pictures = {}, []
    for number, (label, prompts) in enumerate(plan.prompts.items()):
        texts = [prompt.text for prompt in prompts]
        blocks = {role: [directory.load(name) for name in plan.blocks_of(role, number)] for role in plan.models}
        sets[label] = measure_set(texts, blocks, plan.trained, plan.seed)
        images = [torch.cat([block.images for block in parts]) for parts in blocks.values()]
        pictures.append(model_grid(images, texts, plan.output / "samples" / f"{number}-{file_name(label)}.png"))
    record = {"settings": plan.settings, "sets": sets}
    write_json(plan.output / RESULT, record, indent=None)  # a line a number would be most of the file
    page = evaluation_page(record, LEVEL)
    write_text(plan.output / PAGE, page)
    print(visible(page, lines=True))
    print(*pictures, plan.output / RESULT, sep="\n", flush=True)
