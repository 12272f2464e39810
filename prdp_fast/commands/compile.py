"""Compile a job's denoisers before it starts, into the compiler's cache.

    prdp compile --recipe my_recipe.yaml --config zero2.json
    prdp compile --recipe my_recipe.yaml --config zero2.json --set performance.compile_cache=/shared/compiled

A job of the same recipe, DeepSpeed file, versions and kind of GPU that is given the same directory finds its code there, and so
does a restart after a preemption. Without performance.compile_cache it is the user's cache, where a job looks by itself. The
directory may be carried to other machines. It is printed last.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

from prdp_fast.config.load import load_recipe
from prdp_fast.core.errors import UserError
from prdp_fast.core.format import format_bytes

# A job that is compiled for in advance lasts as long as it takes to pay.
ENDLESS = ["schedule.epochs=1000000", "schedule.time_limit_minutes=null"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", default="zero2.json", help="DeepSpeed JSON; a bare name is looked up in configs/")
    parser.add_argument("--recipe", default="tiny", help="YAML; a bare name is looked up in configs/recipes/")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE")


def run(args: argparse.Namespace) -> int:
    """Prints what was chosen and the cache directory. Raises: UserError if nothing is compiled here, and why."""
    settings = load_recipe(args.recipe, [*args.overrides, *ENDLESS])

    import torch

    from prdp_fast.core import distributed
    from prdp_fast.planning.job import Job
    from prdp_fast.training.trainer import Trainer

    device = distributed.init()
    try:
        job = Job.prepare(settings, args.config, world_size=distributed.world_size(), cuda=torch.cuda.is_available())
        start = time.monotonic()
        decisions = Trainer.build(job, device, None).acceleration.decisions
    finally:
        distributed.shutdown()
    compiled = {name: decision for name, decision in decisions.items() if name.startswith("compile")}
    if all(decision.value == "off" for decision in compiled.values()):
        reasons = "; ".join(dict.fromkeys(decision.reason for decision in compiled.values()))
        raise UserError(f"nothing is compiled: {reasons}; set performance.compile to blocks or full to insist")
    for name, decision in compiled.items():
        print(f"{name:18} {decision}")
    directory = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or torch_cache())
    size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    print(f"{time.monotonic() - start:.0f} s, {format_bytes(size)} of compiled code")
    print(directory)
    return 0


def torch_cache() -> str:
    """Torch's own directory, where no other was set."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return cache_dir()
