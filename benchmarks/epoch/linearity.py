"""What an epoch costs against prompts N, images a prompt B and steps T: each varied alone, a straight line fitted to each.

    python -m benchmarks.epoch.linearity [--rounds 5] [--output FILE.json]

The embedded model. All sizes take turns in every round, and each line is fitted to the medians. On a CPU the seconds are
processor time of one thread, which other processes on the machine stretch less than time on the wall.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import torch

from benchmarks.epoch.workload import TINY, Workload
from benchmarks.lib import command
from benchmarks.lib.provenance import provenance
from benchmarks.lib.timing import Timing, device_name, interleave, wall_clock
from prdp_fast.core.files import write_json

# What is kept while another size varies, and what it varies over. 16 images fill one batch of the rollout and one micro-batch a
# step, so that every size makes calls of one shape and only their number differs.
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
        return wall_clock(device)

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
    watch = cost_watch(workload.device)
    sizes = {(name, value): base | {name: value} for name, chosen in values.items() for value in chosen}
    # Sizes that two series have in common are measured for each: that is cheaper than a special case.
    epochs = {key: workload.resized(**size) for key, size in sizes.items()}
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


def run(args: argparse.Namespace, words: list[str]) -> int:
    origin = provenance(__file__, words) if args.output else {}
    values = {name: getattr(args, name) for name in VALUES}
    sizes = [
        f"schedule.prompts_per_epoch={max(BASE['prompts'], *values['prompts'])}", f"schedule.micro_batch={BATCH}",
        f"sampler.rollout_batch={BATCH}",
    ]  # fmt: skip
    workload = Workload.build(TINY, [*sizes, *args.overrides], config=args.config)
    series = measure(workload, values, BASE, args.rounds)
    device = device_name(workload.device)
    clock = "wall" if torch.cuda.is_available() else "processor"
    if args.output:
        write_json(
            args.output,
            origin | {"device": device, "clock": clock, "rounds": args.rounds, "series": [asdict(one) for one in series]},
        )
    print(f"an epoch of the embedded model on {device}, {clock} time, median of {args.rounds} rounds\n{table(series)}")
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = command.parser_of(__doc__)
    for name, values in VALUES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, nargs="+", default=values, metavar="VALUE")
    command.add_job_options(parser)
    parser.add_argument("--rounds", type=int, default=5)
    command.add_output(parser)
    args = parser.parse_args(arguments)
    for name in VALUES:
        chosen = getattr(args, name)
        if len(set(chosen)) < 3 or min(chosen) < 2:
            parser.error(f"--{name.replace('_', '-')} is {chosen}; expected three or more different sizes from 2")
    return command.run(lambda: run(args, command.words(arguments)))


if __name__ == "__main__":
    sys.exit(main())
