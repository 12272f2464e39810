"""The engine against its own loop in eager form, and against a plain DDPO trainer, on the embedded model.

python -m benchmarks.epoch.compare_trainers
python -m benchmarks.epoch.compare_trainers --set schedule.prompts_per_epoch=4 --rounds 9 --output results.json

Each contestant is a process of its own, with its own settings of the C library, of torch and of the compiler, as a user would run
it; they take turns, one phase at a time, while the others sleep, and a round's ratios are taken within the round.

    plain DDPO   `plain_ddpo.py`: the usual loop of the field, in the batches of ddpo-pytorch's full finetuning
                 (config/dgx.py): 8 are sampled, 4 trained at a time
    plain large  the same loop in the engine's own batches, the best for it here
    eager        the engine's loop with everything under `performance` off, and the process as Python starts it
    engine       the engine as a long job has it: compiled, freed memory kept, the rest measured at start; equal denoiser rows
    engine PRDP  the same with PRDP's objective, which adds the reference log-probs
    subsets      PRDP with random timesteps for update and reference; fewer denoiser rows, the same gradient in expectation

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
from typing import Any

import torch

from benchmarks.epoch.plain_ddpo import PlainDdpo
from benchmarks.epoch.workload import EAGER, TINY, Workload
from benchmarks.lib import command
from benchmarks.lib.provenance import provenance
from benchmarks.lib.timing import Timing, wall_clock
from prdp_fast.core.errors import UserError
from prdp_fast.core.files import write_json

BASELINES = ("eager", "plain DDPO", "plain large")
PHASES = ("rollout", "update", "epoch")
DDPO = "objective={name: ddpo}"


ANSWERS = "PRDP_ANSWERS"  # environment variable: the file descriptor that a contestant answers to


@dataclass(frozen=True)
class Contestant:
    """One of the trainers that are compared."""

    overrides: tuple[str, ...]
    plain: tuple[int, int] | None = None  # the plain trainer instead of the engine; rows that it samples and trains at a time
    keep_heap: bool = True  # as training does; False leaves the process as Python starts it


CONTESTANTS = {
    "plain DDPO": Contestant((EAGER, DDPO), plain=(8, 4), keep_heap=False),
    "plain large": Contestant((EAGER, DDPO), plain=(64, 64), keep_heap=False),
    "eager": Contestant((EAGER, DDPO), keep_heap=False),
    "engine": Contestant(("performance.compile=full", DDPO)),
    "engine PRDP": Contestant(("performance.compile=full",)),
    "subsets": Contestant(("performance.compile=full", "schedule.update_timesteps=2", "schedule.reference_timesteps=2")),
}


def phases_of(contestant: Contestant, overrides: list[str]) -> tuple[dict[str, Callable[[], object]], int]:
    """(a call for every phase, images an epoch) in this process."""
    workload = Workload.build(TINY, [*contestant.overrides, *overrides], keep_heap=contestant.keep_heap)
    scores = workload.made_up_scores()
    if contestant.plain is None:
        trajectories = workload.rollout()
        reference = workload.reference(trajectories) if workload.needs_reference else None
        return {
            "rollout": workload.rollout,
            "update": lambda: workload.update(trajectories, scores, reference),
            "epoch": workload.epoch,
        }, workload.images
    trainer, prompts, count = workload.trainer, workload.prompts, workload.images_per_prompt
    plain = PlainDdpo(
        copy.deepcopy(workload.bare_denoiser), trainer.pipeline, workload.policy.transitions, trainer.job.rewards,
        guidance_scale=workload.policy.guidance_scale, batch=contestant.plain[0], train_batch=contestant.plain[1],
    )  # fmt: skip
    embeds, empty = workload.embeddings.prompt_embeds.repeat_interleave(count, 0), workload.embeddings.negative_prompt_embeds

    def sample() -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [plain.sample(part, empty) for part in embeds.split(plain.batch)]

    def epoch() -> None:
        encoded = workload.encode()
        plain.epoch(prompts, count, encoded.prompt_embeds, encoded.negative_prompt_embeds)

    samples = sample()
    return {
        "rollout": sample,
        "update": lambda: plain.update(samples, scores.total.view(len(prompts), count), embeds, empty),
        "epoch": epoch,
    }, workload.images


def answer(contestant: Contestant, overrides: list[str]) -> int:
    """The process of one contestant: reads the name of a phase, runs it and writes its milliseconds, until its input ends."""
    calls, images = phases_of(contestant, overrides)
    watch = wall_clock(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    for call in calls.values():
        call()  # compiles, allocates
    answers = os.fdopen(int(os.environ[ANSWERS]), "w", buffering=1)  # not stdout: libraries print there
    answers.write(f"{images}\n")
    for line in sys.stdin:
        answers.write(f"{watch(calls[line.strip()])}\n")
    return 0


@contextmanager
def process(name: str, overrides: list[str]) -> Iterator[tuple[Callable[[str], float], int]]:
    """Start a contestant. Yields: (phase -> milliseconds, images an epoch), once it is warm."""
    read, write = os.pipe()
    child = subprocess.Popen(
        [sys.executable, "-m", command.module_name(__file__), "--worker", name, "--overrides", json.dumps(overrides)],
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, pass_fds=(write,), text=True,
        env=command.environment() | {ANSWERS: str(write)},
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


def run(args: argparse.Namespace, words: list[str]) -> int:
    if args.worker:
        return answer(CONTESTANTS[args.worker], args.worker_overrides)
    origin = provenance(__file__, words) if args.output else {}
    comparisons = compare(args.only, args.overrides, args.rounds)
    print(table(comparisons))
    if args.output:
        against = {name: comparison.as_dict() for name, comparison in comparisons.items()}
        write_json(args.output, origin | {"against": against})
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = command.parser_of(__doc__)
    command.add_overrides(parser)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS), metavar="CONTESTANT")
    command.add_output(parser)
    parser.add_argument("--worker", choices=CONTESTANTS, help=argparse.SUPPRESS)
    parser.add_argument("--overrides", dest="worker_overrides", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if not set(args.only) & set(BASELINES):
        parser.error(f"--only is {args.only}; expected one of {', '.join(BASELINES)} among them, to compare with")
    return command.run(lambda: run(args, command.words(arguments)))


if __name__ == "__main__":
    sys.exit(main())
