"""Every prompt exactly once a pass, through stops, restarts and changes of the ranks: how fast, and in how much memory.

    python -m benchmarks.epoch.exactly_once [--prompts 1000000] [--output FILE.json]

A pass over a made-up set is drawn in many starts, each with another number of ranks, whose parts are all drawn here. A start
opens the set anew, and begins up to a few epochs before the end of the one before it, as one that goes on from a checkpoint does.
The rate is a job's whose ranks each draw their own part, by the time of the first one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.lib import command
from benchmarks.lib.made_up_prompts import build_prompts
from benchmarks.lib.provenance import provenance
from benchmarks.lib.resident import MIB
from prdp_fast.core.errors import UserError
from prdp_fast.core.files import write_json
from prdp_fast.core.records import Prompt
from prdp_fast.prompts import PromptSet, PromptStream

PROMPTS = 1_000_000
PROMPTS_PER_EPOCH = 720
RANKS = [ranks for ranks in range(1, 17) if PROMPTS_PER_EPOCH % ranks == 0]
STARTS = 50  # of a pass, about
MOST_REPEATED = 4  # epochs that a start draws again
WARM = 0.1  # of a pass, after which memory is looked at
RATE_EPOCHS = 60
RATE_RANKS = (1, 16)


def resident() -> int:
    """Bytes."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(fields["VmRSS"].split()[0])


def streams_of(directory: Path, ranks: int) -> list[PromptStream]:
    """Of all ranks of a start, on one set that is opened for it."""
    prompt_set = PromptSet.open(directory, "train")
    return [
        PromptStream(prompt_set, seed=0, prompts_per_epoch=PROMPTS_PER_EPOCH, rank=rank, world_size=ranks)
        for rank in range(ranks)
    ]


def epoch_of(streams: list[PromptStream], epoch: int) -> list[Prompt]:
    return [prompt for stream in streams for prompt in stream.epoch(epoch)]


def digest(prompts: list[Prompt]) -> bytes:
    return hashlib.blake2b(b"".join(prompt.index.to_bytes(8, "little") for prompt in prompts), digest_size=8).digest()


def walk(directory: Path, passes: int = 1, *, seed: int = 0, starts: int = STARTS) -> dict[str, Any]:
    """Draw whole passes in many starts.

    Returns: what was drawn, and resident bytes on the way.
    Raises: UserError if a prompt comes twice in a pass, or not at all, or if a start draws an epoch otherwise than before.
    """
    draws, total = random.Random(seed), len(PromptSet.open(directory, "train"))
    epochs = -(-passes * total // PROMPTS_PER_EPOCH)
    counts, drawn, finished = np.zeros(total, np.uint8), 0, 0  # counts: of the pass that is running
    digests: list[bytes] = []
    samples: list[int] = []
    found: dict[str, Any] = {"prompts": total, "passes": passes, "starts": 0, "repeated": 0, "ranks": []}
    while finished < epochs:
        first = max(0, finished - draws.randint(0, MOST_REPEATED))
        last = min(epochs, finished + draws.randint(1, max(2, 2 * epochs // starts)))
        ranks = draws.choice(RANKS)
        streams = streams_of(directory, ranks)
        found["starts"] += 1
        found["ranks"] = sorted({*found["ranks"], ranks})
        for epoch in range(first, last):
            prompts = epoch_of(streams, epoch)
            if epoch < finished:
                found["repeated"] += 1
                if digests[epoch] != digest(prompts):
                    raise UserError(f"epoch {epoch} has other prompts on {ranks} ranks than before")
                continue
            digests.append(digest(prompts))
            for prompt in prompts:
                counts[prompt.index] += 1
                drawn += 1
                if drawn % total == 0:
                    if not (counts == 1).all():
                        raise UserError(f"pass {drawn // total}: {int((counts != 1).sum())} prompts came twice or not at all")
                    counts[:] = 0
        finished = last
        if drawn > WARM * passes * total:
            samples.append(resident())
    return found | {"drawn": drawn, "resident": samples, "growth": max(samples) / min(samples) - 1}


def rate(directory: Path, ranks: int) -> float:
    """Prompts a second of a job of so many ranks, from what the first one needs; opening the set included."""
    start = time.perf_counter()
    stream = streams_of(directory, ranks)[0]
    total = len(stream.prompt_set)
    epochs = min(RATE_EPOCHS, total // PROMPTS_PER_EPOCH)
    for epoch in range(epochs):
        stream.epoch(epoch)
    return epochs * PROMPTS_PER_EPOCH / (time.perf_counter() - start)


def needed() -> float:
    """Prompts a second that a job of the embedded model uses up, on this machine: of an epoch like its second."""
    from benchmarks.epoch.workload import Workload

    workload = Workload.build("tiny", ["performance.attention=sdpa", "performance.fuse_qkv=off", "performance.compile=off"])
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        workload.epoch()
        seconds.append(time.perf_counter() - start)
    return len(workload.prompts) / min(seconds)


def in_own_process(arguments: list[str]) -> Any:
    """The JSON that this script prints last. Raises: UserError with its last line of stderr."""
    done = subprocess.run(
        [sys.executable, "-m", command.module_name(__file__), *arguments], capture_output=True, text=True,
        env=command.environment(),
    )  # fmt: skip
    if done.returncode:
        raise UserError((done.stderr.strip().splitlines() or ["it ended without a word"])[-1].removeprefix("error: "))
    return json.loads(done.stdout.strip().splitlines()[-1])


def run(args: argparse.Namespace, words: list[str]) -> int:
    if args.part is not None:
        parts = {"walk": lambda: walk(args.of), "rate": lambda: [rate(args.of, ranks) for ranks in RATE_RANKS], "needed": needed}
        print(json.dumps(parts[args.part]()))
        return 0
    origin = provenance(__file__, words) if args.output else {}
    with tempfile.TemporaryDirectory() as directory:
        on_disk = build_prompts(Path(directory), args.prompts)
        walked = in_own_process(["--part", "walk", "--of", directory])
        rates = in_own_process(["--part", "rate", "--of", directory])
    epoch = in_own_process(["--part", "needed"])
    by_ranks = dict(zip(map(str, RATE_RANKS), rates, strict=True))
    found = {"prompts_per_epoch": PROMPTS_PER_EPOCH, "on_disk": on_disk, "walk": walked, "prompts_per_s": by_ranks,
             "needed_per_s": epoch, "times_needed": min(rates) / epoch}  # fmt: skip
    if args.output:
        write_json(args.output, origin | found)
    low, high = min(walked["resident"]) / MIB, max(walked["resident"]) / MIB
    print(
        f"{walked['drawn']:,} prompts drawn once each in {walked['starts']} starts on {walked['ranks']} ranks, "
        f"{walked['repeated']} epochs drawn again alike\n"
        f"resident {low:.1f} to {high:.1f} MiB, {walked['growth']:.1%}\n"
        + "".join(f"{value:,.0f} prompts/s on {ranks} ranks\n" for ranks, value in by_ranks.items())
        + f"the embedded epoch needs {epoch:.2f} prompts/s: {found['times_needed']:,.0f} times that"
    )
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = command.parser_of(__doc__)
    parser.add_argument("--prompts", type=int, default=PROMPTS, metavar="N", help=f"at least {PROMPTS_PER_EPOCH}")
    parser.add_argument("--part", choices=["walk", "rate", "needed"], help=argparse.SUPPRESS)
    parser.add_argument("--of", type=Path, help=argparse.SUPPRESS)
    command.add_output(parser)
    args = parser.parse_args(arguments)
    return command.run(lambda: run(args, command.words(arguments)))


if __name__ == "__main__":
    sys.exit(main())
