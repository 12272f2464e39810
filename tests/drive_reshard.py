"""Trained state from the shards of some ranks and a ZeRO stage into those of others; run by test_reshard.py on 1, 2 and 3 ranks.

    deepspeed --num_gpus N tests/drive_reshard.py FOLDER write|read

`write` trains a model of every case for some updates and saves it, and tells what DeepSpeed says its state is. `read` takes up
every source of PAIRS that is for so many ranks, and tells the same of what it has then.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")]

RATE, DECAY, BEFORE, AFTER, ROWS = 1e-2, 0.5, 3, 2, 6
CPU = {"device": "cpu"}
ZERO: dict[str, dict[str, Any]] = {
    "0": {"stage": 0},
    "1": {"stage": 1},
    "2": {"stage": 2},
    "3": {"stage": 3},
    "2-offload": {"stage": 2, "offload_optimizer": CPU},
    "3-offload": {"stage": 3, "offload_optimizer": CPU, "offload_param": CPU},
    "2-aligned": {"stage": 2, "parameter_alignment": True},
    "3-groups": {"stage": 3, "sub_group_size": 20},
}
# Source, its ranks, target, its ranks. In bf16 and with an adapter the stage is the first figure.
PAIRS = [
    ("0", 1, "3", 2), ("0", 2, "1", 1), ("0", 1, "0", 2), ("0", 2, "2", 3),
    ("1", 2, "0", 1), ("1", 1, "2", 2), ("1", 2, "3", 3), ("1", 2, "2-aligned", 3),
    ("2", 2, "3", 1), ("2", 1, "1", 2), ("2", 2, "2", 1), ("2", 2, "2", 3), ("2", 2, "0", 2), ("2-aligned", 2, "2", 2),
    ("3", 2, "2", 1), ("3", 1, "0", 2), ("3", 2, "3", 3), ("3", 2, "3", 1), ("3", 2, "3-groups", 2), ("3-groups", 2, "1", 2),
    ("3-offload", 2, "2-offload", 1), ("2-offload", 1, "3-offload", 2), ("2", 1, "3-offload", 2), ("2-offload", 2, "3", 1),
    ("1-bf16", 2, "2-bf16", 1), ("2-bf16", 1, "3-bf16", 2), ("3-bf16", 2, "1-bf16", 1), ("2-bf16", 2, "1-bf16", 2),
    ("2-lora", 2, "0-lora", 1), ("0-lora", 1, "3-lora", 2), ("3-lora", 2, "1-lora", 1),
    ("2-fresh", 2, "3", 1), ("0-fresh", 1, "2", 2), ("3-fresh", 2, "0", 1),
]  # fmt: skip
# As they were written: by DeepSpeed, to the bit.
SAME = [
    ("0", 2, "0", 2), ("1", 2, "1", 2), ("2", 2, "2", 2), ("3", 2, "3", 2), ("1-bf16", 2, "1-bf16", 2),
    ("2-lora", 2, "2-lora", 2), ("2", 2, "2-offload", 2), ("3", 2, "3-offload", 2), ("2", 1, "2", 1),
]  # fmt: skip


def stage_of(case: str) -> int:
    return int(case[0])


def kind_of(case: str) -> str:
    return case[2:]


def make_engine(case: str, folder: Path, device, *, average: bool):
    import torch
    from small_model import small_unet

    from prdp_fast.config.deepspeed import resolve_config
    from prdp_fast.config.load import load_recipe
    from prdp_fast.config.recipe import LoraSettings, OptimizerSettings
    from prdp_fast.core import distributed
    from prdp_fast.models import lora
    from prdp_fast.training.engine import ZeroEngine

    config = {"zero_optimization": ZERO.get(case, ZERO[case[0]]), "bf16": {"enabled": kind_of(case) == "bf16"}}
    path = folder / f"config-{distributed.rank()}.json"
    path.write_text(json.dumps(config))
    settings = load_recipe("smoke", [f"schedule.prompts_per_epoch={ROWS}"])
    resolved = resolve_config(str(path), settings, world_size=distributed.world_size(), stochastic_steps=4, cuda=False)
    if kind_of(case) == "lora":
        model: torch.nn.Module = small_unet()
        lora.add_adapter(model, LoraSettings(rank=2), 0)
    else:
        torch.manual_seed(0)
        # 35 + 7 + 21 + 3 + 3 + 3 = 72 numbers: neither all of them nor any one parameter can be shared evenly.
        model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3), torch.nn.LayerNorm(3))
        model.register_buffer("kept", torch.randn(4))
    options = OptimizerSettings(learning_rate=RATE, weight_decay=0.01, eps=1e-4)
    return ZeroEngine(model, options, resolved, device, ema_decay=DECAY if average else None)


def update(engine, number: int) -> None:
    """The same on any number of ranks but for rounding."""
    import torch

    from prdp_fast.core import distributed

    generator = torch.Generator().manual_seed(100 + number)
    own = slice(distributed.rank(), None, distributed.world_size())
    engine.set_scale(1.0)
    with engine.accumulating():
        if engine.has_adapter:
            x, context = torch.randn(ROWS, 4, 4, 4, generator=generator), torch.randn(ROWS, 6, 16, generator=generator)
            output = engine.denoiser(
                x[own], torch.arange(ROWS)[own] * 100, encoder_hidden_states=context[own], return_dict=False
            )[0]  # fmt: skip
            wanted = torch.randn(ROWS, 4, 4, 4, generator=generator)
        else:
            x, wanted = torch.randn(ROWS, 5, generator=generator), torch.randn(ROWS, 3, generator=generator)
            output = engine.denoiser(x[own].to(engine.dtype))
        engine.backward((output.float() - wanted[own]).square().mean(), last=True)
    assert engine.step().applied


def state_of(engine) -> dict[str, Any]:
    """What DeepSpeed says that it is: {what: {parameter: tensor}}, and the step. Every rank calls this."""
    from deepspeed.utils import safe_get_full_optimizer_state

    stage, optimizer = engine.config.stage, engine.engine.optimizer
    adamw = optimizer if stage == 0 else optimizer.optimizer
    steps = {float(state["step"]) for state in adamw.state.values()}
    assert len(steps) <= 1, steps
    trained = {name: value for name, value in engine.engine.module.named_parameters() if value.requires_grad}
    state: dict[str, Any] = {"weight": engine.full_state_dict(), "step": steps.pop() if steps else None}
    if state["step"] is not None:
        if stage in (1, 2):
            optimizer._lazy_init_hp_params_optimizer_state()
        for kind in ("exp_avg", "exp_avg_sq"):
            state[kind] = {
                name: (adamw.state[value][kind] if stage == 0 else safe_get_full_optimizer_state(value, kind)).clone()
                for name, value in trained.items()
            }
    if engine.average is not None:
        with engine.averaged():
            state["average"] = engine.full_state_dict()
    with engine.whole_denoiser() as denoiser:
        used = {name: value.detach() for name, value in denoiser.named_parameters()}
        own = state["weight"]
        state["computes with its masters"] = all(used[name].equal(own[name].to(engine.dtype)) for name in trained)
    return state | {"own": (engine.updates, engine.fp16_headroom, engine.fp16_clean, engine.engine.global_steps)}


def write(folder: Path, device) -> None:
    import torch

    from prdp_fast.core import distributed

    ranks, sources = distributed.world_size(), sorted({(source, ranks) for source, ranks, *_ in [*PAIRS, *SAME]})
    for case in [case for case, count in sources if count == ranks]:
        name = f"{case}-by-{ranks}"
        engine = make_engine(case, folder, device, average=stage_of(case) < 3)
        fresh = kind_of(case) == "fresh"
        for number in range(0 if fresh else BEFORE):
            update(engine, number)
        engine.fp16_headroom, engine.fp16_clean = 128.0, 3
        engine.save(folder / name)
        told = {"saved": state_of(engine)}
        for number in range(AFTER):
            update(engine, BEFORE + number)
        told["later"] = state_of(engine)
        if distributed.is_main():
            torch.save(told, folder / f"{name}.pt")


def read(folder: Path, device) -> None:
    import torch

    from prdp_fast.core import distributed

    for source, written_by, target, ranks in [*PAIRS, *SAME]:
        if ranks != distributed.world_size():
            continue
        both = stage_of(source) < 3 and stage_of(target) < 3
        engine = make_engine(target, folder, device, average=both)
        if not engine.has_adapter:
            engine.engine.module.kept.zero_()
        engine.load(folder / f"{source}-by-{written_by}")
        told: dict[str, Any] = {"resharded": engine.resharded, "loaded": state_of(engine)}
        for number in range(AFTER):
            update(engine, BEFORE + number)
        told["later"] = state_of(engine)
        if distributed.is_main():
            torch.save(told, folder / f"{source}-by-{written_by}-to-{target}-by-{ranks}.pt")


def main() -> None:
    import torch

    from prdp_fast.core import distributed

    torch.set_num_threads(1)
    gc.freeze()  # DeepSpeed collects garbage time and again, which takes long where so much is imported
    device = distributed.init()
    folder, action = Path(sys.argv[-2]), sys.argv[-1]
    {"write": write, "read": read}[action](folder, device)
    distributed.shutdown()


if __name__ == "__main__":
    main()
