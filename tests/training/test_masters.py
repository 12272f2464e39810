"""The float32 master weights begin as what was loaded, and not as what is left of it in 16 bits."""

from __future__ import annotations

import json
from pathlib import Path

import deepspeed
import pytest
import torch
from small_model import SHAPE, WIDTH, small_unet

from prdp_fast.config.deepspeed import resolve_config
from prdp_fast.config.load import CONFIGS, load_recipe
from prdp_fast.config.recipe import LoraSettings, OptimizerSettings
from prdp_fast.core import distributed
from prdp_fast.models import lora
from prdp_fast.training.engine import ZeroEngine

RATE = 1e-12
PRECISIONS = ["float32", "bf16", "fp16"]


@pytest.fixture(scope="module")
def alone():
    """A job of one rank, in this process."""
    device = distributed.init()
    yield device
    distributed.shutdown()


def engine_of(
    name: str, precision: str, denoiser: torch.nn.Module, device: torch.device, directory: Path, decay: float | None
) -> ZeroEngine:
    config = json.loads((CONFIGS / f"{name}.json").read_text())
    config |= {"bf16": {"enabled": precision == "bf16"}, "fp16": {"enabled": precision == "fp16"}}
    path = directory / "config.json"
    path.write_text(json.dumps(config))
    resolved = resolve_config(str(path), load_recipe("smoke"), world_size=1, stochastic_steps=2, cuda=False)
    return ZeroEngine(denoiser, OptimizerSettings(learning_rate=RATE), resolved, device, ema_decay=decay)


def update(engine: ZeroEngine) -> bool:
    generator = torch.Generator().manual_seed(5)
    sample = torch.randn(2, *SHAPE, generator=generator).to(engine.dtype)
    context = torch.randn(2, 6, WIDTH, generator=generator).to(engine.dtype)
    engine.set_scale(1e-3)
    with engine.accumulating():
        output = engine.denoiser(sample, torch.arange(2) * 100, encoder_hidden_states=context, return_dict=False)[0]
        engine.backward(output.float().square().mean() * 1e-3, last=True)
    return engine.step().applied


@pytest.mark.parametrize("adapter", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["zero0", "zero1", "zero2", "zero3", "zero3_offload"])
def test_a_run_that_learns_nothing_exports_its_base(
    name: str, precision: str, adapter: bool, alone: torch.device, tmp_path: Path
) -> None:
    if name == "zero0" and precision != "float32":
        pytest.skip("refused: it would add gradients up in 16 bits")
    if precision == "fp16" and not deepspeed.accelerator.get_accelerator().is_fp16_supported():
        pytest.skip("DeepSpeed has no fp16 on this CPU")
    denoiser = small_unet()
    if adapter:
        lora.add_adapter(denoiser, LoraSettings(rank=2), 0)
    trained = [key for key, value in denoiser.named_parameters() if value.requires_grad]
    base = {key: value.detach().clone() for key, value in denoiser.named_parameters() if key in trained}
    engine = engine_of(name, precision, denoiser, alone, tmp_path, None if "zero3" in name else 0.5)

    state = engine.full_state_dict()
    assert state.keys() == base.keys() and all(torch.equal(value, base[key]) for key, value in state.items())
    with engine.whole_denoiser() as whole:
        used = dict(whole.named_parameters())
        assert all(torch.equal(used[key], value.to(engine.dtype)) for key, value in base.items()), "computes with the rounded"
    assert update(engine)
    with engine.averaged():
        averaged = engine.full_state_dict()
    for state in (engine.full_state_dict(), averaged):
        moved = max(float((value - base[key]).abs().max()) for key, value in state.items())
        assert moved <= 2 * RATE, "AdamW moves a weight by the learning rate"
    if precision != "float32":
        rounding = max(float((value - value.to(engine.dtype).float()).abs().max()) for value in base.values())
        assert rounding > 1e3 * RATE
