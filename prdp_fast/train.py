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
import time
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
from prdp_fast.config.tracking import check_libraries, check_mlflow_secrets
from prdp_fast.core import launcher, stop_times, stops
from prdp_fast.core.errors import OneRankError, UserError, brief
from prdp_fast.core.paths import check_output, fault
from prdp_fast.core.run_directory import RUN, claim, finished_epochs
from prdp_fast.core.visible import visible
from prdp_fast.core.watchdog import watching

if TYPE_CHECKING:
    from prdp_fast.config.recipe import Settings
    from prdp_fast.core.watchdog import Watchdog
    from prdp_fast.planning.job import Job

SHARED_S = 90.0  # in which a rank sees what rank 0 has written: NFS may keep for a minute that a file is not there
ALONE_S = 3.0  # after which a rank that failed before the ranks met takes its fault for its own


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", default="zero2.json", help="DeepSpeed JSON; a bare name is looked up in configs/")
    parser.add_argument("--recipe", default="tiny", help="YAML; a bare name is looked up in configs/recipes/")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--output", type=Path, help="run directory; default: runs/RECIPE-seedSEED-JOBHASH")
    parser.add_argument("--resume", default="auto", metavar="auto|never|DIR", help="continue this job's run if there is one")
    parser.add_argument(
        "--grace", type=seconds, default=30.0, metavar="SECONDS",
        help="that a stop (SIGTERM, SIGUSR1, Ctrl-C) has to reach a point where the run can be saved; default 30",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="print the resolved job and its cost, and stop")
    parser.add_argument("--seed", type=int, help="overrides the recipe's seed")
    parser.add_argument(
        "--num_gpus", type=int, metavar="N", help="start N ranks with DeepSpeed's launcher; without it, this process is the job"
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)  # launchers pass it


def seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e9:
        raise ValueError(text)
    return value


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
    """Raises: UserError, on rank 0: every rank finds the same fault, and one line is enough. OneRankError, on any."""
    try:
        return launch(args) if args.num_gpus is not None else train(args)
    except OneRankError:
        raise
    except UserError as error:
        rank = environment.launched("RANK", 0)
        if rank == 0:
            raise
        time.sleep(ALONE_S)  # in which rank 0 fails likewise and the launcher ends this one
        raise UserError(f"rank {rank}: {error}") from error


def launch(args: argparse.Namespace) -> int:
    """Have DeepSpeed's launcher start N ranks of this package on this machine. Returns: the exit status.

    Raises: UserError about what would otherwise be found by N processes after seconds of imports.
    """
    if "RANK" in os.environ:
        raise UserError(f"--num_gpus {args.num_gpus} inside a launched job; give it to the launcher, or leave it out")
    if args.num_gpus < 1:
        raise UserError(f"--num_gpus is {args.num_gpus}; expected at least 1; leave it out to run in this process")
    load_recipe(args.recipe, args.overrides, seed=args.seed).check_ranks(args.num_gpus)
    if find_spec("deepspeed") is None:
        raise UserError("--num_gpus needs DeepSpeed's launcher, and deepspeed is not installed; pip install deepspeed")
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(args.num_gpus)]
    # Two jobs on one machine need two ports. The launcher's own log would follow the run directory, which is printed last.
    command += ["--master_port", os.environ.get("MASTER_PORT") or str(free_port()), "--log_level", "warning"]
    # By path, so that the ranks run this package whatever the current directory holds.
    script = Path(__file__).resolve()
    sys.stdout.flush()
    return launcher.run([*command, str(script), *rank_arguments(args)], environment.before_prepare())


def rank_arguments(args: argparse.Namespace) -> list[str]:
    """The command line of one rank: these arguments without --num_gpus."""
    given = [f"--config={args.config}", f"--recipe={args.recipe}", f"--resume={args.resume}"]
    given += [f"--set={override}" for override in args.overrides]
    given += [f"--output={args.output}"] if args.output is not None else []
    given += [f"--grace={args.grace:g}"]
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
    if args.dry_run:
        return print_plan(args, settings)

    with watching(args.grace) as watchdog:
        watchdog.stop_at = stop_times.first(settings.schedule.stop_after, args.grace, os.environ, time.time())
        try:
            if environment.launched("WORLD_SIZE", 1) > 1:  # ranks leave together, once they have met
                return train_here(args, *prepare(args, settings), watchdog)
            with stops.interruptible():
                prepared = prepare(args, settings)
            return train_here(args, *prepared, watchdog)
        except stops.Interrupted:
            request = stops.requested()
            assert request is not None
            stops.say(f"stopped by {request.reason}: nothing was begun")
            return request.status


def print_plan(args: argparse.Namespace, settings: Settings) -> int:
    """--dry-run."""
    import torch

    from prdp_fast.core import distributed
    from prdp_fast.planning.dry_run import dry_run

    job, output = prepare(args, settings)
    if distributed.is_main():
        print(json.dumps({"output": str(output)} | job.record(), indent=2))
        print(*dry_run(job, torch.cuda.get_device_name() if torch.cuda.is_available() else None), sep="\n")
    return 0


def prepare(args: argparse.Namespace, settings: Settings) -> tuple[Job, Path]:
    """The job, and its run directory."""
    check_libraries(settings.tracking)
    check_mlflow_secrets(settings.tracking, os.environ)
    import torch  # takes seconds, and a mistake in the recipe is reported before

    from prdp_fast.core import distributed
    from prdp_fast.planning.job import Job

    job = Job.prepare(settings, args.config, world_size=distributed.world_size(), cuda=torch.cuda.is_available())
    output = choose_output(args, job.record())
    check_output("--output", output)
    if not args.dry_run:
        import prdp_fast.training.trainer  # noqa: F401  # takes seconds, and the ranks meet afterwards
    return job, output


def train_here(args: argparse.Namespace, job: Job, output: Path, watchdog: Watchdog) -> int:
    """This rank's part, and its last words. Returns: the exit status."""
    import torch

    from prdp_fast.core import distributed, last_words, ranks
    from prdp_fast.reporting.tables import print_summary
    from prdp_fast.training.trainer import Trainer

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    settings = job.settings
    device = distributed.init(settings.collective_timeout_s)
    try:
        claim_for_all(output, job, args.resume)
        watchdog.patience_s = settings.collective_timeout_s
        trainer = Trainer.build(job, device, output)
        distributed.share_timeout(settings.collective_timeout_s)
        summary = trainer.train()
        if distributed.is_main():
            print_summary(summary)
            print(output, flush=True)
        ranks.leave("finished")
    except stops.Stopped as stop:
        if ranks.first_word():
            stops.say(f"stopped by {stop}: {stop.kept}; the same command goes on")
        ranks.leave("stopped")
        return stop.request.status
    except UserError as error:
        return last_words.leave(last_words.mistake(error))
    except torch.OutOfMemoryError as error:  # while the job is built, or ends: in an epoch it is met
        return last_words.leave(last_words.mistake(OneRankError(
            f"out of memory ({brief(error)}); use more ranks, a higher ZeRO stage, or a GPU with more memory, and go on with "
            f"--resume {output}"
        )))  # fmt: skip
    except OSError as error:
        if error.filename is None:
            return last_words.leave(last_words.unexpected(error))
        stops.say(f"error: {last_words.of_rank()}{fault(error)}; mend it, and continue with --resume {output}")
        return last_words.leave(2)
    except (Exception, SystemExit) as error:
        return last_words.leave(last_words.unexpected(error))
    finally:
        distributed.shutdown()
    return 0


def claim_for_all(output: Path, job: Job, resume: str) -> None:
    """Rank 0 looks at the directory, and every rank hears its verdict. Raises: UserError, on every rank."""
    from prdp_fast.core import distributed, ranks
    from prdp_fast.planning.job import complete_record
    from prdp_fast.training.agreement import agree

    problem, start = None, f"{os.getpid()}-{time.time_ns()}"
    if distributed.is_main():
        try:
            notes = claim(output, job.full_record(), resume, complete=complete_record)
            ranks.clean(output)
            print(*map(visible, notes), sep="\n", end="\n" if notes else "", flush=True)
        except UserError as error:
            problem = str(error)
    prompts = job.train_prompts.fingerprint
    problem, start, of_main = distributed.from_main((problem, start, prompts))
    if problem:
        raise UserError(problem)
    if prompts != of_main:  # each rank has read the index for itself
        raise OneRankError(f"{job.train_prompts.directory} was changed while the ranks started; give the same command again")
    ranks.join(output, start, distributed.rank(), job.world_size)
    with agree():  # a stop that came before, too
        if not distributed.is_main() and not ranks.sees(0, SHARED_S):
            raise UserError(
                f"--output {output} on {socket.gethostname()} is not the directory that rank 0 writes into; expected one on a "
                "file system that all machines share: give its path there"
            )


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
