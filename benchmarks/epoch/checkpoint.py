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
from functools import partial
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


def cost_of(do: Callable[[], object]) -> tuple[float, float]:
    """Seconds on the wall, and of processors: other processes on the machine stretch only the first."""
    wall, processor = time.perf_counter(), time.process_time()
    do()
    return time.perf_counter() - wall, time.process_time() - processor


def numbers(parameters: int, shards: int) -> list[dict[str, torch.Tensor]]:
    """What goes into each file. All shards hold the same numbers, of which memory then needs one shard's."""
    part = {name: torch.randn(-(-parameters // shards)) for name in ("weights", "exp_avg", "exp_avg_sq")}
    return [{"module": torch.randn(parameters, dtype=torch.bfloat16)}, *[part] * shards]


def verify(checkpoint: Path, files: checkpoint_files.Files, readers: int) -> None:
    """Read every byte from the disk. Readers are threads here, which hash at once as ranks do."""
    forget([checkpoint / name for name in files])
    parts = [checkpoint_files.share(files, number, readers) for number in range(readers)]
    with ThreadPoolExecutor(readers) as pool:
        faults = list(pool.map(lambda part: checkpoint_files.content_fault(checkpoint, part), parts))
    assert faults == [None] * readers, faults


def measure(directory: Path, parameters: int, shards: int) -> dict[str, Any]:
    """Bytes; and seconds and GB/s by part of the work, on the wall and of processors."""
    checkpoint, contents = directory / "epoch-000001", numbers(parameters, shards)
    checkpoint.mkdir()
    paths = [checkpoint / f"{number:02d}.pt" for number in range(len(contents))]
    written: checkpoint_files.Files = {}

    def write() -> None:
        for path, content in zip(paths, contents, strict=True):
            torch.save(content, path)

    def sync() -> None:
        for path in paths:
            with path.open("rb") as file:
                os.fsync(file.fileno())

    def hash_all() -> None:
        written.update({path.name: checkpoint_files.measure(path) for path in paths})

    costs = {"write": cost_of(write), "sync": cost_of(sync), "hash": cost_of(hash_all)}
    checkpoint_files.write_manifest(checkpoint, written, kept=False)
    for readers in READERS:
        costs[f"verify, {readers} at once"] = cost_of(partial(verify, checkpoint, written, readers))
    size = sum(file.size for file in written.values())
    parts = {
        name: {"seconds": round(wall, 2), "processor_seconds": round(processor, 2), "gb_per_s": round(size / wall / 1e9, 3)}
        for name, (wall, processor) in costs.items()
    }
    return {"bytes": size, "parts": parts}


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
    for name, part in result["parts"].items():
        print(f"{name}: {part['seconds']:.1f} s, {part['gb_per_s']:.2f} GB/s; {part['processor_seconds']:.1f} s of a processor")
    if args.output:
        write_json(args.output, origin | {"parameters": args.parameters, "shards": args.shards} | result)
        print(args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
