"""Where an epoch goes, phase by phase: seconds, U-Net work and its share of the machine's peak, memory, bytes to other ranks.

python benchmarks/profile_step.py                                   # the embedded model, here
python benchmarks/profile_step.py --preset sd14 --set schedule.prompts_per_epoch=4 --output profile.json --chart profile.png
python benchmarks/profile_step.py --trace trace.json                # one epoch for chrome://tracing or Perfetto
deepspeed --num_gpus 2 benchmarks/profile_step.py                   # a rank's share of the prompts, and what it sends
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

if __package__ in (None, ""):  # run by path
    _root = Path(__file__).resolve().parent.parent
    sys.path[0] = str(_root)
    sys.path.insert(1, str(_root / "kernels"))

# One thread, as each rank of `make train` has: the ratios do not depend on it, and neighbours disturb it less.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

import torch

from benchmarks.phases import Phase, Profile, profile, table
from benchmarks.provenance import arguments_of, provenance, result_file
from benchmarks.resident import MIB
from benchmarks.sizes import share_of_rank
from benchmarks.workload import UNETS, Workload
from prdp_fast.core import distributed
from prdp_fast.core.errors import UserError
from prdp_fast.core.files import write_json


def annotation(phase: Phase) -> str:
    """What a phase's bar has beside it."""
    peak = [] if phase.peak_memory_mib is None else [f"peak {phase.peak_memory_mib:.0f} MiB"]
    return ", ".join(peak + [f"{phase.sent_bytes / MIB:.1f} MiB sent"] * bool(phase.sent_bytes))


def chart(result: Profile, path: Path) -> None:
    """Bars of the phases, the bare U-Net calls inside each darker."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3), layout="constrained")
    names = [phase.name for phase in result.phases]
    bars = axes.barh(names, [phase.timing.median_ms / 1e3 for phase in result.phases], color="#c9d7e8", label="phase")
    axes.barh(
        names, [phase.bare.median_ms / 1e3 if phase.bare else 0 for phase in result.phases], color="#2f6299", height=0.4,
        label="its U-Net calls alone",
    )  # fmt: skip
    axes.bar_label(bars, labels=[annotation(phase) for phase in result.phases], padding=4, fontsize=8, color="#555555")
    axes.margins(x=0.4)  # room for those
    axes.invert_yaxis()
    axes.set_xlabel(f"seconds an epoch of {result.images} images ({result.preset}, {result.device})")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny", choices=["tiny", *UNETS])
    parser.add_argument("--config", default="zero2.json", help="DeepSpeed JSON, as for training")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--rounds", type=int, default=5)
    result_file(parser)
    parser.add_argument("--chart", type=Path, help="PNG")
    parser.add_argument("--trace", type=Path, help="torch.profiler trace of one epoch")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the launcher's own
    args = parser.parse_args(arguments)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    given = [word for word in arguments_of(arguments) if not word.startswith("--local_rank")]
    origin = provenance(__file__, given) if args.output else {}  # of what runs, so at the start
    try:
        workload = Workload.build(args.preset, args.overrides, config=args.config)
        rank, ranks = distributed.rank(), distributed.world_size()
        if ranks > 1:
            workload = share_of_rank(workload, rank, ranks)
        if args.trace:
            with torch.profiler.profile() as trace:
                workload.epoch()
            if rank == 0:
                trace.export_chrome_trace(str(args.trace))
        result = profile(workload, args.rounds)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        distributed.shutdown()
    if rank > 0:
        return 0
    if args.output:
        write_json(args.output, origin | result.as_dict())
    if args.chart:
        chart(result, args.chart)
    print(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
