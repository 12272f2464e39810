"""What a checkpoint of a large model costs: seconds to write it, to bring it to the disk, to hash and to verify it.

    python -m benchmarks.epoch.checkpoint --directory DIR [--parameters 859520964] [--shards 8] [--output FILE.json]

Files of random numbers, of the sizes that ZeRO-2 writes: 16-bit weights, and in shards the float32 weights and AdamW's two
moments. Before files are verified, the system is asked to forget them, so they come from the disk.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.lib import command
from benchmarks.lib.provenance import provenance
from benchmarks.lib.published import PARAMETERS
from prdp_fast.core import checkpoint_files
from prdp_fast.core.files import write_json

READERS = (1, 2)


def forget(paths: list[Path]) -> None:
    """Let the system drop what it holds of these files."""
    for path in paths:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def seconds_of(do: Callable[[], object]) -> float:
    start = time.perf_counter()
    do()
    return time.perf_counter() - start


def write(checkpoint: Path, parameters: int, shards: int) -> list[Path]:
    """As DeepSpeed does: `torch.save`. One shard's numbers at a time are in memory."""
    folder = checkpoint / "zero"
    folder.mkdir(parents=True)
    files = [folder / "mp_rank_00_model_states.pt"]
    torch.save({"module": torch.randn(parameters, dtype=torch.bfloat16)}, files[0])
    part = torch.randn(-(-parameters // shards))
    for shard in range(shards):
        files.append(folder / f"zero_pp_rank_{shard}_mp_rank_00_optim_states.pt")
        torch.save({name: part.clone() for name in ("weights", "exp_avg", "exp_avg_sq")}, files[-1])
    return files


def measure(directory: Path, parameters: int, shards: int) -> dict[str, Any]:
    """Bytes, and seconds by part of the work."""
    checkpoint = directory / "epoch-000001"
    files: list[Path] = []
    seconds = {"write": seconds_of(lambda: files.extend(write(checkpoint, parameters, shards)))}

    def sync() -> None:
        for path in files:
            with path.open("rb") as file:
                os.fsync(file.fileno())

    written: checkpoint_files.Files = {}
    seconds["sync"] = seconds_of(sync)
    seconds["hash"] = seconds_of(
        lambda: written.update({path.relative_to(checkpoint).as_posix(): checkpoint_files.measure(path) for path in files})
    )
    seconds["manifest"] = seconds_of(lambda: checkpoint_files.write_manifest(checkpoint, written, kept=False))
    for readers in READERS:
        forget(files)

        def read(number: int, readers: int = readers) -> str | None:
            return checkpoint_files.content_fault(checkpoint, checkpoint_files.share(written, number, readers))

        with ThreadPoolExecutor(readers) as pool:
            start = time.perf_counter()
            faults = list(pool.map(read, range(readers)))
            seconds[f"verify, {readers} at once"] = time.perf_counter() - start
        assert faults == [None] * readers, faults
    size = sum(file.size for file in written.values())
    rates = {name: round(size / value / 1e9, 3) for name, value in seconds.items() if name != "manifest"}
    return {"bytes": size, "seconds": {name: round(value, 2) for name, value in seconds.items()}, "gb_per_s": rates}


def main(arguments: list[str] | None = None) -> int:
    parser = command.parser_of(__doc__)
    parser.add_argument("--directory", type=Path, default=Path("runs"), help="on the disk that is meant (default: %(default)s)")
    parser.add_argument("--parameters", type=int, default=PARAMETERS["sd14"], metavar="N", help="default: SD v1.4's, %(default)s")
    parser.add_argument("--shards", type=int, default=8, metavar="N", help="files of optimizer states (default: %(default)s)")
    command.add_output(parser)
    args = parser.parse_args(arguments)
    return command.run(lambda: report(args, command.words(arguments)))


def report(args: argparse.Namespace, words: list[str]) -> int:
    origin = provenance(__file__, words)
    args.directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.directory) as folder:
        result = measure(Path(folder), args.parameters, args.shards)
    print(f"{result['bytes'] / 1e9:.2f} GB")
    for name, seconds in result["seconds"].items():
        rate = f", {result['gb_per_s'][name]:.2f} GB/s" if name in result["gb_per_s"] else ""
        print(f"{name}: {seconds:.1f} s{rate}")
    if args.output:
        write_json(args.output, origin | {"parameters": args.parameters, "shards": args.shards} | result)
        print(args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
