"""LoRA: a fresh adapter changes nothing, one that is off changes nothing, and nothing but the adapter is ever trained."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from small_model import SHAPE, WIDTH, small_family, small_policy, small_trajectories, small_unet

from prdp_fast.acceleration import attention
from prdp_fast.acceleration.choose import Denoisers, accelerate
from prdp_fast.acceleration.probe import distance
from prdp_fast.config.deepspeed import resolve_config
from prdp_fast.config.load import load_recipe
from prdp_fast.config.recipe import LoraSettings, OptimizerSettings, PerformanceSettings
from prdp_fast.core import distributed
from prdp_fast.core.errors import UserError
from prdp_fast.models import lora
from prdp_fast.models.families import StableDiffusion, read_family
from prdp_fast.planning import cost
from prdp_fast.planning.dry_run import dry_run
from prdp_fast.planning.job import Job
from prdp_fast.planning.memory import Activations, Footprint, fake_activations, measure_activations, plan_memory
from prdp_fast.training.engine import StepResult, ZeroEngine
from prdp_fast.training.passes import log_prob_pass, reference_pass

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
LORA = LoraSettings(rank=3, alpha=5.0)
SHAPES = StableDiffusion(dict(small_unet().config), text_length=6, lora=LORA)
ROWS = 4
OPTIMIZER = OptimizerSettings(learning_rate=1e-2, weight_decay=1e-2, eps=1e-4, max_grad_norm=0.5)


def adapted(settings: LoraSettings = LORA, seed: int = 0) -> torch.nn.Module:
    denoiser = small_unet()
    lora.add_adapter(denoiser, settings, seed)
    return denoiser


def disturb(denoiser: torch.nn.Module, seed: int = 1) -> torch.nn.Module:
    """Give B, which is zero at first, values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in denoiser.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return denoiser


def base_weights(denoiser: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Under their names without an adapter."""
    return {name.replace(".base_layer", ""): value for name, value in denoiser.state_dict().items() if "lora_" not in name}


def inputs(rows: int = ROWS, dtype: torch.dtype = torch.float32) -> tuple[tuple, dict]:
    generator = torch.Generator().manual_seed(5)
    sample = torch.randn(rows, *SHAPE, generator=generator).to(dtype)
    context = torch.randn(rows, 6, WIDTH, generator=generator).to(dtype)
    return (sample, torch.arange(rows) * 100), {"encoder_hidden_states": context, "return_dict": False}


def call(denoiser, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    args, kwargs = inputs(dtype=dtype)
    with torch.no_grad():
        return denoiser(*args, **kwargs)[0]


# The adapter itself


def test_it_adds_what_the_paper_says() -> None:
    """W x + (alpha / rank) B A x, in every target and nowhere else."""
    denoiser = disturb(adapted())
    plain = small_unet()
    layers = {name: module for name, module in denoiser.named_modules() if hasattr(module, "lora_A")}
    own = {name for name, module in plain.named_modules() if name.endswith((".to_q", ".to_k", ".to_v", ".to_out.0"))}
    assert layers.keys() == own and len(own) == 32
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"
    layer, base = layers[name], plain.get_submodule(name)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert (a.shape, b.shape) == ((3, 8), (8, 3))
    expected = x @ base.weight.T + base.bias + 5 / 3 * x @ a.T @ b.T
    torch.testing.assert_close(layer(x), expected)


def test_alpha_is_the_rank_by_default() -> None:
    denoiser = adapted(LoraSettings(rank=4))
    assert {module.scaling["default"] for module in denoiser.modules() if hasattr(module, "lora_A")} == {1.0}


def test_the_seed_alone_decides_what_it_starts_from() -> None:
    torch.manual_seed(1)
    one = adapted(seed=7).state_dict()
    torch.manual_seed(2)
    before = torch.get_rng_state()
    denoiser = small_unet()
    torch.set_rng_state(before)
    lora.add_adapter(denoiser, LORA, 7)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, one[name]) for name, value in denoiser.state_dict().items())
    other = adapted(seed=8).state_dict()
    assert any(not torch.equal(value, other[name]) for name, value in one.items() if "lora_A" in name)


def test_off_gives_the_log_probs_of_the_base_and_fresh_too() -> None:
    policy = small_policy()
    plain = small_unet()
    trajectories = small_trajectories(policy, plain)
    expected = log_prob_pass(policy, plain, trajectories, 4)
    denoiser = adapted().train()
    assert torch.equal(log_prob_pass(policy, denoiser, trajectories, 4), expected)
    disturb(denoiser)
    changed = log_prob_pass(policy, denoiser, trajectories, 4)
    assert (changed - expected).abs().min() > 1e-6
    with lora.adapter_off(denoiser):
        assert torch.equal(reference_pass(policy, denoiser, trajectories, 4).log_probs, expected)
    assert torch.equal(log_prob_pass(policy, denoiser, trajectories, 4), changed), "on again outside the block"
    with pytest.raises(KeyError), lora.adapter_off(denoiser):
        raise KeyError
    assert torch.equal(log_prob_pass(policy, denoiser, trajectories, 4), changed), "on again after an error"


# Training, through DeepSpeed


@pytest.fixture(scope="module")
def alone():
    """A job of one rank, in this process."""
    device = distributed.init()
    yield device
    distributed.shutdown()


def engine_of(config: str | Path, denoiser: torch.nn.Module, device: torch.device) -> ZeroEngine:
    resolved = resolve_config(str(config), load_recipe("smoke"), world_size=1, stochastic_steps=2, cuda=False)
    return ZeroEngine(denoiser, OPTIMIZER, resolved, device)


def update(engine: ZeroEngine) -> StepResult:
    args, kwargs = inputs(dtype=engine.dtype)
    engine.set_scale(1.0)
    with engine.accumulating():
        for last in (False, True):
            engine.backward(engine.denoiser(*args, **kwargs)[0].float().square().mean(), last=last)
    return engine.step()


def plain_updates(denoiser: torch.nn.Module, count: int) -> dict[str, torch.Tensor]:
    """The same with torch alone."""
    trained = {name: parameter for name, parameter in denoiser.named_parameters() if "lora_" in name}
    assert {name for name, parameter in denoiser.named_parameters() if parameter.requires_grad} == trained.keys()
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2, weight_decay=1e-2, eps=1e-4)
    args, kwargs = inputs()
    for _ in range(count):
        (2 * denoiser.train()(*args, **kwargs)[0].square().mean()).backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach() for name, parameter in trained.items()}


@pytest.mark.parametrize("config", ["zero0.json", "zero1.json", "zero2.json", "zero3.json", "zero3_offload.json"])
def test_updates_move_the_adapter_as_plain_torch_does_and_nothing_else(config: str, alone, tmp_path: Path) -> None:
    base, fresh = small_unet().state_dict(), adapted().state_dict()
    policy = small_policy()
    trajectories = small_trajectories(policy, small_unet())
    engine = engine_of(config, adapted(), alone)
    with engine.base_denoiser() as frozen:
        reference = log_prob_pass(policy, frozen, trajectories, 4)
    # Fresh: the ratio to the reference is 1 to the bit, through the training path.
    assert torch.equal(log_prob_pass(policy, engine.denoiser, trajectories, 4), reference)
    results = [update(engine), update(engine)]
    assert all(result.applied and result.grad_norm > 0 for result in results)
    engine.save(tmp_path)
    results.append(update(engine))
    expected, state = plain_updates(adapted(), 3), engine.full_state_dict()
    assert state.keys() == expected.keys()
    for name, value in state.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
        assert "lora_A" in name or (value != fresh[name]).any()
    with engine.whole_denoiser() as denoiser:
        trained = {name: value.clone() for name, value in base_weights(denoiser).items()}
        assert trained.keys() == base.keys()
        assert all(torch.equal(trained[name], base[name]) for name in base), "the base was trained"
        after = log_prob_pass(policy, denoiser, trajectories, 4)
    with engine.base_denoiser() as frozen:
        assert torch.equal(log_prob_pass(policy, frozen, trajectories, 4), reference)
    assert torch.equal(log_prob_pass(policy, engine.denoiser, trajectories, 4), after)
    assert not torch.equal(after, reference)
    # A checkpoint holds the adapter alone: weights, master weights and what the optimizer knows of them.
    for file in (tmp_path / "zero").glob("*model_states.pt"):
        assert torch.load(file, weights_only=False)["module"].keys() == expected.keys()
    floats = sum(file.stat().st_size for file in tmp_path.rglob("*.pt")) / 4
    assert floats < SHAPES.denoiser_parameters
    # A fresh job goes on in the same bits.
    again = engine_of(config, adapted(), alone)
    again.load(tmp_path)
    assert again.updates == 2
    result = update(again)
    assert result.grad_norm == results[-1].grad_norm
    resumed = again.full_state_dict()
    assert all(torch.equal(value, state[name]) for name, value in resumed.items())


@pytest.mark.parametrize("stage", [1, 2])
def test_master_weights_are_float32_and_the_base_is_of_the_models_dtype(stage: int, alone, tmp_path: Path) -> None:
    path = tmp_path / "bf16.json"
    path.write_text(json.dumps({"bf16": {"enabled": True}, "zero_optimization": {"stage": stage}}))
    engine = engine_of(path, adapted(), alone)
    base = small_unet().to(torch.bfloat16).state_dict()
    before = engine.full_state_dict()
    update(engine)
    module = engine.engine.module
    assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}
    assert all(torch.equal(value, base[name]) for name, value in base_weights(module).items())
    state = engine.full_state_dict()
    assert {value.dtype for value in state.values()} == {torch.float32}
    assert any(not torch.equal(value, value.bfloat16().float()) for value in state.values()), "no more than the bf16 copy"
    assert any(not torch.equal(value, before[name]) for name, value in state.items())


# Fast paths


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["blocks", "full"])
def test_compiled_views_see_the_adapter_and_see_it_off(mode: str, monkeypatch) -> None:
    monkeypatch.setattr("prdp_fast.acceleration.compile.BACKEND", "aot_eager")
    torch._dynamo.reset()
    denoiser = adapted().train()
    speed = accelerate(
        Denoisers(denoiser, None, None, has_adapter=True), PerformanceSettings(compile=mode, attention="auto"), small_family(),
        train_rows=ROWS, sample_rows=ROWS, stage=2, device=CPU, dtype=torch.float32,
    )  # fmt: skip
    assert speed.decisions["fuse_qkv"].value == "off" and "lora" in speed.decisions["fuse_qkv"].reason
    view = speed.sampling_view(denoiser)
    plain = adapted()
    for seed in (1, 2):  # after every update
        for one in (denoiser, plain):
            disturb(one, seed)
        expected = call(plain)
        assert distance([call(view)], [expected]) < 1e-5 and distance([call(denoiser)], [expected]) < 1e-5
        assert distance([call(small_unet())], [expected]) > 1e-4
        with lora.adapter_off(denoiser):
            assert distance([call(denoiser)], [call(small_unet())]) < 1e-5
        args, kwargs = inputs()
        trained = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
        own = torch.autograd.grad(denoiser(*args, **kwargs)[0].square().sum(), trained)
        again = [parameter for parameter in plain.parameters() if parameter.requires_grad]
        assert distance(list(own), list(torch.autograd.grad(plain(*args, **kwargs)[0].square().sum(), again))) < 1e-5


def test_joined_products_leave_adapters_their_own(monkeypatch) -> None:
    denoiser = disturb(adapted())
    expected = call(denoiser)
    attention.set_attention(denoiser, "math")  # which joins the products of plain layers
    assert distance([call(denoiser)], [expected]) < 1e-5
    with lora.adapter_off(denoiser):
        assert distance([call(denoiser)], [call(small_unet())]) < 1e-5


def test_fusing_is_refused() -> None:
    with pytest.raises(UserError, match=r"fuse_qkv is on, but with model\.lora"):
        accelerate(
            Denoisers(adapted(), None, None, has_adapter=True),
            PerformanceSettings(compile="off", attention="sdpa", fuse_qkv="on"),
            small_family(), train_rows=ROWS, sample_rows=ROWS, stage=2, device=CPU, dtype=torch.float32,
        )  # fmt: skip


# What it costs


def by_hand() -> int:
    """rank * (inputs + outputs) of every target."""
    sizes = [
        (module.in_features + module.out_features)
        for name, module in small_unet().named_modules()
        if name.endswith((".to_q", ".to_k", ".to_v", ".to_out.0"))
    ]
    return LORA.rank * sum(sizes)


def test_sizes_without_weights() -> None:
    assert SHAPES.trained_parameters == by_hand()
    assert SHAPES.denoiser_parameters == small_family().denoiser_parameters + by_hand()
    assert small_family().trained_parameters == small_family().denoiser_parameters


def test_the_memory_plan_counts_the_adapter_where_weights_are_trained() -> None:
    settings = load_recipe("smoke", ["model.lora={rank: 3}"])
    config = resolve_config("zero2.json", settings, world_size=2, stochastic_steps=4, cuda=False)
    job = Footprint.of(
        settings, config, SHAPES, Activations(0), 1, world_size=2, needs_reference=True, cuda=False
    )  # fmt: skip
    sizes = {item.name: item.size for item in plan_memory(job).items}
    whole, adapter = SHAPES.denoiser_parameters, by_hand()
    assert sizes["weights"] == 4 * whole
    assert sizes["master weights"] == 2 * adapter and sizes["optimizer state"] == 4 * adapter
    assert sizes["gradients"] == 4 * adapter and sizes["gradient reduction buffer"] == 4 * adapter
    assert "reference weights" not in sizes


def test_activations_of_real_and_of_fake_tensors_agree_and_gradients_are_the_adapters() -> None:
    denoiser = copy.deepcopy(adapted()).train()
    real = measure_activations(denoiser, SHAPES, torch.float32)
    assert {name for name, parameter in denoiser.named_parameters() if parameter.grad is not None} == {
        name for name, _ in denoiser.named_parameters() if "lora_" in name
    }
    fake = fake_activations(SHAPES, torch.float32)
    assert fake.per_row == pytest.approx(real.per_row, rel=0.02) and fake.per_row > 0
    assert fake.forward_per_row == pytest.approx(real.forward_per_row, rel=0.02)


def test_a_backward_costs_about_a_forward() -> None:
    assert cost.backward_per_forward(small_family()) == 2
    tiny = read_family("tiny", LoraSettings(rank=4))
    assert 0.85 < cost.backward_per_forward(tiny) < 1.1
    # 2 * rank * (inputs + outputs) operations a token and layer more
    more = cost.denoiser_flop(tiny) / cost.denoiser_flop(read_family("tiny"))
    assert 1.005 < more < 1.05


def test_the_dry_run_tells_what_is_trained() -> None:
    whole, adapter = (
        dry_run(Job.prepare(load_recipe("smoke", overrides), "zero2.json", world_size=1, cuda=False), None)
        for overrides in ([], ["model.lora={rank: 4}"])
    )
    trained = read_family("tiny", LoraSettings(rank=4)).trained_parameters
    assert (
        adapter[0] == f"LoRA of rank 4: {trained} weights are trained, {read_family('tiny').denoiser_parameters} stay as they are"
    )
    assert any("reference weights" in line for line in whole) and not any("reference weights" in line for line in adapter)


# What a user can get wrong


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("model.lora={rank: 0}", "model.lora.rank is 0"),
        ("model.lora={rnk: 4}", "unknown key 'rnk' under 'model.lora'; did you mean 'rank'?"),
        ("model.lora={alpha: -1}", "model.lora.alpha is -1"),
        ("model.lora={targets: [to_q, to_z]}", "the denoiser has no layer whose name ends with 'to_z'"),
        ("model.lora={targets: [norm1]}", "name linear layers or convolutions"),
        ("model.lora={targets: []}", "model.lora.targets is []"),
    ],
)
def test_refusals_come_before_anything_is_loaded(setting: str, expected: str) -> None:
    with pytest.raises(UserError) as error:
        Job.prepare(load_recipe("smoke", [setting]), "zero2.json", world_size=1, cuda=False)
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_without_peft_one_line_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(UserError, match=r"pip install 'prdp-fast\[lora\]'"):
        lora.add_adapter(small_unet(), LORA, 0)
