"""The moving average: its arithmetic, what is sampled and exported with it, and that a resumed run has it to the bit."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from small_model import SHAPE, WIDTH, small_family, small_unet

from prdp_fast.config.deepspeed import resolve_config
from prdp_fast.config.load import load_recipe
from prdp_fast.config.recipe import LoraSettings, OptimizerSettings
from prdp_fast.core import distributed
from prdp_fast.core.errors import UserError
from prdp_fast.models import lora
from prdp_fast.models.ema import Average, rate
from prdp_fast.planning.job import Job
from prdp_fast.planning.memory import Activations, Footprint, plan_memory
from prdp_fast.training.engine import StepResult, ZeroEngine

pytestmark = pytest.mark.slow

DECAY = 0.7
OPTIMIZER = OptimizerSettings(learning_rate=1e-2, weight_decay=0.0, eps=1e-4)


def test_the_average_in_closed_form() -> None:
    weight = torch.tensor([1.0, -2.0])
    average = Average([weight], 0.5)
    expected, values = weight.double(), []
    for n in range(1, 30):
        weight.copy_(torch.tensor([math.sin(n), math.cos(n)]))
        average.update(n)
        kept = min(0.5, (1 + n) / (10 + n))
        expected = kept * expected + (1 - kept) * weight.double()
        values.append(kept)
    torch.testing.assert_close(average.averages[0].double(), expected, rtol=1e-5, atol=1e-6)
    assert values[0] == rate(1, 0.5) == 2 / 11 and values[-1] == 0.5  # quick at first


def test_swapping_twice_is_nothing() -> None:
    weights = [torch.randn(3), torch.randn(2, 2)]
    before = [weight.clone() for weight in weights]
    average = Average(weights, 0.9)
    for weight in weights:
        weight.add_(1)
    average.swap()
    assert all(torch.equal(weight, old) for weight, old in zip(weights, before, strict=True))
    average.swap()
    assert all(torch.equal(weight, old + 1) for weight, old in zip(weights, before, strict=True))


@pytest.fixture(scope="module")
def alone():
    """A job of one rank, in this process."""
    device = distributed.init()
    yield device
    distributed.shutdown()


def engine_of(path: str | Path, device: torch.device, adapter: bool, decay: float | None = DECAY) -> ZeroEngine:
    config = resolve_config(str(path), load_recipe("smoke"), world_size=1, stochastic_steps=2, cuda=False)
    denoiser = small_unet()
    if adapter:
        lora.add_adapter(denoiser, LoraSettings(rank=2), 0)
    return ZeroEngine(denoiser, OPTIMIZER, config, device, ema_decay=decay)


def call(denoiser, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    sample = torch.randn(3, *SHAPE, generator=generator).to(dtype)
    context = torch.randn(3, 6, WIDTH, generator=generator).to(dtype)
    return denoiser(sample, torch.arange(3) * 100, encoder_hidden_states=context, return_dict=False)[0].float()


def update(engine: ZeroEngine, poison: bool = False) -> StepResult:
    engine.set_scale(1.0)
    with engine.accumulating():
        engine.backward(call(engine.denoiser, engine.dtype).square().mean() * (math.inf if poison else 1.0), last=True)
    return engine.step()


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())


def config_file(name: str, directory: Path) -> Path | str:
    if not name.startswith("bf16"):
        return name
    path = directory / f"{name}.json"
    path.write_text(json.dumps({"bf16": {"enabled": True}, "zero_optimization": {"stage": int(name[-1])}}))
    return path


@pytest.mark.parametrize("adapter", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("name", ["zero0.json", "zero1.json", "zero2.json", "bf16-1", "bf16-2"])
def test_the_engine_averages_samples_with_it_and_resumes_it(name: str, adapter: bool, alone, tmp_path: Path) -> None:
    config = config_file(name, tmp_path)
    engine, plain = engine_of(config, alone, adapter), engine_of(config, alone, adapter, decay=None)
    with engine.averaged():
        assert same(engine.full_state_dict(), plain.full_state_dict())  # before training they are the weights
    average = {key: value.double() for key, value in engine.full_state_dict().items()}

    def step(poison: bool = False) -> dict[str, torch.Tensor]:
        assert update(engine, poison).applied is not poison
        update(plain, poison)
        with plain.averaged():
            state = engine.full_state_dict()
        assert same(state, plain.full_state_dict()), "training takes another course for being averaged"
        return state

    for n in (1, 2):
        kept = min(DECAY, (1 + n) / (10 + n))
        state = step()
        average = {key: kept * average[key] + (1 - kept) * value.double() for key, value in state.items()}
    step(poison=True)  # which moves nothing

    with torch.no_grad():
        with engine.sampling_denoiser() as denoiser:
            own = call(denoiser, engine.dtype)
        with engine.averaged(), engine.sampling_denoiser() as denoiser:
            sampled, exported = call(denoiser, engine.dtype), engine.full_state_dict()
            lives = {key: value.clone() for key, value in denoiser.named_parameters() if value.requires_grad}
        with engine.sampling_denoiser() as denoiser:
            assert torch.equal(call(denoiser, engine.dtype), own), "left as it was entered"
    assert not torch.equal(sampled, own)
    for key, value in exported.items():
        torch.testing.assert_close(value.double(), average[key], rtol=1e-5, atol=1e-6)
        assert value.dtype == torch.float32 and torch.equal(lives[key], value.to(engine.dtype))
    assert same(engine.full_state_dict(), state)

    with pytest.raises(KeyError), engine.averaged():
        raise KeyError
    assert same(engine.full_state_dict(), state), "left as it was entered, after an error too"

    folder = tmp_path / "checkpoint"
    engine.save(folder)
    again = engine_of(config, alone, adapter)
    again.load(folder)
    for one in (engine, again):
        update(one)
    assert same(again.full_state_dict(), engine.full_state_dict())
    with engine.averaged(), again.averaged():
        assert same(again.full_state_dict(), engine.full_state_dict())
    (file,) = folder.glob("average-*")
    file.unlink()
    with pytest.raises(UserError, match="no readable average"):
        engine_of(config, alone, adapter).load(folder)


def test_the_memory_plan_has_it() -> None:
    settings = load_recipe("smoke", ["model.ema_decay=0.9"])
    shapes, sizes = small_family(), {}
    for stage in (0, 2):
        config = resolve_config(f"zero{stage}.json", settings, world_size=2, stochastic_steps=4, cuda=False)
        job = Footprint.of(
            settings, config, shapes, Activations(0), 1, world_size=2, needs_reference=True, cuda=False
        )  # fmt: skip
        sizes[stage] = {item.name: item.size for item in plan_memory(job).items}["average of the weights"]
    assert sizes == {0: 4 * shapes.denoiser_parameters, 2: 2 * shapes.denoiser_parameters}


@pytest.mark.parametrize(("decay", "expected"), [("1", "less than 1"), ("0", "greater than 0"), ("often", "a valid number")])
def test_a_decay_is_between_0_and_1(decay: str, expected: str) -> None:
    with pytest.raises(UserError, match=rf"model\.ema_decay is .*{expected}"):
        load_recipe("smoke", [f"model.ema_decay={decay}"])


def test_stage_3_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(UserError, match=r"model\.ema_decay with config zero3\.json.*use stage 0, 1 or 2"):
        Job.prepare(load_recipe("smoke", ["model.ema_decay=0.9"]), "zero3.json", world_size=1, cuda=False)
