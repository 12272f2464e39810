"""An epoch of a Stable Diffusion v1.4-shaped model on this GPU, the eager loop against the full path, in one command and offline.

    make gpu-bench             make gpu-bench ARGS="--steps 25 --rounds 3"             make gpu-bench ARGS="--output FILE"

Published configuration, random weights, bf16, guidance; few prompts and images, so rates are per image. Both paths are built in
one process and take turns, phase by phase. Before anything is timed, outputs and gradient of the full path are compared with
float32 on a few rows: where they are more than 1.5 times as far off as plain eager code in the same dtype, nothing is timed and
the exit status is 1.

    eager   everything under `performance` off, PyTorch's own attention, operators in plain torch
    full    everything `auto`, as a job starts: attention, compilation, CUDA graphs, fused optimizer; Triton operators

The python must have what training needs, DeepSpeed and diffusers among it. Rounds end early when the time is up, and the results
say how many there were. The results file is written anew after every step, so that a run that is cut short leaves what it had.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything imports the hub's client

import torch

from benchmarks.lib import command
from benchmarks.lib.command import ROOT

NEEDED = ("deepspeed", "diffusers", "transformers", "peft", "pydantic", "yaml", "webdataset", "numpy", "PIL")

BUDGET = 480.0  # seconds from the start, after which no round begins
PROMPTS, IMAGES_PER_PROMPT, STEPS, GUIDANCE, BATCH = 2, 8, 50, 5.0, 16
PATHS = ("eager", "full")
PHASES = ("rollout", "reference", "update")


@dataclass
class Measured:
    """Of one path; milliseconds, an entry a round."""

    build_s: float = 0.0
    first_epoch_s: float = 0.0  # includes what is compiled at the first call
    choices: dict[str, Any] = field(default_factory=dict)  # under `performance`
    times: dict[str, list[float]] = field(default_factory=dict)
    added_mib: dict[str, float] = field(default_factory=dict)  # the most a phase held beyond what was there, both paths' weights


@dataclass(frozen=True)
class PhaseResult:
    median_ms: float
    iqr_ms: float
    images_per_s: float
    tflop_per_s: float
    share_of_peak: float


def gradients(workload: Any, trajectories: Any) -> list[torch.Tensor]:
    """Of everything that is trained, for one micro-batch whose log-probs weigh +1 and -1 in turn.

    Nothing is added to the weights' own gradients, which DeepSpeed would take for an update's.
    """
    from prdp_fast.sampling.rows import micro_batches

    part = next(micro_batches(workload.policy, trajectories, workload.trainer.micro_batch))
    weights = torch.ones(len(part.rows), device=part.latents.device)
    weights[1::2] = -1
    module = workload.trainer.engine.engine.module
    with torch.enable_grad():
        value, _ = workload.policy.weighted_log_prob(
            module, part.latents, part.prev_latents, part.steps, part.embeddings, guided=part.guided, weights=weights
        )
        found = torch.autograd.grad(value, [p for p in module.parameters() if p.requires_grad], allow_unused=True)
    return [torch.zeros(()) if gradient is None else gradient.float().cpu() for gradient in found]


def rounds_in_time(
    contestants: dict[str, dict[str, Callable[[], float]]], rounds: int, left: Callable[[], float], done: Callable[[int], None]
) -> tuple[dict[str, dict[str, list[float]]], int]:
    """Every phase of every path in turn, `rounds` times while there is time for another round like the longest.

    Args:
        contestants: path to phase to what runs it once and gives its milliseconds.
        left: seconds that are left.
        done: told the number of finished rounds.
    Returns: times by path and phase, and the number of rounds.
    """
    times: dict[str, dict[str, list[float]]] = {path: {phase: [] for phase in phases} for path, phases in contestants.items()}
    longest, finished = 0.0, 0
    while finished < rounds and left() > longest:
        before = left()
        order = list(contestants)
        if finished % 2:
            order.reverse()  # the second finds a warmer device
        for phase in PHASES:
            for path in order:
                times[path][phase].append(contestants[path][phase]())
        longest = max(longest, before - left())
        finished += 1
        done(finished)
    return times, finished


def results(times: dict[str, list[float]], tflop: dict[str, float], images: int, peak: float) -> dict[str, PhaseResult]:
    """Phase by phase, and the epoch, whose time is the sum within each round."""
    from benchmarks.lib.timing import Timing

    every = times | {"epoch": [sum(one) for one in zip(*(times[phase] for phase in PHASES), strict=True)]}
    total = tflop | {"epoch": sum(tflop.values())}
    found = {}
    for phase, samples in every.items():
        timing = Timing.of(samples)
        seconds = timing.median_ms / 1e3
        rate = total[phase] / seconds
        found[phase] = PhaseResult(timing.median_ms, timing.iqr_ms, images / seconds, rate, rate / peak)
    return found


def speed_ups(times: dict[str, dict[str, list[float]]]) -> dict[str, float]:
    """Eager's time over full's: the median of the rounds' ratios."""
    totals = {path: [sum(one) for one in zip(*(of[phase] for phase in PHASES), strict=True)] for path, of in times.items()}
    found = {
        phase: statistics.median(a / b for a, b in zip(times["eager"][phase], times["full"][phase], strict=True))
        for phase in PHASES
    }
    return found | {"epoch": statistics.median(a / b for a, b in zip(totals["eager"], totals["full"], strict=True))}


def table(found: dict[str, dict[str, PhaseResult]], ratios: dict[str, float]) -> str:
    lines = [f"{'phase':<10} {'path':<6} {'ms':>10} {'spread':>8} {'images/s':>9} {'TFLOP/s':>9} {'of peak':>8} {'faster':>7}"]
    for phase in (*PHASES, "epoch"):
        for path in PATHS:
            one = found[path][phase]
            ratio = f"{ratios[phase]:.2f}x" if path == "full" else ""
            lines.append(
                f"{phase if path == 'eager' else '':<10} {path:<6} {one.median_ms:>10.1f} {one.iqr_ms:>8.1f} "
                f"{one.images_per_s:>9.3f} {one.tflop_per_s:>9.3g} {one.share_of_peak:>8.1%} {ratio:>7}"
            )
    return "\n".join(lines)


def default_output(device: str, date: str) -> Path:
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return ROOT / "benchmarks" / "results" / f"epoch-{slug}-{date[:10]}.json"


def bench(args: argparse.Namespace, arguments: list[str], started: float) -> int:
    from benchmarks.epoch.phases import phase_calls
    from benchmarks.epoch.truth import compare
    from benchmarks.epoch.workload import EAGER, Workload
    from benchmarks.lib.provenance import provenance
    from benchmarks.lib.resident import MIB, can_measure, peak_over_baseline
    from benchmarks.lib.timing import device_name, peak_tflop_per_s, wall_clock
    from prdp_fast.acceleration.process import set_tf32
    from prdp_fast.core.errors import UserError
    from prdp_fast.core.files import write_json

    def elapsed() -> float:
        return time.monotonic() - started

    def say(line: str) -> None:
        print(f"{elapsed():5.0f} s  {line}", flush=True)

    record: dict[str, Any] = provenance(__file__, arguments)
    device_kind = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    output = (args.output or default_output(device_name(device_kind), record["date"])).absolute()
    output.parent.mkdir(parents=True, exist_ok=True)
    record |= {
        "status": "unfinished",
        "job": {
            "preset": args.preset, "prompts": args.prompts, "images_per_prompt": args.images_per_prompt, "steps": args.steps,
            "guidance_scale": args.guidance, "batch": args.batch, "config": Path(args.config).name,
        },
        "budget_s": args.budget, "rounds_wanted": args.rounds, "rounds": 0,
    }  # fmt: skip

    def write(**changes: Any) -> None:
        record.update(changes)
        write_json(output, record | {"seconds": elapsed()})

    write()
    sizes = [
        f"schedule.prompts_per_epoch={args.prompts}", f"schedule.images_per_prompt={args.images_per_prompt}",
        f"schedule.micro_batch={args.batch}", f"sampler.rollout_batch={args.batch}", f"sampler.num_inference_steps={args.steps}",
        f"sampler.guidance_scale={args.guidance}",
    ]  # fmt: skip
    overrides = {"eager": [EAGER, "kernels=torch"], "full": [*args.overrides]}
    measured = {path: Measured() for path in PATHS}
    workloads: dict[str, Any] = {}
    for path in PATHS:
        start = time.monotonic()
        workloads[path] = Workload.build(args.preset, [*sizes, *overrides[path]], config=args.config)
        measured[path].build_s = time.monotonic() - start
        measured[path].choices = workloads[path].trainer.acceleration.record()
        say(f"{path} built")
        if path == "full":
            print(workloads[path].trainer.acceleration, flush=True)
    if not workloads["full"].needs_reference:
        raise UserError("gpu-bench times a reference pass, and this objective has none; leave objective.name at prdp")
    device, dtype = workloads["full"].device, workloads["full"].dtype

    def enter(path: str) -> None:
        """Give the process the path's settings. Code that was compiled under others would compile again."""
        set_tf32(workloads[path].settings.performance.tf32, device, dtype)

    enter("full")
    agreement = compare(workloads["full"], workloads["eager"].rollout())
    fault = agreement.fault()
    say(f"the full path is {agreement}")
    write(agreement=asdict(agreement), paths={path: asdict(one) for path, one in measured.items()})
    if fault:
        write(status="disagree", fault=fault)
        print(f"gpu-bench: the full path is wrong: {fault}; no speed-up is reported\n{output}", file=sys.stderr)
        return 1

    watch = wall_clock(device)
    calls = {}
    for path in PATHS:  # warms up, and compiles what is compiled at the first call
        enter(path)
        start = time.monotonic()
        calls[path] = phase_calls(workloads[path])
        for phase in PHASES:
            run = calls[path][phase].run
            if can_measure(device):
                measured[path].added_mib[phase] = peak_over_baseline(run, device) / MIB
            else:
                run()
        measured[path].first_epoch_s = time.monotonic() - start
        say(f"{path} ran once")
        write(paths={name: asdict(one) for name, one in measured.items()})

    def timed(path: str, phase: str) -> Callable[[], float]:
        def run() -> float:
            enter(path)
            return watch(calls[path][phase].run)

        return run

    peak = peak_tflop_per_s(device, dtype)
    contestants = {path: {phase: timed(path, phase) for phase in PHASES} for path in PATHS}

    def done(number: int) -> None:
        nonlocal peak
        peak = max(peak, peak_tflop_per_s(device, dtype))
        say(f"round {number} of {args.rounds}")
        write(rounds=number, paths={path: asdict(one) for path, one in measured.items()})

    times, finished = rounds_in_time(contestants, args.rounds, lambda: args.budget - elapsed(), done)
    if not finished:
        write(status="out of time")
        print(
            f"gpu-bench: out of time before the first round ended ({args.budget:.0f} s); lower --steps\n{output}", file=sys.stderr
        )
        return 1
    tflop = {phase: calls["full"][phase].tflop for phase in PHASES}
    images = workloads["full"].images
    found = {path: results(times[path], tflop, images, peak) for path in PATHS}
    ratios = speed_ups(times)
    for path in PATHS:
        measured[path].times = times[path]
    write(
        status="measured", device=device_name(device), dtype=str(dtype).removeprefix("torch."), images=images,
        peak_tflop_per_s=peak, tflop=tflop, rounds=finished, paths={path: asdict(one) for path, one in measured.items()},
        results={path: {phase: asdict(one) for phase, one in found[path].items()} for path in PATHS}, speed_up=ratios,
    )  # fmt: skip
    cut = f" (time was up: {args.rounds} were wanted)" if finished < args.rounds else ""
    print(
        f"{args.preset} on {device_name(device)}, {record['dtype']}: {images} images, {args.steps} steps, "
        f"guidance {args.guidance:g}, {finished} rounds{cut}; matrix product {peak:.4g} TFLOP/s\n{table(found, ratios)}\n{output}"
    )
    return 0


def main(arguments: list[str] | None = None) -> int:
    started = time.monotonic()
    parser = command.parser_of(__doc__)
    parser.add_argument("--preset", default="sd14", choices=["sd14", "sd21", "sdxl", "tiny"])
    parser.add_argument("--prompts", type=int, default=PROMPTS, help="N")
    parser.add_argument("--images-per-prompt", type=int, default=IMAGES_PER_PROMPT, help="B")
    parser.add_argument("--steps", type=int, default=STEPS, help="T")
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--batch", type=int, default=BATCH, help="trajectories a denoiser call; guidance doubles the rows")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds after which no round begins")
    parser.add_argument("--config", default="zero2.json", help="DeepSpeed JSON, as for training")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE", help="of the full path"
    )
    parser.add_argument("--output", type=Path, help="results file; default: benchmarks/results/epoch-DEVICE-DATE.json")
    args = parser.parse_args(arguments)
    if args.preset != "tiny" and not torch.cuda.is_available():
        built_for = torch.version.cuda or "no CUDA"
        message = f"gpu-bench: no CUDA device (torch {torch.__version__}, built for {built_for}); nothing was measured or written"
        print(f"{message}; run it on a machine with an NVIDIA GPU", file=sys.stderr)
        return 1
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(f"gpu-bench: this python lacks {', '.join(missing)}; install setup.py's requirements into it", file=sys.stderr)
        return 1
    return command.run(lambda: bench(args, command.words(arguments), started))


if __name__ == "__main__":
    sys.exit(main())
