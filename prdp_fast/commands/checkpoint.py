"""A run's checkpoints: what they are, whether they are whole, and the model that is in one.

    prdp checkpoint list RUN
    prdp checkpoint verify RUN
    prdp checkpoint export RUN DIR
    prdp checkpoint export RUN/checkpoints/epoch-000050 DIR
    prdp checkpoint export RUN DIR --best
    prdp checkpoint consolidate RUN FILE.safetensors

`list` looks at names and sizes, `verify` at the contents too; the exit status is 1 if a checkpoint is damaged. `export` writes
the directory that the run would export at its end, `consolidate` the trained weights alone, float32 in one file. Of a run the
newest whole checkpoint is taken, or that of its best evaluation (`checkpoint.keep_best`); of it the moving average where one is
kept. The run stays as it is, and a job may be running.
"""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path

from prdp_fast.core import checkpoint_files
from prdp_fast.core.errors import UserError
from prdp_fast.core.format import format_bytes
from prdp_fast.core.run_directory import CHECKPOINTS, RUN
from prdp_fast.core.visible import visible

HEAD = ("epoch", "files", "size", "state")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="list|verify|export|consolidate")
    for name, summary in (
        ("list", "epochs, sizes, and whether all files are there"),
        ("verify", "the same, and every byte is read"),
    ):
        action = actions.add_parser(name, help=summary, allow_abbrev=False)
        action.add_argument("run", type=Path, metavar="RUN", help="a run directory, finished or not")
    for name, summary, target, what in (
        ("export", "a pipeline, or an adapter, of a checkpoint's weights", "DIR", "a new directory"),
        ("consolidate", "a checkpoint's trained weights in one file, float32", "FILE.safetensors", "a new file"),
    ):
        action = actions.add_parser(name, help=summary, allow_abbrev=False)
        action.add_argument("run", type=Path, metavar="RUN[/CHECKPOINT]", help="a run directory, or one of its checkpoints")
        action.add_argument("target", type=Path, metavar=target, help=what)
        action.add_argument("--last", action="store_true", help="the weights themselves where their moving average is kept")
        action.add_argument("--best", action="store_true", help="of RUN, the checkpoint with the best evaluation")


def run(args: argparse.Namespace) -> int:
    """Raises: UserError."""
    return table(args) if args.action in ("list", "verify") else take_out(args)


def take_out(args: argparse.Namespace) -> int:
    """Prints what was taken, and last the path of what was written. Raises: UserError."""
    from prdp_fast.training import extract  # torch and diffusers, which the others do without

    taken = extract.extract(args.run, last=args.last, best=args.best)
    (extract.export if args.action == "export" else extract.consolidate)(taken, args.target)
    print(taken, args.target, sep="\n")
    return 0


def table(args: argparse.Namespace) -> int:
    """Prints a table, oldest first. Raises: UserError if the directory is no run."""
    if not (args.run / RUN).is_file():
        raise UserError(f"{args.run} is no run directory ({RUN} is missing); give the path that training printed last")
    directory = args.run / CHECKPOINTS
    best = checkpoint_files.find_best(directory)
    rows, damaged = [], False
    for checkpoint in checkpoint_files.find(directory):
        files, fault = checkpoint_files.look(checkpoint)
        if fault is None and args.action == "verify":
            fault = checkpoint_files.content_fault(checkpoint, sorted(files.items()))
        line = row(checkpoint, f"DAMAGED: {fault}" if fault else sound(checkpoint, args.action, best))
        if checkpoint.exists():  # otherwise a job that runs has replaced it meanwhile
            damaged |= fault is not None
            rows.append(line)
    rows += [row(checkpoint, "set aside as damaged") for checkpoint in checkpoint_files.find_damaged(directory)]
    if not rows:
        print(f"{args.run} has no checkpoint")
        return 0
    widths = [max(len(line[column]) for line in [HEAD, *rows]) for column in range(3)]
    for line in [HEAD, *rows]:
        print("  ".join([*(cell.rjust(width) for cell, width in zip(line, widths)), visible(line[3])]))
    return 1 if damaged else 0


def row(checkpoint: Path, state: str) -> tuple[str, str, str, str]:
    sizes = []
    for path in checkpoint.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # of one that a job that runs is removing
            sizes += [path.stat().st_size] if path.is_file() else []
    return str(checkpoint_files.epoch_of(checkpoint)), str(len(sizes)), format_bytes(sum(sizes)), state


def sound(checkpoint: Path, action: str, best: Path | None) -> str:
    """What is known of a checkpoint without a fault. Args: best: the one with the best evaluation."""
    if not (checkpoint / checkpoint_files.MANIFEST).exists():
        return "sizes are right; of an earlier version, which wrote no hashes"
    kept = ", kept for good" if checkpoint_files.outlives(checkpoint) else ""
    mark = checkpoint_files.best_of(checkpoint) if checkpoint == best else None
    evaluated = f", best {mark.metric}: {mark.value:.6g}" if mark else ""
    return ("whole" if action == "verify" else "sizes are right") + kept + evaluated
