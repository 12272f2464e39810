"""How long training stands still for a checkpoint: written at once, and copied and written while training goes on.

    python -m benchmarks.epoch.async_save --directory DIR [--parameters 859520964] [--output FILE.json]

One rank at ZeRO stage 0 in float32: weights and AdamW's two moments, all random numbers, saved, verified and loaded by what
training calls. Memory: 24 bytes a parameter, half of them for the copy. Before it is verified, and again before it is loaded, the
system is asked to forget the checkpoint, so that it comes from the disk.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.lib import command
from benchmarks.lib.provenance import provenance
from benchmarks.lib.published import PARAMETERS
from prdp_fast.config.deepspeed import resolve_config
from prdp_fast.config.load import load_recipe
from prdp_fast.config.recipe import OptimizerSettings
from prdp_fast.core import distributed
from prdp_fast.core.files import write_json
from prdp_fast.models.finite import first_nonfinite
from prdp_fast.training.checkpoint import Checkpoints
from prdp_fast.training.engine import ZeroEngine
from prdp_fast.training.host_copy import HostCopies
from prdp_fast.training.state import TrainState

TENSORS = 686  # as SD 1.x's U-Net has
PIECE = 2**28  # bytes: more than a processor's cache


def build(parameters: int) -> ZeroEngine:
    """An engine that has made an update, with random numbers in all that a checkpoint holds."""
    device = distributed.init()
    denoiser = nn.Module()
    denoiser.weights = nn.ParameterList(
        torch.rand(len(part)) for part in torch.arange(1).expand(parameters).tensor_split(TENSORS)
    )
    config = resolve_config("zero0.json", load_recipe("tiny"), world_size=1, stochastic_steps=2, cuda=device.type == "cuda")
    engine = ZeroEngine(denoiser, OptimizerSettings(), config, device)
    for parameter in engine.trained:
        engine.engine.optimizer.state[parameter] = {
            "step": torch.tensor(1.0), "exp_avg": torch.rand_like(parameter), "exp_avg_sq": torch.rand_like(parameter),
        }  # fmt: skip
    return engine


def seconds(do: Callable[[], object]) -> float:
    start = time.perf_counter()
    do()
    return time.perf_counter() - start


def bare_copy(size: int) -> float:
    """Seconds to copy so many bytes from memory to memory, in pieces."""
    source, target = torch.ones(PIECE, dtype=torch.uint8), torch.zeros(PIECE, dtype=torch.uint8)

    def copy() -> None:
        for start in range(0, size, PIECE):
            part = slice(min(PIECE, size - start))
            target[part].copy_(source[part])

    return seconds(copy)


def forget(folder: Path) -> None:
    """Let the system drop what it holds of these files."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(run: Path, parameters: int) -> dict[str, Any]:
    """Bytes of a checkpoint, and seconds of each part."""
    engine, checkpoints = build(parameters), Checkpoints(run, keep=1)
    nan_s = seconds(lambda: first_nonfinite({"denoiser": engine.engine.module}))  # before any save
    found: dict[str, float] = {}

    def check(fault: str | None) -> None:
        assert fault is None, fault

    for epoch, which in ((1, "the first time"), (2, "from then on")):
        state = TrainState(epoch=epoch)
        start = time.perf_counter()
        check(checkpoints.save_behind(state, engine.copy))
        found[f"copied, {which}: training stands still"] = time.perf_counter() - start
        check(checkpoints.settle(wait=True))
        found[f"copied, {which}: until the checkpoint is there"] = time.perf_counter() - start
    found["written at once: training stands still"] = seconds(lambda: check(checkpoints.save(TrainState(epoch=3), engine.save)))
    assert checkpoints.newest is not None
    size = sum(path.stat().st_size for path in checkpoints.newest.rglob("*") if path.is_file())
    engine.copies = HostCopies(engine.device)  # gives its room to what DeepSpeed loads
    found["a bare copy of as many bytes"] = bare_copy(size)
    again = Checkpoints(run, keep=1)
    forget(run)
    found["verify"] = seconds(again.choose)
    forget(run)
    found["load"] = seconds(lambda: again.load(engine.load))
    assert again.newest == checkpoints.newest
    parts = {name: {"seconds": round(s, 3), "gb_per_s": round(size / s / 1e9, 3)} for name, s in found.items()}
    return {"bytes": size, "look_for_nan_seconds": round(nan_s, 3), "parts": parts}


def main(arguments: list[str] | None = None) -> int:
    parser = command.parser_of(__doc__)
    parser.add_argument("--directory", type=Path, default=Path("runs"), help="on the disk that is meant (default: %(default)s)")
    parser.add_argument("--parameters", type=int, default=PARAMETERS["sd14"], metavar="N", help="default: SD v1.4's, %(default)s")
    command.add_output(parser)
    args = parser.parse_args(arguments)
    return command.run(lambda: report(args, command.words(arguments)))


def report(args: argparse.Namespace, words: list[str]) -> int:
    origin = provenance(__file__, words)
    args.directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.directory) as folder:
        result = measure(Path(folder), args.parameters)
    print(f"{result['bytes'] / 1e9:.2f} GB; a look for NaN, before any save: {result['look_for_nan_seconds']:.2f} s")
    for name, part in result["parts"].items():
        print(f"{name}: {part['seconds']:.2f} s, {part['gb_per_s']:.2f} GB/s")
    if args.output:
        write_json(args.output, origin | {"parameters": args.parameters} | result)
        print(args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
