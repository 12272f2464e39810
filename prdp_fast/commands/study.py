"""Ask one question of several recipes over several seeds, and write down what was found, with intervals.

    prdp study pairing
    prdp study clipping --seeds 0 1 --num_gpus 2
    prdp study kl_weight --plan --set model.pretrained=CompVis/stable-diffusion-v1-4

Runs that are finished are left alone, so the same command goes on after a stop, or with more seeds. A run that fails is noted,
and the others follow. The page is OUTPUT/study.md.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

from prdp_fast.config.recipe import Settings
from prdp_fast.core.errors import UserError
from prdp_fast.core.paths import check_output
from prdp_fast.studies import findings, page
from prdp_fast.studies.declaration import Run, Study, check, grid, load_study
from prdp_fast.studies.runner import run_all


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("study", metavar="STUDY", help="a name in configs/studies, or a file like those")
    parser.add_argument("--output", type=Path, help="directory of the runs and the page; default runs/studies/STUDY")
    parser.add_argument("--seeds", type=int, nargs="+", metavar="N", help="in place of the study's own")
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="some of the study's; the baseline is always among them")
    parser.add_argument("--config", default="zero2.json", help="DeepSpeed file of every run; default zero2.json")
    parser.add_argument("--num_gpus", type=int, metavar="N", help="ranks of every run")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="of every run")
    parser.add_argument("--short", action="store_true", help="minutes in all: shows that everything runs, and nothing else")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--plan", action="store_true", help="print the runs and what they cost, and stop")
    what.add_argument("--page", action="store_true", help="write the page of what is finished, and run nothing")


def run(args: argparse.Namespace) -> int:
    """Returns: 0, or the status of a run that was stopped. Raises: UserError."""
    study = load_study(args.study)
    runs = grid(study, seeds=args.seeds, arms=args.arms, overrides=args.overrides, short=args.short)
    settings = check(study, runs)
    if args.plan:
        print_plan(study, runs, settings, args)
        return 0
    default = Path("runs/studies") / (Path(args.study).stem + ("-short" if args.short else ""))
    output: Path = args.output or default
    check_output("--output", output)
    status = 0
    if not args.page:
        status = run_all(study, runs, settings, output, config=args.config, num_gpus=args.num_gpus)
    found = findings.collect(study, runs, output)
    if not any(arm["seeds"] or arm["failures"] for arm in found.values()):
        raise UserError(f"{output} has no finished run of the study; run it first, without --page")
    print(page.write(study, runs, found, output, how()))
    return status


def how() -> dict[str, Any]:
    """Command, machine and versions."""
    from prdp_fast.planning.job import machine

    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "diffusers", "deepspeed"))
    return {
        "command": shlex.join(["prdp", *sys.argv[1:]]), "date": date.today().isoformat(),
        "machine": ", ".join(f"{name} {value}" for name, value in machine().items()), "versions": versions,
    }  # fmt: skip


def print_plan(study: Study, runs: list[Run], settings: dict[str, Settings], args: argparse.Namespace) -> None:
    """Runs and cost, arm by arm. Reads configurations and prompts, no weights."""
    from prdp_fast.planning import cost
    from prdp_fast.planning.job import Job

    print(f"{study.title}: {len(runs)} runs")
    total = 0.0
    for arm, recipe in settings.items():
        job = Job.prepare(recipe, args.config, world_size=args.num_gpus or 1, cuda=False)
        rows = cost.epoch_rows(recipe.schedule, job.policy, needs_reference=job.needs_reference, on_policy=job.on_policy)
        forward, backward = cost.denoiser_flop(job.family), cost.backward_per_forward(job.family)
        flop = recipe.schedule.epochs * sum(phase.flop(forward, backward=backward) for phase in rows.values())
        images = recipe.schedule.epochs * recipe.schedule.prompts_per_epoch * recipe.schedule.images_per_prompt
        count = sum(run.arm == arm for run in runs)
        total += count * flop
        print(f"{arm}: {count} runs of {images:,} images, {cost.format_flop(flop)} of the denoiser each")
    print(f"in all {cost.format_flop(total)}; evaluations, decoding and rewards are not counted")
