"""What `count_traffic` sees of collectives whose bytes are known, and of ZeRO's; run by test_scaling.py in one process per rank.

deepspeed --num_gpus 2 tests/benchmarks/drive_traffic.py RESULT.json
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

LAYERS, WIDTH = 3, 96  # that are trained: LAYERS * WIDTH ** 2 float32 gradients
BACKWARDS = 3  # an update
CASES = {  # what is changed of the shipped configuration, and performance.coalesce_gradients
    "zero0": ({}, "auto"),
    "zero1": ({}, "auto"),
    "zero2": ({}, "auto"),
    "zero2 uncoalesced": ({}, "off"),
    # Small parameters are kept whole at stage 3, and up to a thousand million of any size from a forward to its backward.
    "zero3": ({"stage3_param_persistence_threshold": 0}, "auto"),
    "zero3 released": (
        {"stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0},
        "auto",
    ),
}


def known(device) -> dict[str, dict]:
    """A collective of each kind that DeepSpeed uses, on 1000 float32 numbers in all."""
    import torch
    import torch.distributed as dist

    from benchmarks.lib.traffic import count_traffic

    ranks, whole = dist.get_world_size(), torch.ones(1000)
    part = torch.ones(1000 // ranks)
    alone = [dist.new_group([rank]) for rank in range(ranks)][dist.get_rank()]
    calls = {
        "all_reduce": lambda: dist.all_reduce(whole),
        "broadcast": lambda: dist.broadcast(whole, 0),
        "reduce": lambda: dist.reduce(whole, 0),
        "all_gather": lambda: dist.all_gather(list(whole.chunk(ranks)), part),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(part, whole),
        "barrier": dist.barrier,
        "alone": lambda: dist.all_reduce(whole, group=alone),  # of a group of one: nothing leaves
    }
    found = {}
    for name, call in calls.items():
        with count_traffic() as traffic:
            call()
        found[name] = asdict(traffic)
    return found


def update_of(case: str, device) -> dict:
    """What the second of two updates sends."""
    import torch

    from benchmarks.lib.traffic import count_traffic
    from prdp_fast.config.deepspeed import resolve_config
    from prdp_fast.config.load import load_recipe
    from prdp_fast.config.recipe import OptimizerSettings
    from prdp_fast.core import distributed
    from prdp_fast.training.engine import ZeroEngine

    changes, coalesce = CASES[case]
    values = json.loads((ROOT / "configs" / f"{case.split()[0]}.json").read_text())
    values["zero_optimization"] |= changes
    path = Path(sys.argv[-1]).with_name(f"{case}-{distributed.rank()}.json")
    path.write_text(json.dumps(values))
    settings = load_recipe("smoke", ["schedule.prompts_per_epoch=2"])
    config = resolve_config(str(path), settings, world_size=distributed.world_size(), stochastic_steps=4, cuda=False)
    torch.manual_seed(0)
    layers = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
    engine = ZeroEngine(layers, OptimizerSettings(learning_rate=1e-2), config, device, coalesce)
    for _ in range(2):
        with count_traffic() as traffic:
            engine.set_scale(1.0)
            with engine.accumulating():
                for number in range(BACKWARDS):
                    engine.backward(engine.denoiser(torch.ones(2, WIDTH)).sum(), last=number == BACKWARDS - 1)
            engine.step()
    return asdict(traffic)


def main() -> None:
    from prdp_fast.core import distributed

    device = distributed.init()
    results = known(device) | {case: update_of(case, device) for case in CASES}
    if distributed.rank() == 0:
        Path(sys.argv[-1]).write_text(json.dumps(results))
    distributed.shutdown()


if __name__ == "__main__":
    main()
