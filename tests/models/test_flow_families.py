"""SD3, SD3.5 and FLUX.1: the engine's conditioning, log-probs and images are those of the pipelines themselves."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from tiny_pipelines import FLOW, PIXELS, TOKENS, build, opening

from prdp_fast.acceleration.choose import Denoisers, accelerate
from prdp_fast.acceleration.compile import uncompile
from prdp_fast.config.recipe import LoraSettings, PerformanceSettings, SamplerSettings
from prdp_fast.core.errors import UserError
from prdp_fast.core.records import Prompt, Trajectories
from prdp_fast.models import lora
from prdp_fast.models.families import read_family
from prdp_fast.models.families.base import count_parameters
from prdp_fast.models.families.flux import pack, positions, unpack
from prdp_fast.models.pipeline import Pipeline
from prdp_fast.models.text import TextEncoder
from prdp_fast.planning import cost
from prdp_fast.planning.memory import fake_activations
from prdp_fast.sampling.policy import Policy, build_policy, build_transitions
from prdp_fast.sampling.rollout import rollout
from prdp_fast.training.passes import gradient_pass, log_prob_pass

CPU = torch.device("cpu")
TEXTS = ["a red circle", "three big blue squares on a green background, and then more words than the tokenizer takes"]
PROMPTS = [Prompt(number, text, {}) for number, text in enumerate(TEXTS)]
STEPS, IMAGES, SCALE, TOLD, NOISE = 4, 2, 3.0, 2.5, 0.7


def sampler(family: str, **values: Any) -> SamplerSettings:
    given: dict[str, Any] = {
        "num_inference_steps": STEPS, "max_sequence_length": TOKENS, "image_size": PIXELS, "method": "flow_sde",
        "noise_level": NOISE,
        "guidance_scale": None if family == "flux_dev" else SCALE, "embedded_guidance": TOLD if family == "flux_dev" else None,
    }  # fmt: skip
    return SamplerSettings(**given | values)


@pytest.fixture(scope="module")
def directories(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pipelines")
    return {family: build(family, root / family) for family in FLOW}


@pytest.fixture(scope="module", params=FLOW)
def family(request) -> str:
    return request.param


def opened(family: str, directory: Path) -> DiffusionPipeline:
    pipe = DiffusionPipeline.from_pretrained(directory, dtype=torch.float32, **opening(family))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def plain(family: str, directories: dict[str, Path]) -> DiffusionPipeline:
    return opened(family, directories[family])


@pytest.fixture(scope="module")
def own(family: str, directories: dict[str, Path]) -> Pipeline:
    return Pipeline.load(read_family(str(directories[family])).for_sampler(sampler(family)), CPU, torch.float32)


def sampled(own: Pipeline, settings: SamplerSettings) -> tuple[Policy, Trajectories]:
    policy = build_policy(settings, build_transitions(own.family, settings), own.family.predict)
    embeddings = TextEncoder(own, torch.float32).encode(PROMPTS)
    return policy, rollout(
        policy,
        own.denoiser,
        PROMPTS,
        embeddings,
        images_per_prompt=IMAGES,
        latent_shape=own.latent_shape,
        batch=3,
        seed=1,
        epoch=0,
    )


def call(family: str, **values: Any) -> dict[str, Any]:
    """Arguments of the pipeline's own call."""
    guidance = {
        "flux_dev": {"guidance_scale": TOLD}, "flux_schnell": {"true_cfg_scale": SCALE, "negative_prompt": [""] * len(TEXTS)},
    }.get(family, {"guidance_scale": SCALE})  # fmt: skip
    given = {"height": PIXELS, "width": PIXELS, "max_sequence_length": TOKENS, "num_images_per_prompt": IMAGES}
    return {"prompt": TEXTS, "num_inference_steps": STEPS, **given, **guidance} | values


def packed(family: str, latents: torch.Tensor) -> torch.Tensor:
    """As the pipeline takes them."""
    if not family.startswith("flux"):
        return latents
    from diffusers import FluxPipeline

    rows, channels, height, width = latents.shape
    return FluxPipeline._pack_latents(latents, rows, channels, height, width)


def encoded(pipe: DiffusionPipeline, family: str) -> tuple[torch.Tensor, ...]:
    """(prompt, negative, pooled, negative pooled), a row per image, from the pipeline's own `encode_prompt`."""
    given = {"device": CPU, "num_images_per_prompt": IMAGES, "max_sequence_length": TOKENS}
    with torch.no_grad():
        if family.startswith("sd3"):
            return pipe.encode_prompt(TEXTS, None, None, do_classifier_free_guidance=True, **given)
        embeds, pooled, _ = pipe.encode_prompt(TEXTS, **given)
        negative, negative_pooled, _ = pipe.encode_prompt([""] * len(TEXTS), **given)
    return embeds, negative, pooled, negative_pooled


@torch.no_grad()
def plain_output(pipe: DiffusionPipeline, family: str, x: torch.Tensor, t: torch.Tensor, guided: bool) -> torch.Tensor:
    """The velocity at one step, as the pipelines compute it in their loops. x: (N, C, H, W)."""
    embeds, negative, pooled, negative_pooled = encoded(pipe, family)
    height, width = x.shape[-2:]

    def velocity(words: torch.Tensor, pool: torch.Tensor) -> torch.Tensor:
        if family.startswith("sd3"):
            return pipe.transformer(
                x, timestep=t.expand(len(x)), encoder_hidden_states=words, pooled_projections=pool, return_dict=False
            )[0]
        output = pipe.transformer(
            packed(family, x), timestep=t.expand(len(x)) / 1000, encoder_hidden_states=words, pooled_projections=pool,
            guidance=torch.full((len(x),), TOLD) if family == "flux_dev" else None, txt_ids=torch.zeros(words.shape[1], 3),
            img_ids=pipe._prepare_latent_image_ids(len(x), height // 2, width // 2, CPU, torch.float32), return_dict=False,
        )[0]  # fmt: skip
        return pipe._unpack_latents(output, PIXELS, PIXELS, pipe.vae_scale_factor)

    cond = velocity(embeds, pooled)
    if not guided:
        return cond
    uncond = velocity(negative, negative_pooled)
    return uncond + SCALE * (cond - uncond)


def plain_log_probs(pipe: DiffusionPipeline, family: str, latents: torch.Tensor, guided: bool) -> torch.Tensor:
    """(N, T - 1): of each noisy step, its mean and standard deviation as Flow-GRPO publishes them, on the pipeline's sigmas."""
    pipe(**call(family, output_type="latent"))  # leaves the schedule as the pipeline sets it
    sigmas, timesteps = pipe.scheduler.sigmas.double(), pipe.scheduler.timesteps
    columns = []
    for step in range(STEPS - 1):
        sigma, following = sigmas[step], sigmas[step + 1]
        x, v = latents[:, step].double(), plain_output(pipe, family, latents[:, step], timesteps[step], guided).double()
        dt = following - sigma
        g = NOISE * torch.sqrt(sigma / (1 - torch.where(sigma == 1, sigmas[1], sigma)))
        mean = x * (1 + g**2 / (2 * sigma) * dt) + v * (1 + g**2 * (1 - sigma) / (2 * sigma)) * dt
        std = g * torch.sqrt(-dt)
        residual = (latents[:, step + 1].double() - mean) / std
        columns.append((-residual.square() / 2 - std.log() - math.log(2 * math.pi) / 2).mean((1, 2, 3)))
    return torch.stack(columns, 1)


def test_the_engine_tells_the_transformer_what_the_pipeline_tells_it(
    own: Pipeline, plain: DiffusionPipeline, family: str, monkeypatch
) -> None:
    """Every tensor of the first step, timestep, guidance and positions among them."""

    def recorded(denoiser: torch.nn.Module, run) -> list[dict[str, torch.Tensor]]:
        calls, forward = [], denoiser.forward
        names = ("hidden_states",)
        monkeypatch.setattr(
            denoiser, "forward", lambda *args, **kwargs: calls.append(dict(zip(names, args)) | kwargs) or forward(*args, **kwargs)
        )
        run()
        monkeypatch.undo()
        return [{name: x for name, x in given.items() if isinstance(x, torch.Tensor)} for given in calls]

    policy, trajectories = sampled(own, sampler(family))
    rows = torch.arange(len(trajectories.latents))
    step = torch.full((len(rows),), 1)
    latents = trajectories.latents[:, 1]
    schedule = policy.coefficients(step, torch.float32)
    (got,) = recorded(own.denoiser, lambda: own.family.predict(
        own.denoiser, latents, schedule[0], trajectories.embedding_rows(rows), guided=policy.guidance_scale is not None
    ))  # fmt: skip

    def at_the_second(pipe, index, t, values):
        return {"latents": packed(family, latents)} if index == 0 else {}

    first = packed(family, trajectories.latents[:, 0])
    given = call(family, latents=first, output_type="latent", callback_on_step_end=at_the_second)
    calls = recorded(plain.transformer, lambda: plain(**given))
    if family == "flux_schnell":  # calls once for each half, the prompt's own first
        own_half, negative = calls[2:4]
        expected = {
            name: value if name.endswith("_ids") else torch.cat([negative[name], value]) for name, value in own_half.items()
        }
    else:
        expected = calls[1]
    assert got.keys() == expected.keys() and len(got) >= 4
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    words = got["encoder_hidden_states"][-IMAGES - 1 : -IMAGES + 1]
    assert words.std() > 0.1 and not torch.allclose(*words)  # the two prompts are told apart


@pytest.mark.parametrize("guided", [True, False], ids=["guided", "not guided"])
def test_log_probs_are_those_of_plain_diffusers(own: Pipeline, plain: DiffusionPipeline, family: str, guided: bool) -> None:
    if guided and family == "flux_dev":
        pytest.skip("is told its guidance")
    policy, trajectories = sampled(own, sampler(family) if guided else sampler(family, guidance_scale=None))
    expected = plain_log_probs(plain, family, trajectories.latents, guided)
    assert expected.shape == trajectories.log_probs.shape
    torch.testing.assert_close(trajectories.log_probs.double(), expected, rtol=0, atol=1e-5)
    again = log_prob_pass(policy, own.denoiser, trajectories, micro_batch=5)
    torch.testing.assert_close(again.double(), expected, rtol=0, atol=1e-5)


def test_outside_the_window_it_is_the_pipelines_own_sampling(own: Pipeline, plain: DiffusionPipeline, family: str) -> None:
    """The pipeline goes on from where the one noisy step ended, and paints the same pictures."""
    settings = sampler(family, stochastic_steps=(0, 0), **({} if family == "flux_dev" else {"guidance_scale": SCALE}))
    policy, trajectories = sampled(own, settings)
    assert policy.transitions.stochastic.tolist() == [0]
    latents = trajectories.latents

    def continued(pipe, index, t, values):
        return {"latents": packed(family, latents[:, 1])} if index == 0 else {}

    given = call(family, latents=packed(family, latents[:, 0]), callback_on_step_end=continued)
    final = plain(**given, output_type="latent").images
    torch.testing.assert_close(packed(family, latents[:, -1]), final, rtol=1e-4, atol=1e-5)
    pictures = plain(**given, output_type="pt").images
    images = own.decode(latents[:, -1])
    assert images.shape == (len(TEXTS) * IMAGES, 3, PIXELS, PIXELS) and images.float().std() > 10
    assert (images.float() - 255 * pictures).abs().max() <= 0.52  # one rounding to a byte


def test_packing_is_the_pipelines() -> None:
    from diffusers import FluxPipeline

    latents = torch.randn(3, 4, 6, 10)
    tokens = FluxPipeline._pack_latents(latents, 3, 4, 6, 10)
    assert torch.equal(pack(latents), tokens) and torch.equal(unpack(tokens, 6, 10), latents)
    assert torch.equal(positions(3, 5, latents), FluxPipeline._prepare_latent_image_ids(1, 3, 5, CPU, torch.float32))


def test_shapes_count_what_is_loaded(own: Pipeline, family: str, directories: dict[str, Path]) -> None:
    shapes = read_family(str(directories[family])).for_sampler(sampler(family))
    assert shapes.networks() == own.family.networks() and ("text_encoder_3" in shapes.networks()) == (family == "sd35")
    assert shapes.text_parameters == sum(count_parameters(encoder) for encoder in own.text_encoders.values())
    assert shapes.denoiser_parameters == count_parameters(own.denoiser) and shapes.vae_parameters == count_parameters(own.vae)
    embeddings = TextEncoder(own, torch.float32).encode(PROMPTS)
    inputs, told = shapes.denoiser_inputs(2, CPU), own.family.conditioning(embeddings, guided=False)
    assert all(inputs[name].shape == value.shape and inputs[name].dtype == value.dtype for name, value in told.items())
    side = PIXELS // 4
    assert shapes.latent_shape == (4, side, side) and shapes.attention_tokens == (side // 2) ** 2 + shapes.text_length
    assert cost.denoiser_flop(shapes) > 2 * shapes.denoiser_parameters  # every weight meets more than one token, or a row
    activations = fake_activations(shapes, torch.bfloat16)
    assert activations.per_row > activations.forward_per_row > 0
    if family.startswith("flux"):
        larger = replace(shapes, image_size=(PIXELS, 2 * PIXELS))
        assert larger.latent_shape == (4, side, 2 * side) and cost.denoiser_flop(larger) > cost.denoiser_flop(shapes)


def test_the_shift_follows_the_size(directories: dict[str, Path], family: str) -> None:
    """of FLUX's dynamic schedule, as its pipeline computes it."""
    shapes = read_family(str(directories[family])).for_sampler(sampler(family))
    options = shapes.schedule_options(STEPS)
    assert ("mu" in options) == (family == "flux_dev") and ("sigmas" in options) == family.startswith("flux")
    if family == "flux_dev":
        own_size = read_family(str(directories[family])).schedule_options(STEPS)
        assert own_size["mu"] == pytest.approx(1.15) and options["mu"] == pytest.approx(0.5 - 0.65 * (256 - 16) / 3840)


@pytest.mark.parametrize("name", ["sd35", "flux_dev"])
def test_a_fresh_adapter_changes_nothing_and_opens_in_the_pipeline(
    name: str, directories: dict[str, Path], tmp_path: Path
) -> None:
    settings = LoraSettings(rank=2, alpha=3)
    family = read_family(str(directories[name]), settings).for_sampler(sampler(name))
    own = Pipeline.load(family, CPU, torch.float32)
    policy, trajectories = sampled(own, sampler(name))
    assert family.lora is not None and set(family.lora.targets) == set(family.lora_targets)
    expected = log_prob_pass(policy, own.denoiser, trajectories, micro_batch=4)
    lora.add_adapter(own.denoiser, family.lora, 0)
    assert torch.equal(log_prob_pass(policy, own.denoiser, trajectories, micro_batch=4), expected)  # the ratio is exactly 0
    with torch.no_grad():
        for parameter in lora.trained_parameters(own.denoiser):
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(parameter))))
    own.export(tmp_path, {name: value for name, value in own.denoiser.named_parameters() if value.requires_grad})
    trained = own.family.predict(
        own.denoiser, trajectories.latents[:1, 0], torch.tensor([500.0]), trajectories.embeddings.rows(slice(0, 1)), guided=False
    )
    pipe = opened(name, directories[name])
    before = pipe.transformer
    pipe.load_lora_weights(tmp_path)
    with torch.no_grad():
        loaded = own.family.predict(
            before, trajectories.latents[:1, 0], torch.tensor([500.0]), trajectories.embeddings.rows(slice(0, 1)), guided=False
        )
    torch.testing.assert_close(loaded, trained, rtol=1e-5, atol=1e-6)
    assert any("add_k_proj" in key for key in before.state_dict() if "lora" in key)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "compile"), [("sd35", "blocks"), ("flux_dev", "full")])
def test_fast_paths_compute_the_same(name: str, compile: str, directories: dict[str, Path], monkeypatch) -> None:
    """Compiled, with a chosen attention, and checkpointed; what suits U-Nets alone is off and says why."""
    monkeypatch.setattr("prdp_fast.acceleration.compile.BACKEND", "aot_eager")
    torch._dynamo.reset()
    family = read_family(str(directories[name])).for_sampler(sampler(name))
    own = Pipeline.load(family, CPU, torch.float32)
    policy, trajectories = sampled(own, sampler(name))
    micro_batch = 4
    expected = log_prob_pass(policy, own.denoiser, trajectories, micro_batch)
    trained = own.denoiser.requires_grad_(True)
    rows = micro_batch * (1 if name == "flux_dev" else 2)
    speed = accelerate(
        Denoisers(trained, None, own.frozen_denoiser(torch.float32)), PerformanceSettings(compile=compile, attention="auto"),
        family, train_rows=rows, sample_rows=rows, stage=2, device=CPU, dtype=torch.float32, guided=name != "flux_dev",
    )  # fmt: skip
    chosen = speed.decisions
    assert chosen["compile trained"].value == chosen["compile rollout"].value == chosen["compile reference"].value == compile
    assert chosen["attention"].value == "math" and "tokens" in chosen["attention"].reason
    for setting, words in (("channels_last", "no residual blocks"), ("fuse_qkv", "no attention layers")):
        assert chosen[setting].value == "off" and words in chosen[setting].reason
    words = "without guidance" if name == "flux_dev" else "SD3Transformer2DModel is not known"
    assert chosen["shared_halves"].value == "off" and words in chosen["shared_halves"].reason
    with torch._dynamo.config.patch(error_on_recompile=True):
        for denoiser in (trained, speed.sampling_view(trained)):
            again = log_prob_pass(policy, denoiser, trajectories, micro_batch)
            torch.testing.assert_close(again, expected, rtol=0, atol=1e-5)
    uncompile(trained)
    trained.train().enable_gradient_checkpointing()
    weights = torch.ones_like(expected)
    log_probs = gradient_pass(policy, trained, trajectories, weights, micro_batch, lambda loss, last: loss.backward())
    torch.testing.assert_close(log_probs, expected, rtol=0, atol=1e-5)
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in trained.time_text_embed.parameters())


# Exports


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_export_is_what_was_loaded(family: str, directories: dict[str, Path], dtype: torch.dtype, tmp_path: Path) -> None:
    """Every component in the pipeline's own layout, also of a job whose text encoders were never in memory."""
    own = Pipeline.load(read_family(str(directories[family])).for_sampler(sampler(family)), CPU, dtype, texts=False)
    assert not own.text_encoders
    assert own.export(tmp_path, own.denoiser.state_dict()) == []
    before, after = opened(family, directories[family]), opened(family, tmp_path)
    assert type(before) is type(after) and before.scheduler.config == after.scheduler.config
    for name in own.family.networks():
        left, right = getattr(before, name).state_dict(), getattr(after, name).state_dict()
        assert left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left), name
        assert {value.dtype for value in right.values() if value.is_floating_point()} == {torch.float32}
    given = call(family, generator=torch.Generator().manual_seed(0), output_type="pt")
    assert torch.equal(before(**given).images, after(**given | {"generator": torch.Generator().manual_seed(0)}).images)


def test_t5_keeps_its_wide_layers_beside_float16(directories: dict[str, Path]) -> None:
    own = Pipeline.load(read_family(str(directories["sd35"])).for_sampler(sampler("sd35")), CPU, torch.float16, texts=True)
    dtypes = {name.split(".")[-2]: value.dtype for name, value in own.text_encoders["text_encoder_3"].named_parameters()}
    assert dtypes["wo"] == torch.float32 and dtypes["wi_0"] == torch.float16


# What is no such model


def change(directory: Path, file: str, **values) -> None:
    path = directory / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def refusal(name: str, directory: Path, **values: Any) -> str:
    def load() -> None:
        settings = sampler(name, **values)
        family = read_family(str(directory)).for_sampler(settings)
        build_transitions(family, settings)
        Pipeline.load(family, CPU, torch.float32)

    with pytest.raises(UserError) as caught:
        load()
    assert "\n" not in str(caught.value)
    return str(caught.value)


SCHEDULER = "scheduler/scheduler_config.json"


@pytest.mark.parametrize(
    ("name", "file", "values", "words"),
    [
        ("sd3", "model_index.json", {"_class_name": "StableDiffusion3ControlNetPipeline"}, ["SD3 and SD3.5", "FLUX.1", "SDXL"]),
        ("flux_dev", "model_index.json", {"_class_name": "FluxFillPipeline"}, ["is a FluxFillPipeline", "FluxPipeline"]),
        ("flux_dev", "model_index.json", {"text_encoder_2": [None, None]}, ["has no text_encoder_2", "FluxPipeline needs"]),
        ("flux_dev", "model_index.json", {"tokenizer_2": None}, ["has no tokenizer_2"]),
        ("sd35", "model_index.json", {"tokenizer_3": [None, None]}, ["has a text_encoder_3 and no tokenizer_3", "without both"]),
        ("sd3", "model_index.json", {"text_encoder_3": ["transformers", "T5EncoderModel"], "tokenizer_3":
            ["transformers", "T5TokenizerFast"]}, ["has no text_encoder_3/config.json"]),
        ("sd3", SCHEDULER, {"_class_name": "DDPMScheduler"}, ["is of DDPMScheduler", "expected FlowMatchEulerDiscreteScheduler"]),
        ("flux_dev", SCHEDULER, {"shift": "x"}, ["shift is", "expected a number above 0"]),
        ("sd3", "transformer/config.json", {"in_channels": 9, "out_channels": 9}, ["9 input channels", "latents of 4"]),
        ("sd3", "transformer/config.json", {"joint_attention_dim": 32}, ["of width 40 together", "joint_attention_dim 32"]),
        ("sd35", "transformer/config.json", {"joint_attention_dim": 56}, ["a text_encoder_3 of width 48", "dim 56"]),
        ("sd35", "transformer/config.json", {"pooled_projection_dim": 41}, ["of width 40", "pooled_projection_dim 41"]),
        ("sd3", "transformer/config.json", {"pos_embed_max_size": 3}, ["positions for 24 pixels", "pictures of 32"]),
        ("sd3", "transformer/config.json", {"sample_size": 7}, ["sample_size 7", "multiple of its patch_size 2"]),
        ("flux_dev", "transformer/config.json", {"in_channels": 36}, ["from 36 channels", "16 to 16", "not one that fills"]),
        ("flux_dev", "transformer/config.json", {"guidance_embeds": "yes"}, ['guidance_embeds is "yes"; expected true or false']),
        ("flux_dev", "transformer/config.json", {"pooled_projection_dim": 24}, ["a text_encoder of width 16"]),
        ("sd3", "vae/config.json", {"shift_factor": None}, ["has no shift_factor", "0.0 if there is none"]),
        ("sd35", "text_encoder_3/config.json", {"d_model": "wide"}, ['d_model is "wide"; expected a whole number']),
    ],
)  # fmt: skip
def test_wrong_pipelines_are_refused(tmp_path: Path, name: str, file: str, values: dict, words: list[str]) -> None:
    directory = build(name, tmp_path / name)
    change(directory, file, **values)
    line = refusal(name, directory)
    assert repr(str(directory)) in line and all(word in line for word in words), line


def test_a_t5_whose_files_are_missing_is_named(tmp_path: Path) -> None:
    directory = build("sd35", tmp_path / "sd35")
    (directory / "text_encoder_3" / "model.safetensors").unlink()
    assert "has no weights of its text_encoder_3" in refusal("sd35", directory)
    assert read_family(str(directory)).text_parameters  # planned without weights
    for file in (directory / "tokenizer_3").glob("*.json"):
        file.unlink()
    assert "has no tokenizer_3/tokenizer_config.json" in refusal("sd35", directory)


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("flux_dev", {"guidance_scale": 3.5}, ["is guidance-distilled: set guidance_scale null", "sampler.embedded_guidance"]),
        ("flux_schnell", {"embedded_guidance": 3.5}, ["is not told its guidance", "set it null"]),
        ("sd3", {"embedded_guidance": 3.5}, ["is not told its guidance", "set it null"]),
        ("sd3", {"scheduler": "DDIMScheduler"}, ["sampler.scheduler is DDIMScheduler", "sigmas and no betas", "set it null"]),
        ("flux_dev", {"image_size": 36}, ["image_size is 36; expected multiples of 8 pixels"]),
        ("sd3", {"image_size": (32, 64)}, ["positions for 48 pixels", "pictures of 64"]),
        ("flux_dev", {"max_sequence_length": 513}, ["max_sequence_length is 513; expected at most 512"]),
        ("sd3", {"eta": 0.5}, ["sampler.eta is 0.5", "has no eta"]),
    ],
)  # fmt: skip
def test_settings_that_a_model_does_not_have(directories, name: str, values: dict, words: list[str]) -> None:
    line = refusal(name, directories[name], **values)
    assert all(word in line for word in words), line


@pytest.mark.parametrize("setting", ["embedded_guidance", "image_size", "max_sequence_length"])
def test_a_unet_has_none_of_these_settings(setting: str) -> None:
    with pytest.raises(UserError, match=rf"sampler.{setting} is 64.*a StableDiffusionPipeline, does not have; set it null"):
        read_family("tiny").for_sampler(SamplerSettings(**{setting: 64}))
