"""A guided call that computes its common beginning once is the plain call: outputs, log-probs and gradients, to rounding.

In float64, where a relative distance of 1e-13 is rounding and every error is not.
"""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import launching
import pytest
import torch
from diffusers import UNet2DConditionModel
from launching import TRAIN
from small_model import small_policy, small_trajectories, small_unet
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.lib.published import UNETS
from prdp_fast.acceleration import channels_last, shared_halves
from prdp_fast.acceleration import choose as acceleration
from prdp_fast.acceleration.choose import Denoisers, accelerate, choose_shared_halves
from prdp_fast.acceleration.compile import CompiledForward, uncompile
from prdp_fast.acceleration.cuda_graph import CudaGraphForward
from prdp_fast.acceleration.probe import MARGIN, Decision, Probe
from prdp_fast.config.recipe import LoraSettings, PerformanceSettings
from prdp_fast.core.errors import UserError
from prdp_fast.models import lora
from prdp_fast.models.families import Family, StableDiffusion, StableDiffusionXL
from prdp_fast.training.passes import gradient_pass, log_prob_pass

CPU = torch.device("cpu")
N = 3
EXACT = 1e-13
SMALL = {"sample_size": 8, "layers_per_block": 2, "norm_num_groups": 4, "cross_attention_dim": 16}
FOUR = SMALL | {"block_out_channels": (8, 16, 16, 16)}
MODELS = {
    "sd1": FOUR | {"attention_head_dim": 2},
    "sd2": FOUR | {"attention_head_dim": [1, 2, 4, 4], "use_linear_projection": True, "upcast_attention": True},
    # The text comes in at the second resolution, and two skip tensors more are from before.
    "later text": SMALL
    | {
        "block_out_channels": (8, 16), "attention_head_dim": 2, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "transformer_layers_per_block": 2,
    },
    "scaled by time": FOUR | {"attention_head_dim": 2, "resnet_time_scale_shift": "scale_shift"},
}  # fmt: skip
TWO_LEVELS = SMALL | {
    "block_out_channels": (8, 16), "layers_per_block": 1, "attention_head_dim": 2, "use_linear_projection": True,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip
SDXL = SMALL | {
    "block_out_channels": (8, 16), "attention_head_dim": [2, 2], "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 24 + 6 * 8,
}  # fmt: skip


def build(config: dict, dtype: torch.dtype = torch.float64) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(**config).to(dtype).train()


def family_of(denoiser: UNet2DConditionModel) -> Family:
    family = StableDiffusion if denoiser.config.addition_embed_type is None else StableDiffusionXL
    return family(dict(denoiser.config), text_length=6)


def probe_of(denoiser: UNet2DConditionModel, *, shared: bool = False, gradients: bool = True) -> Probe:
    return Probe(denoiser, family_of(denoiser), 2 * N, CPU, next(denoiser.parameters()).dtype, gradients, shared)


def results(denoiser: UNet2DConditionModel, *, shared: bool, size: tuple[int, int] = (8, 8)) -> list[torch.Tensor]:
    """Output of 2N rows, and the gradient of its product with fixed numbers by everything that is trained."""
    generator = torch.Generator().manual_seed(1)
    dtype = next(denoiser.parameters()).dtype
    latents, text, factors = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in ((N, 4, *size), (2 * N, 6, 16), (2 * N, 4, *size))
    )
    call = denoiser if shared else shared_halves.doubling(denoiser)
    output = call(latents, torch.tensor([999, 500, 20]), encoder_hidden_states=text, return_dict=False)[0]
    trained = lora.trained_parameters(denoiser)
    return [output.detach(), *torch.autograd.grad((output * factors).sum(), trained, allow_unused=True)]


def distance(found: list, expected: list) -> float:
    assert [value is None for value in found] == [value is None for value in expected]
    pairs = [(own, plain) for own, plain in zip(found, expected, strict=True) if plain is not None]
    error = sum((own - plain).square().sum() for own, plain in pairs)
    return float((error / sum(plain.square().sum() for _, plain in pairs)).sqrt())


# ---------------------------------------------------------------------------------------------------------------- exactness
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_output_and_gradient_are_the_plain_ones(name: str, checkpointing: bool) -> None:
    denoiser = build(MODELS[name])
    if checkpointing:
        denoiser.enable_gradient_checkpointing()
    names, plain = list(denoiser.state_dict()), results(denoiser, shared=False)
    uncond, cond = plain[0].chunk(2)
    assert (uncond - cond).abs().max() > 1e-3, "the text makes no difference, so this test could see none"
    shared_halves.enable(denoiser)
    calls: list[int] = []
    first = next(module for module in denoiser.modules() if isinstance(module, shared_halves.SharedBlock))
    hook = first.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    found = results(denoiser, shared=True)
    hook.remove()
    assert calls == [N] * (1 + checkpointing), "recomputed with as many rows as it was computed"
    assert distance(found[:1], plain[:1]) < EXACT and distance(found[1:], plain[1:]) < EXACT
    assert list(denoiser.state_dict()) == names
    # Calls of another kind are what they were, to the bit, and so is everything afterwards.
    assert all(torch.equal(*pair) for pair in zip(results(denoiser, shared=False), plain) if pair[1] is not None)
    shared_halves.disable(denoiser)
    assert all(torch.equal(*pair) for pair in zip(results(denoiser, shared=False), plain) if pair[1] is not None)


def test_a_size_that_needs_another_upsampling() -> None:
    denoiser = build(MODELS["sd1"])
    plain = results(denoiser, shared=False, size=(6, 10))
    shared_halves.enable(denoiser)
    assert distance(results(denoiser, shared=True, size=(6, 10)), plain) < EXACT


@pytest.mark.parametrize("off", [False, True])
def test_with_an_adapter(off: bool) -> None:
    denoiser = build(MODELS["sd1"])
    targets = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "conv1", "time_emb_proj", "ff.net.2"]
    lora.add_adapter(denoiser, LoraSettings(rank=2, targets=targets), 0)
    denoiser.double()
    for parameter in lora.trained_parameters(denoiser):
        torch.nn.init.normal_(parameter, std=0.1)
    bare = results(build(MODELS["sd1"]), shared=False)[0]
    plain = results(denoiser, shared=False)
    assert distance([plain[0]], [bare]) > 1e-3
    shared_halves.enable(denoiser)
    if off:
        with lora.adapter_off(denoiser):
            denoiser.requires_grad_(True)
            assert distance([results(denoiser, shared=True)[0]], [bare]) < EXACT
    else:
        assert distance(results(denoiser, shared=True), plain) < EXACT


@pytest.mark.parametrize("name", MODELS)
def test_what_is_before_the_text_and_nothing_else_is_computed_once(name: str) -> None:
    """Rows that every module is given: fewer would be wrong behind the first cross-attention, more a waste before it."""
    denoiser = build(MODELS[name])
    shared_halves.enable(denoiser)
    rows: dict[str, int] = {}

    def note(own: str, module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        given = args[0] if args else kwargs["hidden_states"]
        rows[own] = len(given)

    for own, module in denoiser.named_modules():
        if own:
            module.register_forward_pre_hook(partial(note, own), with_kwargs=True)
    results(denoiser, shared=True)
    level = 1 if name == "later text" else 0
    first = f"down_blocks.{level}.attentions.0"
    whole = ["conv_in", "time_embedding", "time_proj", f"down_blocks.{level}.resnets.0"]
    whole += [f"{first}.norm", f"{first}.proj_in", f"{first}.transformer_blocks.0.norm1", f"{first}.transformer_blocks.0.attn1"]
    whole += [f"down_blocks.{block}" for block in range(level)]
    # Modules that hold such and others are given the halves that are still one.
    whole_and_more = [f"down_blocks.{level}", first, f"{first}.transformer_blocks.0"]
    once = {own for own, count in rows.items() if count == N}
    inside = {own for own in rows if any(own == name or own.startswith(f"{name}.") for name in whole)}
    nonlinearities = {own for own in rows if own.endswith((".nonlinearity", ".time_embed_act"))}  # one module in many places
    assert once - nonlinearities == (inside | set(whole_and_more)) - nonlinearities
    assert {count for own, count in rows.items() if own not in once} == {2 * N}


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "share"), [("sd14", 0.0254), ("sd21", 0.0354)])
def test_the_share_of_a_published_model(preset: str, share: float) -> None:
    """Of the multiplications of a guided call, by torch's counter."""
    config = UNETS[preset]
    with torch.device("meta"):
        denoiser = UNet2DConditionModel(**config)
        side, width = config["sample_size"], config["cross_attention_dim"]

        def flop(rows: int) -> int:
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                denoiser(torch.zeros(rows, 4, side, side), torch.zeros(rows), torch.zeros(2, 77, width))
            return counter.get_total_flops()

        plain = flop(2)
        shared_halves.enable(denoiser)
        assert 1 - flop(1) / plain == pytest.approx(share, abs=5e-5)


# ------------------------------------------------------------------------------------------------------------------ in a policy
@pytest.mark.parametrize(("guidance_scale", "interval"), [(3.0, None), (3.0, (300, 700)), (None, None)])
def test_every_pass_of_a_job(guidance_scale: float | None, interval: tuple[int, int] | None) -> None:
    """With a guidance interval some steps have one half, and come in calls of twice as many latents."""
    plain, policy = small_unet(dtype=torch.float64).train(), small_policy(5, guidance_scale, interval)
    denoiser = copy.deepcopy(plain)
    shared_halves.enable(denoiser)
    once = replace(policy, predict=partial(policy.predict, shared=True))
    assert interval is None or 0 < policy.guided.sum() < len(policy.guided)
    trajectories = small_trajectories(policy, small_unet(), dtype=torch.float64)
    again = small_trajectories(once, copy.deepcopy(denoiser).float(), dtype=torch.float64)
    torch.testing.assert_close(again.latents, trajectories.latents, rtol=1e-4, atol=1e-5)
    found = []
    for own, one in ((policy, plain), (once, denoiser)):
        log_probs = log_prob_pass(own, one, trajectories, 4)
        weights = torch.linspace(-1, 1, log_probs.numel(), dtype=torch.float64).view_as(log_probs)
        updated = gradient_pass(own, one, trajectories, weights, 4, lambda loss, last: loss.backward())
        assert torch.equal(log_probs, updated), "old and new log-probs differ before anything was learnt"
        found.append([log_probs, *(parameter.grad for parameter in one.parameters())])
    assert distance(found[1][:1], found[0][:1]) < EXACT and distance(found[1][1:], found[0][1:]) < EXACT


# ------------------------------------------------------------------------------------------------------------------- choosing
@pytest.mark.parametrize(
    ("config", "words"),
    [
        (SDXL, "the time embedding differs between the halves"),
        (MODELS["sd1"] | {"num_class_embeds": 3}, "the time embedding differs between the halves"),
        (MODELS["sd1"] | {"encoder_hid_dim": 16, "encoder_hid_dim_type": "text_proj"}, "more than a timestep and text"),
        (MODELS["sd1"] | {"time_cond_proj_dim": 4}, "more than a timestep and text"),
        (MODELS["sd1"] | {"dropout": 0.1}, "dropout draws for every row"),
        (MODELS["sd1"] | {"only_cross_attention": True}, "the first transformer block has more than"),
        (MODELS["sd1"] | {"attention_type": "gated"}, "the first transformer block has more than"),
        (MODELS["sd1"] | {"dual_cross_attention": True}, "no transformer over pixels"),
        (
            MODELS["sd1"] | {"down_block_types": ("DownBlock2D",) * 4, "up_block_types": ("UpBlock2D",) * 4},
            "no transformer over pixels",
        ),
        (
            MODELS["sd1"] | {"down_block_types": ("SimpleCrossAttnDownBlock2D", *("DownBlock2D",) * 3)},
            "blocks SimpleCrossAttnDownBlock2D are not known",
        ),
    ],
)  # fmt: skip
def test_what_it_does_not_know_is_left_alone(config: dict, words: str) -> None:
    denoiser = build(config, torch.float32)
    probe = probe_of(denoiser)
    decision = choose_shared_halves("auto", probe, True, None)
    assert decision.value == "off" and words in decision.reason
    with pytest.raises(UserError, match=rf"performance\.shared_halves is on, but .*{words}.*; set auto or off"):
        choose_shared_halves("on", probe, True, None)


def choose(denoiser, reference=None, *, guided: bool = True, remembered=None, **performance):
    family = family_of(denoiser)
    return accelerate(
        Denoisers(denoiser, None, reference), PerformanceSettings(**{"compile": "off", "attention": "sdpa"} | performance),
        family, train_rows=2 * N, sample_rows=2 * N, stage=2, device=CPU, dtype=torch.float32, guided=guided,
        remembered=remembered,
    )  # fmt: skip


def enabled(denoiser: torch.nn.Module) -> bool:
    return any(isinstance(module, shared_halves.SharedBlock) for module in denoiser.modules())


def test_settings_and_their_reasons(monkeypatch) -> None:
    denoiser, reference = build(MODELS["sd1"], torch.float32), build(MODELS["sd1"], torch.float32).requires_grad_(False)
    speed = choose(denoiser, reference, shared_halves="on", fuse_qkv="off")
    decision = speed.decisions["shared_halves"]
    assert speed.shares_halves and enabled(denoiser) and enabled(reference)
    assert decision.reason == "as set" and set(decision.milliseconds) == {"off", "on"}
    for settings, words in (
        ({}, "auto on a CPU"), ({"shared_halves": "off"}, "as set"), ({"guided": False}, "sampling is without guidance")
    ):  # fmt: skip
        speed = choose(denoiser, **settings)
        assert not speed.shares_halves and not enabled(denoiser) and words in speed.decisions["shared_halves"].reason
    with pytest.raises(UserError, match="shared_halves is on, but sampling is without guidance; set auto or off"):
        choose(denoiser, guided=False, shared_halves="on")


def test_auto_on_cuda_takes_it_unless_it_is_slower(monkeypatch) -> None:
    probe = replace(probe_of(build(MODELS["sd1"], torch.float32)), device=torch.device("cuda"))
    for on, value in ((10.0, "on"), (10.0 * (1 + MARGIN["cuda"] / 2), "on"), (10.0 * (1 + 2 * MARGIN["cuda"]), "off")):
        monkeypatch.setattr(acceleration, "try_shared_halves", lambda probe, on=on: {"off": 10.0, "on": on})
        assert choose_shared_halves("auto", probe, True, None).value == value
    assert choose_shared_halves("auto", probe, True, "on").value == "on", "a resumed run rounds as it did"
    assert choose_shared_halves("auto", probe, True, "off").reason == "as this run chose when it started"


def test_a_resumed_run_goes_on_as_it_was() -> None:
    denoiser = build(MODELS["sd1"], torch.float32)
    assert choose(denoiser, remembered={"shared_halves": {"value": "on"}}).shares_halves
    decision = choose(denoiser, remembered={"tf32": {"value": "off"}}).decisions["shared_halves"]  # of an earlier version
    assert decision == Decision("off", "as this run chose when it started")


def test_a_wrong_result_is_not_taken(monkeypatch) -> None:
    denoiser = build(MODELS["sd1"], torch.float32)

    def too_far(self, hidden_states, attention_mask=None, encoder_hidden_states=None, *args, **kwargs):
        """Cross-attention taken for a part of what both halves have in common."""
        text = encoder_hidden_states
        if len(text) == len(hidden_states):
            return shared_halves.BasicTransformerBlock.forward(self, hidden_states, None, text, *args, **kwargs)
        half = shared_halves.BasicTransformerBlock.forward(self, hidden_states, None, text[: len(hidden_states)])
        return shared_halves.twice(half)

    monkeypatch.setattr(shared_halves.SharedBlock, "forward", too_far)
    plain = results(denoiser, shared=False)
    with pytest.raises(UserError, match="shared_halves is on, but Unsuitable: its output is off by"):
        choose(denoiser, shared_halves="on")
    decision = choose(denoiser, remembered={"shared_halves": {"value": "on"}}).decisions["shared_halves"]
    assert decision.value == "off" and "off by" in decision.reason and not enabled(denoiser)
    assert all(torch.equal(*pair) for pair in zip(results(denoiser, shared=False), plain) if pair[1] is not None)


def test_block_inputs_that_would_be_ignored_are_refused() -> None:
    denoiser = build(MODELS["sd1"])
    shared_halves.enable(denoiser)
    mask = torch.ones(2 * N, 6)
    with pytest.raises(NotImplementedError, match=r"encoder_attention_mask.*as many latents as embeddings"):
        denoiser(torch.zeros(N, 4, 8, 8).double(), 0, torch.zeros(2 * N, 6, 16).double(), encoder_attention_mask=mask)


# ------------------------------------------------------------------------------------------------------- with other fast paths
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["blocks", "full"])
def test_compiled(mode: str, monkeypatch) -> None:
    """Every block that is compiled is compiled for the rows that it has, and the job's calls compile nothing more."""
    monkeypatch.setattr("prdp_fast.acceleration.compile.BACKEND", "aot_eager")
    torch._dynamo.reset()
    denoiser = build(TWO_LEVELS, torch.float32)
    reference = copy.deepcopy(denoiser).requires_grad_(False)
    plain = results(denoiser, shared=False)
    speed = choose(denoiser, reference, shared_halves="on", compile=mode, fuse_qkv="off")
    assert {speed.decisions[f"compile {role}"].value for role in acceleration.ROLES} == {mode}
    ran: set[torch.nn.Module] = set()
    if mode == "blocks":
        for module in denoiser.modules():
            if isinstance(forward := module.__dict__.get("forward"), CompiledForward):
                compiled = forward.compiled
                forward.compiled = lambda *args, m=module, c=compiled, **kwargs: (ran.add(m), c(*args, **kwargs))[1]
    with torch._dynamo.config.patch(error_on_recompile=mode == "blocks"):
        found = results(denoiser, shared=True)
    assert distance(found[:1], plain[:1]) < 1e-5 and distance(found[1:], plain[1:]) < 1e-5
    if mode == "blocks":
        blocks = family_of(denoiser).repeated_blocks
        expected = [m for m in denoiser.modules() if any(base.__name__ in blocks for base in type(m).__mro__)]
        assert ran == set(expected)
    with torch.no_grad():
        for one in (speed.sampling_view(denoiser), reference):
            latents = torch.randn(N, 4, 8, 8)
            text = torch.randn(2 * N, 6, 16)
            time = torch.arange(N)
            double = shared_halves.doubling(build(TWO_LEVELS, torch.float32))
            expected = double(latents, timestep=time, encoder_hidden_states=text)[0]
            assert distance([one(latents, timestep=time, encoder_hidden_states=text, return_dict=False)[0]], [expected]) < 1e-5
    uncompile(denoiser)
    assert distance(results(denoiser, shared=True), plain) < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_in_channels_last(name: str) -> None:
    """In whatever order the two are turned on."""
    plain = results(build(MODELS[name]), shared=False)
    for order in ((shared_halves.enable, channels_last.enable), (channels_last.enable, shared_halves.enable)):
        denoiser = build(MODELS[name])
        for enable in order:
            enable(denoiser)
        found = results(denoiser, shared=True)
        assert distance(found[:1], plain[:1]) < EXACT and distance(found[1:], plain[1:]) < EXACT


def test_a_capture_is_for_the_rows_of_the_result() -> None:
    """2N of a shared call, and of N latents without guidance as many as there are: those are not captured."""
    captured = CudaGraphForward(lambda *args, **kwargs: "plain", [2 * N])
    captured._capture = lambda leaves, tree: pytest.fail("captured")  # type: ignore[method-assign]
    latents, time = torch.zeros(N, 4, 8, 8), torch.zeros(N)
    with torch.no_grad():
        assert captured(latents, timestep=time, encoder_hidden_states=torch.zeros(N, 6, 16)) == "plain"
        with pytest.raises(pytest.fail.Exception, match="captured"):
            captured(latents, timestep=time, encoder_hidden_states=torch.zeros(2 * N, 6, 16))


# -------------------------------------------------------------------------------------------------------------- a whole job
@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("interval", ["null", "[300,700]"])
def test_a_job_has_the_metrics_of_the_plain_one(tmp_path: Path, interval: str) -> None:
    rows = {}
    for setting in ("off", "on"):
        run = tmp_path / setting
        values = {
            "sampler.guidance_scale": 3.0, "sampler.guidance_interval": interval, "schedule.epochs": 2,
            "schedule.prompts_per_epoch": 2, "schedule.images_per_prompt": 4, "schedule.updates_per_epoch": 1,
            "evaluation.prompts": 2, "performance.attention": "sdpa", "performance.fuse_qkv": "off",
            "performance.shared_halves": setting,
        }  # fmt: skip
        launching.run(TRAIN, "--recipe", "tiny", "--output", run, *launching.settings(values), ranks=1)
        decided = json.loads((run / "acceleration.json").read_text())["shared_halves"]
        assert (decided["value"], decided["reason"]) == (setting, "as set")
        rows[setting] = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for plain, shared in zip(rows["off"], rows["on"], strict=True):
        assert shared["drift"] < 1e-4
        for name in ("reward", "log_prob", "loss", "grad_norm", "mean_abs_target", "pair_accuracy", "pairs"):
            # float32 rounding, through an update of AdamW, whose first steps are as long for small gradients as for large ones
            assert shared[name] == pytest.approx(plain[name], rel=1e-3, abs=2e-5), f"epoch {plain['epoch']}: {name}"
