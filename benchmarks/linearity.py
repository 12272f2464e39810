"""What an epoch costs against prompts N, images a prompt B and steps T: each varied alone, a straight line through each.

    python benchmarks/linearity.py [--rounds 5] [--output FILE.json]

The embedded model. All sizes take turns in every round; each line goes through the medians. On a CPU the seconds are those that
the process was given, one thread, which a busy neighbour stretches less than the clock on the wall.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

if __package__ in (None, ""):  # run by path
    _root = Path(__file__).resolve().parent.parent
    sys.path[0] = str(_root)
    sys.path.insert(1, str(_root / "kernels"))

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

import torch

from benchmarks.phases import device_name, stopwatch
from benchmarks.provenance import arguments_of, provenance, result_file
from benchmarks.sizes import resized
from benchmarks.timing import Timing, interleave
from benchmarks.workload import Workload
from prdp_fast.core import distributed
from prdp_fast.core.errors import UserError
from prdp_fast.core.files import write_json

# What stays while another varies, and what it varies over. 16 images fill one batch of the rollout and one micro-batch a step, so
# that every size makes calls of one shape and only their number differs.
BATCH = 16
BASE = {"prompts": 4, "images_per_prompt": 4, "steps": 5}
VALUES = {
    "prompts": [4, 8, 16, 24, 32],
    "images_per_prompt": [4, 8, 16, 24, 32],
    "steps": [5, 10, 20, 30, 40],
}


@dataclass(frozen=True)
class Line:
    """seconds = intercept + slope * x, least squares."""

    intercept: float
    slope: float
    r_squared: float
    worst_residual: float  # |measured - line| / measured, the largest

    @classmethod
    def through(cls, x: list[float], seconds: list[float]) -> Line:
        """Raises: ValueError for fewer than three different x, through which any line would fit."""
        if len(set(x)) < 3:
            raise ValueError(f"Line.through: got {len(set(x))} different sizes, expected at least 3; measure more")
        n = len(x)
        mean_x, mean_y = sum(x) / n, sum(seconds) / n
        spread = sum((a - mean_x) ** 2 for a in x)
        slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, seconds, strict=True)) / spread
        intercept = mean_y - slope * mean_x
        residuals = [b - intercept - slope * a for a, b in zip(x, seconds, strict=True)]
        total = sum((b - mean_y) ** 2 for b in seconds)
        return cls(
            intercept,
            slope,
            1 - sum(r * r for r in residuals) / total if total else 1.0,
            max(abs(r) / b for r, b in zip(residuals, seconds, strict=True)),
        )


@dataclass(frozen=True)
class Series:
    """One size varied; times in milliseconds."""

    varied: str
    fixed: dict[str, int]
    values: list[int]
    timings: list[Timing]
    line: Line


def cost_watch(device: torch.device) -> Callable[[Callable[[], object]], float]:
    """Milliseconds of a call: on the wall on CUDA, of processor time on a CPU."""
    if device.type == "cuda":
        return stopwatch(device)

    def measure(call: Callable[[], object]) -> float:
        start = time.process_time()
        call()
        return 1e3 * (time.process_time() - start)

    return measure


def measure(workload: Workload, values: dict[str, list[int]], base: dict[str, int], rounds: int) -> list[Series]:
    """Epochs of every size, `rounds` times in turn.

    Args:
        workload: of at least as many prompts as any size asks for.
        values: name of a size to what it is varied over.
        base: all sizes, where another is varied.
    """
    watch = cost_watch(workload.embeddings.prompt_embeds.device)
    sizes = {(name, value): base | {name: value} for name, chosen in values.items() for value in chosen}
    # The sizes that coincide, one of each series as a rule, are still measured for each: turns are cheaper than a special case.
    epochs = {key: resized(workload, **size) for key, size in sizes.items()}
    times = interleave(
        {f"{name} {value}": partial(watch, epochs[name, value].epoch) for name, value in sizes}, rounds=rounds, warmup=1
    )
    found = []
    for name, chosen in values.items():
        timings = [times[f"{name} {value}"] for value in chosen]
        line = Line.through([float(value) for value in chosen], [timing.median_ms / 1e3 for timing in timings])
        found.append(Series(name, {key: value for key, value in base.items() if key != name}, chosen, timings, line))
    return found


def table(series: list[Series]) -> str:
    lines = []
    for one in series:
        fixed = ", ".join(f"{name} {value}" for name, value in one.fixed.items())
        lines.append(f"{one.varied} ({fixed})")
        for value, timing in zip(one.values, one.timings, strict=True):
            fitted = 1e3 * (one.line.intercept + one.line.slope * value)
            lines.append(
                f"  {value:>5} {timing.median_ms:>9.1f} ms (spread {timing.iqr_ms:.1f}), "
                f"line {fitted:>9.1f} ms, off by {timing.median_ms / fitted - 1:+.1%}"
            )
        lines.append(
            f"  seconds = {one.line.intercept:.3f} + {one.line.slope:.4f} x, R^2 {one.line.r_squared:.5f}, "
            f"worst residual {one.line.worst_residual:.1%}"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, values in VALUES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, nargs="+", default=values, metavar="VALUE")
    parser.add_argument("--config", default="zero2.json", help="DeepSpeed JSON, as for training")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--rounds", type=int, default=5)
    result_file(parser)
    args = parser.parse_args(arguments)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    origin = provenance(__file__, arguments_of(arguments)) if args.output else {}  # of what runs, so at the start
    values = {name: getattr(args, name) for name in VALUES}
    for name, chosen in values.items():
        if len(set(chosen)) < 3 or min(chosen) < 2:
            parser.error(f"--{name.replace('_', '-')} is {chosen}; expected three or more different sizes from 2")
    sizes = [
        f"schedule.prompts_per_epoch={max(BASE['prompts'], *values['prompts'])}", f"schedule.micro_batch={BATCH}",
        f"sampler.rollout_batch={BATCH}",
    ]  # fmt: skip
    try:
        workload = Workload.build("tiny", [*sizes, *args.overrides], config=args.config)
        series = measure(workload, values, BASE, args.rounds)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        distributed.shutdown()
    device = device_name(workload.embeddings.prompt_embeds.device)
    clock = "wall" if torch.cuda.is_available() else "processor"
    if args.output:
        write_json(
            args.output,
            origin | {"device": device, "clock": clock, "rounds": args.rounds, "series": [asdict(one) for one in series]},
        )
    print(f"an epoch of the embedded model on {device}, {clock} time, median of {args.rounds} rounds\n{table(series)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
