"""Finetune a text-to-image diffusion model on rewards.

    deepspeed prdp_fast/train.py --config zero2.json
    deepspeed --num_gpus 8 prdp_fast/train.py --config zero2.json --recipe my_recipe.yaml --set schedule.epochs=200
    prdp train --num_gpus 8 --config zero2.json --recipe my_recipe.yaml

--config is a plain DeepSpeed JSON: how the job is spread. --recipe is a YAML: what the job is. The run directory is printed last.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import socket
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __package__ in (None, ""):
    # Python puts the folder of a script that is run by path on sys.path. Here that is prdp_fast/ itself, whose modules would
    # shadow others. What is needed is the folder above.
    _above = Path(__file__).resolve().parent.parent
    if _above.name in ("site-packages", "dist-packages"):
        del sys.path[0]  # already there, and behind the standard library, where it belongs
    else:
        sys.path[0] = str(_above)

from prdp_fast.core import environment

environment.prepare()

from prdp_fast.config.load import find_recipe, load_recipe
from prdp_fast.core.errors import OneRankError, UserError
from prdp_fast.core.paths import check_output, fault
from prdp_fast.core.run_directory import RUN, claim, finished_epochs

if TYPE_CHECKING:
    from prdp_fast.planning.job import Job


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", default="zero2.json", help="DeepSpeed JSON; a bare name is looked up in configs/")
    parser.add_argument("--recipe", default="tiny", help="YAML; a bare name is looked up in configs/recipes/")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--output", type=Path, help="run directory; default: runs/RECIPE-seedSEED-JOBHASH")
    parser.add_argument("--resume", default="auto", metavar="auto|never|DIR", help="continue this job's run if there is one")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved job and its cost, and stop")
    parser.add_argument("--seed", type=int, help="overrides the recipe's seed")
    parser.add_argument(
        "--num_gpus", type=int, metavar="N", help="start N ranks with DeepSpeed's launcher; without it, this process is the job"
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)  # launchers pass it


def main(arguments: list[str] | None = None) -> int:
    """`prdp_fast/train.py`, which launchers run. Returns: the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    try:
        return run(parser.parse_args(arguments))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        return 130
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {fault(error)}; check the path and its permissions", file=sys.stderr, flush=True)
        return 2


def run(args: argparse.Namespace) -> int:
    """Raises: UserError, on rank 0 alone: every rank finds the same fault, and one line is enough. OneRankError, on any."""
    try:
        return launch(args) if args.num_gpus is not None else train(args)
    except OneRankError:
        raise
    except UserError:
        if environment.launched("RANK", 0) == 0:
            raise
        return 2


def launch(args: argparse.Namespace) -> int:
    """Become DeepSpeed's launcher, which starts N ranks of this package on this machine. Does not return.

    Raises: UserError about what would otherwise be found by N processes after seconds of imports.
    """
    if "RANK" in os.environ:
        raise UserError(f"--num_gpus {args.num_gpus} inside a launched job; give it to the launcher, or leave it out")
    if args.num_gpus < 1:
        raise UserError(f"--num_gpus is {args.num_gpus}; expected at least 1; leave it out to run in this process")
    load_recipe(args.recipe, args.overrides, seed=args.seed).check_ranks(args.num_gpus)
    if find_spec("deepspeed") is None:
        raise UserError("--num_gpus needs DeepSpeed's launcher, and deepspeed is not installed; pip install deepspeed")
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(args.num_gpus)]
    # Two jobs on one machine need two ports. The launcher's own log would follow the run directory, which is printed last.
    launcher += ["--master_port", os.environ.get("MASTER_PORT") or str(free_port()), "--log_level", "warning"]
    # By path, so that the ranks run this package whatever the current directory holds.
    script = Path(__file__).resolve()
    sys.stdout.flush()
    os.execve(sys.executable, [*launcher, str(script), *rank_arguments(args)], environment.before_prepare())


def rank_arguments(args: argparse.Namespace) -> list[str]:
    """The command line of one rank: these arguments without --num_gpus."""
    given = [f"--config={args.config}", f"--recipe={args.recipe}", f"--resume={args.resume}"]
    given += [f"--set={override}" for override in args.overrides]
    given += [f"--output={args.output}"] if args.output is not None else []
    given += [f"--seed={args.seed}"] if args.seed is not None else []
    return given + (["--dry-run"] if args.dry_run else [])


def free_port() -> int:
    """A port where the ranks can meet. Outgoing connections take theirs from 32768 and up, so this one stays free until then."""
    for port in random.sample(range(20000, 32000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise UserError("no free port was found between 20000 and 32000; set MASTER_PORT to one")


def train(args: argparse.Namespace) -> int:
    """Run the job in this process, which is one of its ranks. Raises: UserError, on every rank."""
    environment.check_launch(starts=not args.dry_run)
    settings = load_recipe(args.recipe, args.overrides, seed=args.seed)
    settings.check_ranks(environment.launched("WORLD_SIZE", 1))

    import torch  # takes seconds, and a mistake in the recipe is reported before

    from prdp_fast.core import distributed
    from prdp_fast.planning.job import Job

    cuda = torch.cuda.is_available()
    job = Job.prepare(settings, args.config, world_size=distributed.world_size(), cuda=cuda)
    output = choose_output(args, job.record())
    check_output("--output", output)
    if args.dry_run:
        from prdp_fast.planning.dry_run import dry_run

        if distributed.is_main():
            print(json.dumps({"output": str(output)} | job.record(), indent=2))
            print(*dry_run(job, torch.cuda.get_device_name() if cuda else None), sep="\n")
        return 0

    from prdp_fast.reporting.tables import print_summary
    from prdp_fast.training.trainer import Trainer

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    device = distributed.init(longest_wait_s=len(settings.rewards) * settings.schedule.reward_timeout_s)
    try:
        claim_for_all(output, job, args.resume)
        summary = Trainer.build(job, device, output).train()
        if distributed.is_main():
            print_summary(summary)
            print(output, flush=True)
    except OneRankError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return leave(job.world_size)
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {fault(error)}; mend it, and continue with --resume {output}", file=sys.stderr, flush=True)
        return leave(job.world_size)
    finally:
        distributed.shutdown()
    return 0


def leave(ranks: int) -> int:
    """The status of a fault that one rank found alone. With others the process ends here: they wait in a collective, and an
    orderly exit would wait for them."""
    if ranks > 1:
        os._exit(2)
    return 2


def claim_for_all(output: Path, job: Job, resume: str) -> None:
    """Rank 0 looks at the directory, and every rank hears its verdict. Raises: UserError, on every rank."""
    from prdp_fast.core import distributed
    from prdp_fast.planning.job import complete_record

    problem = None
    if distributed.is_main():
        try:
            notes = claim(output, job.full_record(), resume, complete=complete_record)
            print(*notes, sep="\n", end="\n" if notes else "", flush=True)
        except UserError as error:
            problem = str(error)
    problem = distributed.from_main(problem)
    if problem:
        raise UserError(problem)


def choose_output(args: argparse.Namespace, record: dict[str, Any]) -> Path:
    """The run directory: as given, or one that the same command finds again, so that `--resume auto` needs no path."""
    if args.resume not in ("auto", "never"):
        directory = Path(args.resume)
        if not (directory / RUN).is_file():
            raise UserError(f"--resume {directory}: no run there (run.json is missing); expected auto, never or a run directory")
        if args.output and args.output.resolve() != directory.resolve():
            raise UserError(f"--resume {directory} continues in place, but --output is {args.output}; give one of the two")
        return directory.resolve()
    if args.output:
        return args.output.resolve()
    digest = hashlib.blake2b(json.dumps(record, sort_keys=True).encode(), digest_size=4).hexdigest()
    base = Path("runs").resolve() / f"{find_recipe(args.recipe).stem}-seed{record['recipe']['seed']}-{digest}"
    candidate, number = base, 1
    # A run that has all its epochs is never continued by accident, and with "never" neither is another one. One that came to its
    # time limit goes on.
    while (finished_epochs(candidate) or 0) >= record["recipe"]["schedule"]["epochs"] or (
        args.resume == "never" and os.path.lexists(candidate)
    ):
        number += 1
        candidate = base.with_name(f"{base.name}-{number}")
    return candidate


if __name__ == "__main__":
    sys.exit(main())
