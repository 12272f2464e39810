"""Memory that must not grow: of an update with the number of steps, of the prompt stream with the number of prompts.

    python -m benchmarks.epoch.memory_flatness [--preset sd14] [--steps 10 50 200] [--prompts 100000 1000000] [--output FILE.json]

Every number comes from a process of its own. An update is measured over what is there when it starts, the epoch's trajectories
included: those are data, which grow with the steps, and their size is stated. The rows of a micro-batch are the same at every T.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.lib import command
from benchmarks.lib.made_up_prompts import build_prompts
from benchmarks.lib.provenance import provenance
from benchmarks.lib.published import PARAMETERS
from benchmarks.lib.resident import MIB, peak_over_baseline
from prdp_fast.core.errors import UserError
from prdp_fast.core.files import write_json
from prdp_fast.prompts import PromptSet, PromptStream

STEPS = [10, 50, 200]
PROMPTS = [100_000, 1_000_000]
PROMPTS_PER_EPOCH, EPOCHS = 64, 30  # of the stream: that many epochs, spread over the whole set
# Of the update. There are as many trajectories as rows in a micro-batch, so that it has this many rows at any number of steps.
MICRO_BATCH, IMAGES_PER_PROMPT = 16, 4
UPDATES = 3  # the C library's own use of pages varies by a few MiB


# ------------------------------------------------------------------------------------------------------ in a process of its own
def update_memory(preset: str, steps: int, config: str, overrides: list[str]) -> dict[str, Any]:
    """Bytes of one update at T steps, the median of `UPDATES`, after one that makes the optimizer's state and loads libraries."""
    # Imported here: the process that measures the prompt stream runs without the engine.
    from benchmarks.epoch.workload import Workload
    from prdp_fast.config.deepspeed import find_config
    from prdp_fast.planning.memory import peak_bytes

    sizes = [
        f"sampler.num_inference_steps={steps}", f"schedule.prompts_per_epoch={MICRO_BATCH // IMAGES_PER_PROMPT}",
        f"schedule.images_per_prompt={IMAGES_PER_PROMPT}", f"schedule.micro_batch={MICRO_BATCH}",
        f"sampler.rollout_batch={MICRO_BATCH}",
    ]  # fmt: skip
    # DeepSpeed's buffer for gradients takes 2 GB whatever the model's size, most of it never written to: here it is the model's.
    values = json.loads(find_config(config).read_text())
    values.setdefault("zero_optimization", {})["reduce_bucket_size"] = PARAMETERS[preset]
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / Path(config).name
        path.write_text(json.dumps(values))
        # Choices that are measured anew in every process would take memory of their own.
        fixed = ["performance.attention=sdpa", "performance.fuse_qkv=off"]
        workload = Workload.build(preset, [*fixed, *sizes, *overrides], config=str(path))
    trajectories = workload.rollout()
    reference = workload.reference(trajectories) if workload.needs_reference else None
    scores = workload.made_up_scores(torch.arange(workload.images, dtype=torch.float32))
    device = workload.device

    def update() -> None:
        workload.update(trajectories, scores, reference)

    update()
    peaks = [peak_over_baseline(update, device) for _ in range(UPDATES)]
    found = {"steps": steps, "trajectories": trajectories.latents.nbytes, "peak": statistics.median(peaks), "peaks": peaks}
    # On a CPU the exact count of tensors stands beside the pages; on CUDA the peak is that count already.
    found["tensors"] = found["peak"] if device.type == "cuda" else peak_bytes(update, workload.trainer.engine.engine.module)
    return found


def stream_memory(directory: Path, epochs: int) -> dict[str, int]:
    """Bytes that opening a prompt set and drawing `epochs` epochs all over it takes."""
    found = {}

    def draw() -> None:
        prompt_set = PromptSet.open(directory, "train")
        stream = PromptStream(prompt_set, seed=0, prompts_per_epoch=PROMPTS_PER_EPOCH)
        every = max(1, len(prompt_set) // PROMPTS_PER_EPOCH // epochs)
        drawn = sum(len(stream.epoch(number * every)) for number in range(epochs))
        found.update(prompts=len(prompt_set), shards=len(prompt_set.counts), drawn=drawn)

    return {"peak": peak_over_baseline(draw, torch.device("cpu")), **found}


# ---------------------------------------------------------------------------------------------------------------- the whole
def in_own_process(arguments: list[str]) -> dict[str, Any]:
    """The JSON that this script prints last when it is run with `arguments`. Raises: UserError with its last line of stderr."""
    # With this the C library gives a large tensor's pages back when the tensor is freed: resident pages are those in use.
    exact = {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-m", command.module_name(__file__), *arguments], capture_output=True, text=True,
        env=command.environment() | exact,
    )  # fmt: skip
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise UserError((lines[-1] if lines else f"{arguments} ended with status {done.returncode}").removeprefix("error: "))
    return json.loads(done.stdout.splitlines()[-1])


def growth(sizes: list[int]) -> float:
    """The largest over the smallest, less one."""
    return max(sizes) / min(sizes) - 1 if min(sizes) > 0 else float("nan")


def table(updates: list[dict[str, Any]], streams: list[dict[str, Any]]) -> str:
    lines = []
    if updates:
        lines.append(f"{'steps':>9} {'trajectories MiB':>17} {'update MiB':>11} {'its tensors MiB':>16}")
        for row in updates:
            trajectories, peak, tensors = (row[key] / MIB for key in ("trajectories", "peak", "tensors"))
            lines.append(f"{row['steps']:>9} {trajectories:>17.2f} {peak:>11.1f} {tensors:>16.2f}")
        longer = max(row["steps"] for row in updates) / min(row["steps"] for row in updates)
        by_page, by_tensor = (growth([row[key] for row in updates]) for key in ("peak", "tensors"))
        lines.append(f"{longer:.3g} times the steps: memory varies by {by_page:.1%}, tensors by {by_tensor:.2%}")
    if streams:
        lines.append(f"{'prompts':>9} {'on disk MiB':>17} {'stream MiB':>11} {'shards':>16}")
        for row in streams:
            lines.append(f"{row['prompts']:>9} {row['on_disk'] / MIB:>17.1f} {row['peak'] / MIB:>11.1f} {row['shards']:>16}")
        more = max(row["prompts"] for row in streams) / min(row["prompts"] for row in streams)
        lines.append(f"{more:.3g} times the prompts: memory varies by {growth([row['peak'] for row in streams]):.1%}")
    return "\n".join(lines)


def run(args: argparse.Namespace, words: list[str]) -> int:
    if args.update_at is not None:
        print(json.dumps(update_memory(args.preset, args.update_at, args.config, args.overrides)))
        return 0
    if args.stream_of is not None:
        print(json.dumps(stream_memory(args.stream_of, EPOCHS)))
        return 0
    origin = provenance(__file__, words) if args.output else {}
    job = ["--preset", args.preset, "--config", args.config, *(f"--set={override}" for override in args.overrides)]
    updates = [in_own_process([*job, "--update-at", str(steps)]) for steps in args.steps]
    streams = []
    for count in args.prompts:
        with tempfile.TemporaryDirectory() as directory:
            start = time.perf_counter()
            on_disk = build_prompts(Path(directory), count)
            built = time.perf_counter() - start
            streams.append(in_own_process(["--stream-of", directory]) | {"on_disk": on_disk, "build_seconds": built})
    if args.output:
        job_of = {"preset": args.preset, "micro_batch": MICRO_BATCH, "trajectories": MICRO_BATCH}
        write_json(args.output, origin | {"unit": "bytes", "job": job_of, "updates": updates, "streams": streams})
    print(table(updates, streams))
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = command.parser_of(__doc__)
    parser.add_argument("--preset", default="tiny", choices=PARAMETERS)
    parser.add_argument("--steps", type=int, nargs="*", default=STEPS, metavar="T")
    parser.add_argument("--prompts", type=int, nargs="*", default=PROMPTS, metavar="N", help=f"at least {PROMPTS_PER_EPOCH}")
    command.add_job_options(parser)
    parser.add_argument("--update-at", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--stream-of", type=Path, help=argparse.SUPPRESS)
    command.add_output(parser)
    args = parser.parse_args(arguments)
    return command.run(lambda: run(args, command.words(arguments)))


if __name__ == "__main__":
    sys.exit(main())
