"""The engine against its own loop in eager form, and against a plain DDPO trainer, on the embedded model.

python benchmarks/compare_trainers.py
python benchmarks/compare_trainers.py --set schedule.prompts_per_epoch=4 --rounds 9 --output results.json

Each contestant is a process of its own, with its own settings of the C library, of torch and of the compiler, as a user would run
it; they take turns, one phase at a time, while the others sleep, and a round's ratios are taken within the round.

    plain DDPO   benchmarks/plain_ddpo.py: the usual loop of the field, in the batches of ddpo-pytorch's full finetuning
                 (config/dgx.py): 8 are sampled, 4 trained at a time
    plain large  the same loop in the engine's own batches, the best there is for it here
    eager        the engine's loop with everything under `performance` off, and the process as Python starts it
    engine       the engine as it is meant: compiled, freed memory kept, the rest measured at start; equal U-Net rows
    engine PRDP  the same with the objective it is for: reference log-probs on top
    subsets      PRDP with random timesteps for update and reference; fewer U-Net rows, the same gradient in expectation

Rows are equal in the first four: text, rollout, decoding, reward, gradient pass, optimizer step.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run by path
    _root = Path(__file__).resolve().parent.parent
    sys.path[0] = str(_root)
    sys.path.insert(1, str(_root / "kernels"))

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

import torch

from benchmarks.phases import stopwatch
from benchmarks.plain_ddpo import PlainDdpo
from benchmarks.provenance import arguments_of, provenance, result_file
from benchmarks.timing import Timing
from benchmarks.workload import Workload
from prdp_fast.core import distributed
from prdp_fast.core.errors import UserError
from prdp_fast.core.files import write_json

BASELINES = ("eager", "plain DDPO", "plain large")
PHASES = ("rollout", "update", "epoch")
EAGER = (
    "performance={attention: sdpa, compile: 'off', cuda_graphs: 'off', channels_last: 'off', fuse_qkv: 'off', tf32: 'off', "
    "fused_optimizer: 'off', coalesce_gradients: 'off', background_rewards: 'off'}"
)
DDPO = "objective={name: ddpo}"


@dataclass(frozen=True)
class Contestant:
    """What a process is to be."""

    overrides: tuple[str, ...]
    plain: tuple[int, int] | None = None  # the plain trainer instead of the engine; rows it samples and trains at a time
    as_started: bool = False  # leave the process as Python starts it


CONTESTANTS = {
    "plain DDPO": Contestant((EAGER, DDPO), plain=(8, 4), as_started=True),
    "plain large": Contestant((EAGER, DDPO), plain=(64, 64), as_started=True),
    "eager": Contestant((EAGER, DDPO), as_started=True),
    "engine": Contestant(("performance.compile=full", DDPO)),
    "engine PRDP": Contestant(("performance.compile=full",)),
    "subsets": Contestant(("performance.compile=full", "schedule.update_timesteps=2", "schedule.reference_timesteps=2")),
}


def phases_of(contestant: Contestant, overrides: list[str]) -> tuple[dict[str, Callable[[], object]], int]:
    """(a call for every phase, images an epoch) in this process."""
    workload = Workload.build("tiny", [*contestant.overrides, *overrides], prepare=not contestant.as_started)
    assert workload.pipeline is not None and workload.text is not None
    rewards = torch.rand(workload.images, generator=torch.Generator().manual_seed(0))
    if contestant.plain is None:
        trajectories = workload.rollout()
        reference = workload.reference(trajectories) if workload.objective.needs_reference else None
        return {
            "rollout": workload.rollout,
            "update": lambda: workload.update(trajectories, rewards, reference),
            "epoch": workload.epoch,
        }, workload.images
    text, prompts, count = workload.text, workload.prompts, workload.images_per_prompt
    plain = PlainDdpo(
        copy.deepcopy(workload.reference_denoiser), workload.pipeline, workload.policy.transitions, workload.rewards,
        guidance_scale=workload.policy.guidance_scale, batch=contestant.plain[0], train_batch=contestant.plain[1],
    )  # fmt: skip
    embeds, empty = workload.embeddings.prompt_embeds.repeat_interleave(count, 0), workload.embeddings.negative_prompt_embeds

    def sample() -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [plain.sample(part, empty) for part in embeds.split(plain.batch)]

    def epoch() -> None:
        encoded = text.encode(prompts)
        plain.epoch(prompts, count, encoded.prompt_embeds, encoded.negative_prompt_embeds)

    samples = sample()
    return {
        "rollout": sample,
        "update": lambda: plain.update(samples, rewards.view(len(prompts), count), embeds, empty),
        "epoch": epoch,
    }, workload.images


def work(contestant: Contestant, overrides: list[str]) -> int:
    """The process of one contestant: a phase's name comes in, its milliseconds go out."""
    calls, images = phases_of(contestant, overrides)
    watch = stopwatch(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    for call in calls.values():
        call()  # compiles, allocates
    answers = os.fdopen(int(os.environ["PRDP_ANSWERS"]), "w", buffering=1)  # libraries print to stdout
    answers.write(f"{images}\n")
    for line in sys.stdin:
        answers.write(f"{watch(calls[line.strip()])}\n")
    distributed.shutdown()
    return 0


@contextmanager
def process(name: str, overrides: list[str]) -> Iterator[tuple[Callable[[str], float], int]]:
    """Start a contestant. Yields: (phase -> milliseconds, images an epoch), once it is warm."""
    read, write = os.pipe()
    child = subprocess.Popen(
        [sys.executable, __file__, "--worker", name, "--overrides", json.dumps(overrides)],
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, pass_fds=(write,), text=True,
        env=os.environ | {"PRDP_ANSWERS": str(write)},
    )  # fmt: skip
    os.close(write)
    with os.fdopen(read) as answers:
        first = answers.readline()
        if not first:
            raise UserError(f"contestant {name!r} did not start; its own error stands above (exit {child.wait()})")

        def ask(phase: str) -> float:
            assert child.stdin is not None
            child.stdin.write(phase + "\n")
            child.stdin.flush()
            return float(answers.readline())

        try:
            yield ask, int(first)
        finally:
            assert child.stdin is not None
            child.stdin.close()
            child.wait(60)


@dataclass(frozen=True)
class Comparison:
    """`milliseconds[name][phase]`, and `ratio[name][phase]`: how many times as fast as `baseline`, the median of the rounds."""

    images: int
    rounds: int
    baseline: str
    milliseconds: dict[str, dict[str, Timing]]
    ratio: dict[str, dict[str, Timing]]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare(names: list[str], overrides: list[str], rounds: int) -> dict[str, Comparison]:
    """Every contestant against each of BASELINES, from the same rounds."""
    with ExitStack() as stack:
        started = {name: stack.enter_context(process(name, overrides)) for name in names}
        samples: dict[str, dict[str, list[float]]] = {name: {phase: [] for phase in PHASES} for name in names}
        for number in range(rounds):
            for phase in PHASES:
                for name in names[number % len(names) :] + names[: number % len(names)]:
                    samples[name][phase].append(started[name][0](phase))
        images = {count for _, count in started.values()}
        assert len(images) == 1, images
    milliseconds = {name: {phase: Timing.of(values) for phase, values in own.items()} for name, own in samples.items()}

    def against(baseline: str) -> dict[str, dict[str, Timing]]:
        return {
            name: {
                phase: Timing.of([b / a for a, b in zip(own[phase], samples[baseline][phase], strict=True)]) for phase in PHASES
            }
            for name, own in samples.items()
        }

    count = images.pop()
    return {
        baseline: Comparison(count, rounds, baseline, milliseconds, against(baseline))
        for baseline in BASELINES if baseline in names
    }  # fmt: skip


def table(comparisons: dict[str, Comparison]) -> str:
    """Milliseconds with spread, and images per second; then one table of ratios for each baseline."""
    any_of = next(iter(comparisons.values()))
    lines = [f"{any_of.images} images an epoch, {any_of.rounds} rounds; median (interquartile range)"]
    lines.append(f"{'':12}" + "".join(f"{phase + ' ms':>20}" for phase in PHASES) + f"{'images/s':>10}")
    for name, phases in any_of.milliseconds.items():
        cells = "".join(f"{f'{t.median_ms:.0f} ({t.iqr_ms:.0f})':>20}" for t in phases.values())
        lines.append(f"{name:12}{cells}{1e3 * any_of.images / phases['epoch'].median_ms:10.1f}")
    for comparison in comparisons.values():
        lines.append(f"times as fast as {comparison.baseline}")
        for name, phases in comparison.ratio.items():
            if name != comparison.baseline:
                cells = "".join(f"{f'{t.median_ms:.3f} ({t.iqr_ms:.3f})':>20}" for t in phases.values())
                lines.append(f"{name:12}{cells}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS), metavar="CONTESTANT")
    result_file(parser)
    parser.add_argument("--worker", choices=CONTESTANTS, help=argparse.SUPPRESS)
    parser.add_argument("--overrides", dest="worker_overrides", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    try:
        if args.worker:
            return work(CONTESTANTS[args.worker], args.worker_overrides)
        origin = provenance(__file__, arguments_of(arguments)) if args.output else {}  # of what runs, so at the start
        comparisons = compare(args.only, args.overrides, args.rounds)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(comparisons))
    if args.output:
        against = {name: comparison.as_dict() for name, comparison in comparisons.items()}
        write_json(args.output, origin | {"against": against})
    return 0


if __name__ == "__main__":
    sys.exit(main())
