"""Images per second of the engine's epoch over a plain DDPO trainer's, at equal U-Net rows, in one interleaved run.

    python benchmarks/compare_trainers.py [--rounds 7] [--set performance.compile=full ...]

Both train the embedded model with DDPO, which needs no reference pass, from prompts to optimizer step: text, rollout, decoding,
reward, gradient pass.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
from pathlib import Path

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
from benchmarks.timing import Timing
from benchmarks.workload import Workload
from prdp_fast import zero
from prdp_fast.errors import UserError


def compare(workload: Workload, rounds: int) -> tuple[Timing, Timing, Timing]:
    """(engine ms, plain ms, plain / engine), epochs in turn."""
    assert workload.pipeline is not None and workload.text is not None
    embeds, text = workload.embeddings, workload.text
    plain = PlainDdpo(
        copy.deepcopy(workload.reference_unet), workload.pipeline, workload.policy.transitions, workload.rewards,
        guidance_scale=workload.policy.guidance_scale, batch=workload.micro_batch,
    )  # fmt: skip

    def plain_epoch() -> None:
        encoded = text.encode(workload.prompts)
        plain.epoch(workload.prompts, workload.images_per_prompt, encoded.prompt_embeds, encoded.negative_prompt_embeds)

    watch = stopwatch(embeds.prompt_embeds.device)
    pairs = [(watch(workload.epoch), watch(plain_epoch)) for _ in range(rounds + 1)][1:]
    ours, theirs = zip(*pairs, strict=True)
    return Timing.of(list(ours)), Timing.of(list(theirs)), Timing.of([b / a for a, b in pairs])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="zero2.json")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args(arguments)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    try:
        workload = Workload.build("tiny", ["objective={name: ddpo}", *args.overrides], config=args.config)
        ours, theirs, ratio = compare(workload, args.rounds)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        zero.shutdown_distributed()
    for name, timing in (("engine", ours), ("plain DDPO", theirs)):
        rate = 1e3 * workload.images / timing.median_ms
        epoch = f"{timing.median_ms:9.0f} ms an epoch of {workload.images} images (IQR {timing.iqr_ms:.0f})"
        print(f"{name:<11} {epoch}, {rate:.1f} images/s")
    print(
        f"engine / plain DDPO: {ratio.median_ms:.3f} times the images per second (IQR {ratio.iqr_ms:.3f}, {ratio.samples} rounds)"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
