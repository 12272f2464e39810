"""Three updates of a small U-Net at every ZeRO stage, with what makes it cheaper and without; run by test_acceleration.py.

    deepspeed --num_gpus 1 tests/drive_acceleration.py RESULT.json

The rows are two halves of the same latents, as of a guided job.

torch's aot_eager stands in for the compiler: the same capture and the same partition of forward and backward, without C++.
"""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")]

# Stage 3 cannot compile what is trained: its rollout copy and the reference are.
CASES = {"zero0": "off", "zero1": "blocks", "zero2": "full", "zero3": "full"}
ROWS, EPS = 4, 1e-4


def run_case(name: str, mode: str, device, fast: bool) -> dict:
    import torch
    from small_model import SHAPE, small_family, small_unet

    from prdp_fast.acceleration.choose import Denoisers, accelerate
    from prdp_fast.acceleration.shared_halves import doubling
    from prdp_fast.config.deepspeed import resolve_config
    from prdp_fast.config.load import load_recipe
    from prdp_fast.config.recipe import OptimizerSettings, PerformanceSettings
    from prdp_fast.training.engine import ZeroEngine

    settings = load_recipe("smoke", ["schedule.prompts_per_epoch=2", "optimizer.learning_rate=1e-3", f"optimizer.eps={EPS}"])
    config = resolve_config(name, settings, world_size=1, stochastic_steps=2, cuda=False)
    denoiser, reference = small_unet(), small_unet().requires_grad_(False)
    names = [name for name, _ in denoiser.named_parameters()]
    optimizer = OptimizerSettings(learning_rate=1e-3, eps=EPS)
    engine = ZeroEngine(denoiser, optimizer, config, device, fused_optimizer=fast)
    if fast:
        speed = accelerate(
            Denoisers(denoiser, engine.gathered, reference if config.stage < 2 else None),
            PerformanceSettings(compile=mode, attention="auto", fuse_qkv="on", shared_halves="on"),
            small_family(), train_rows=ROWS, sample_rows=ROWS, stage=config.stage, device=device, dtype=config.dtype,
            guided=True,
        )  # fmt: skip
        engine.sampling_view = speed.sampling_view
    generator = torch.Generator().manual_seed(5)
    sample = torch.randn(ROWS // 2, *SHAPE, generator=generator)
    inputs = {"encoder_hidden_states": torch.randn(ROWS, 6, 16, generator=generator), "return_dict": False}
    time = torch.arange(ROWS // 2) * 100

    def call(denoiser, shared: bool = fast):
        return (denoiser if shared else doubling(denoiser))(sample, timestep=time, **inputs)[0]

    def update() -> float:
        engine.set_scale(1.0)
        with engine.accumulating():
            for last in (False, True):
                engine.backward(call(engine.denoiser).square().mean(), last=last)
        return engine.step().grad_norm

    norms = [update()]
    with tempfile.TemporaryDirectory() as folder:  # the optimizer's state survives a checkpoint, fused or not
        engine.save(Path(folder))
        norms.append(update())
        engine.load(Path(folder))
    norms.append(update())
    with torch.no_grad(), engine.sampling_denoiser() as sampled:
        rollout = call(sampled)
        trained = call(engine.denoiser)
        frozen = call(reference, shared=fast and config.stage < 2)
    state = engine.full_state_dict()
    return {
        "norms": norms, "rollout": rollout, "trained": trained, "reference": frozen, "state": state,
        "names_kept": names == list(state),
        "decisions": {key: decision.value for key, decision in speed.decisions.items()} if fast else {},
    }  # fmt: skip


def main() -> None:
    import torch

    from prdp_fast.acceleration.probe import distance
    from prdp_fast.core import distributed

    torch.set_num_threads(1)
    importlib.import_module("prdp_fast.acceleration.compile").BACKEND = "aot_eager"
    device = distributed.init()
    from small_model import small_unet

    start = small_unet().state_dict()
    plain = run_case("zero2", "off", device, fast=False)

    def moved(result: dict) -> list:
        return [value - start[name] for name, value in result["state"].items()]

    results = {}
    for name, mode in CASES.items():
        fast = run_case(name, mode, device, fast=True)
        results[name] = {
            "norms": [plain["norms"], fast["norms"]],
            "outputs": {key: distance([fast[key]], [plain[key]]) for key in ("rollout", "trained", "reference")},
            "moved": distance(moved(fast), moved(plain)),
            "names_kept": fast["names_kept"],
            "decisions": fast["decisions"],
        }
    Path(sys.argv[-1]).write_text(json.dumps(results))
    distributed.shutdown()


if __name__ == "__main__":
    main()
