"""Finetune a text-to-image diffusion model on rewards.

    deepspeed prdp_fast/train.py --config zero2.json
    deepspeed --num_gpus 8 prdp_fast/train.py --config zero2.json --recipe my_recipe.yaml --set schedule.epochs=200

--config is a plain DeepSpeed JSON: how the job is spread. --recipe is a YAML: what the job is. The run directory is printed last.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from pathlib import Path

if __package__ in (None, ""):
    # DeepSpeed runs this file by path, which puts prdp_fast/ itself on sys.path, where its modules would shadow others'.
    _root = Path(__file__).resolve().parent.parent
    sys.path[0] = str(_root)
    sys.path.insert(1, str(_root / "kernels"))

# One thread pool per rank: without this every rank would start a thread for every core.
_local_ranks = int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 1)
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // _local_ranks)))

# transformers and diffusers speak while they are imported.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

from prdp_fast.errors import OneRankError, UserError
from prdp_fast.settings import find_recipe, load_recipe


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="zero2.json", help="DeepSpeed JSON; a bare name is looked up in configs/")
    parser.add_argument("--recipe", default="tiny", help="YAML; a bare name is looked up in configs/recipes/")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--output", type=Path, help="run directory; default: runs/RECIPE-seedSEED-JOBHASH")
    parser.add_argument("--resume", default="auto", metavar="auto|never|DIR", help="continue this job's run if there is one")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved job and its cost, and stop")
    parser.add_argument("--seed", type=int, help="overrides the recipe's seed")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # passed by deepspeed
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    try:
        return launch(args)
    except UserError as error:
        # Every rank finds the same fault; one line is enough.
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2


def launch(args: argparse.Namespace) -> int:
    settings = load_recipe(args.recipe, args.overrides, seed=args.seed)
    settings.check_ranks(int(os.environ.get("WORLD_SIZE", "1")))

    import torch  # heavy imports come after the recipe's typos

    from prdp_fast import checkpoint, runner, zero
    from prdp_fast.job import Job

    world_size = zero.launched_world_size()
    job = Job.prepare(settings, args.config, world_size=world_size, cuda=torch.cuda.is_available())
    output = choose_output(args, job.record())
    if args.dry_run:
        if zero.launched_rank() == 0:
            print(json.dumps({"output": str(output)} | job.record(), indent=2))
            print(*job.dry_run(torch.cuda.get_device_name() if torch.cuda.is_available() else None), sep="\n")
        return 0

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    device = zero.init_distributed()
    try:
        # Rank 0 looks at the directory, and every rank hears its verdict.
        fault = None
        if zero.launched_rank() == 0:
            try:
                checkpoint.claim_run_directory(
                    output, job.record(), "auto" if args.resume not in ("auto", "never") else args.resume
                )
            except UserError as error:
                fault = str(error)
        fault = zero.gather_objects(fault)[0]
        if fault:
            raise UserError(fault)
        summary = runner.train(job, output, device)
        if zero.launched_rank() == 0:
            from prdp_fast import reporting

            if summary["evaluation"]:
                reporting.final_table(summary)
            print(output, flush=True)
    except OneRankError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        if world_size > 1:
            os._exit(2)  # the others wait in a collective, and taking leave of them properly would wait too
        return 2
    finally:
        zero.shutdown_distributed()
    return 0


def choose_output(args: argparse.Namespace, record: dict[str, object]) -> Path:
    """The run directory: as given, or one that the same command finds again, so that `--resume auto` needs no path."""
    if args.resume not in ("auto", "never"):
        directory = Path(args.resume)
        if not (directory / "run.json").is_file():
            raise UserError(f"--resume {directory}: no run there (run.json is missing); expected auto, never or a run directory")
        if args.output and args.output.resolve() != directory.resolve():
            raise UserError(f"--resume {directory} continues in place, but --output is {args.output}; give one of the two")
        return directory.resolve()
    if args.output:
        return args.output.resolve()
    digest = hashlib.blake2b(json.dumps(record, sort_keys=True).encode(), digest_size=4).hexdigest()
    base = Path("runs").resolve() / f"{find_recipe(args.recipe).stem}-seed{record['recipe']['seed']}-{digest}"  # type: ignore[index]
    candidate, number = base, 1
    # A finished run is never continued by accident, and with "never" neither is an unfinished one.
    while (candidate / "summary.json").exists() or (args.resume == "never" and candidate.exists()):
        number += 1
        candidate = base.with_name(f"{base.name}-{number}")
    return candidate


if __name__ == "__main__":
    sys.exit(main())
