"""SD 1, SD 2 and SDXL: the engine's conditioning, log-probs and images are those of the pipelines themselves."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from tiny_pipelines import FAMILIES, SAMPLE_SIZE, build

from prdp_fast.acceleration.choose import Denoisers, accelerate
from prdp_fast.acceleration.compile import uncompile
from prdp_fast.config.recipe import PerformanceSettings
from prdp_fast.core import hub
from prdp_fast.core.errors import UserError
from prdp_fast.core.records import Prompt, Trajectories
from prdp_fast.models.families import StableDiffusion, read_family
from prdp_fast.models.families.base import count_parameters
from prdp_fast.models.pipeline import Pipeline
from prdp_fast.models.text import TextEncoder
from prdp_fast.sampling.policy import Policy
from prdp_fast.sampling.rollout import rollout
from prdp_fast.sampling.transitions import Transitions
from prdp_fast.training.passes import gradient_pass, log_prob_pass

CPU = torch.device("cpu")
TEXTS = ["a red circle", "three big blue squares on a green background, and then more words than the tokenizer takes"]
PROMPTS = [Prompt(number, text, {}) for number, text in enumerate(TEXTS)]
STEPS, IMAGES, SCALE = 4, 2, 3.0
SIDE = 4 * SAMPLE_SIZE


@pytest.fixture(scope="module")
def directories(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pipelines")
    return {family: build(family, root / family) for family in FAMILIES}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def plain(family: str, directories: dict[str, Path]) -> DiffusionPipeline:
    """What diffusers itself loads, sampling as the engine does."""
    pipe = DiffusionPipeline.from_pretrained(directories[family], dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    return pipe


@pytest.fixture(scope="module")
def own(family: str, directories: dict[str, Path]) -> Pipeline:
    return Pipeline.load(str(directories[family]), CPU, torch.float32)


def sampled(own: Pipeline, scale: float | None = SCALE, interval: tuple[int, int] | None = None) -> tuple[Policy, Trajectories]:
    policy = Policy(Transitions.from_scheduler(own.scheduler, STEPS), scale, own.family.predict, guidance_interval=interval)
    embeddings = TextEncoder(own, torch.float32).encode(PROMPTS)
    trajectories = rollout(
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
    return policy, trajectories


def encoded(pipe: DiffusionPipeline, guided: bool = True) -> tuple[torch.Tensor, ...]:
    """(prompt, negative), of SDXL (prompt, negative, pooled, negative pooled), a row per image."""
    with torch.no_grad():
        return pipe.encode_prompt(TEXTS, device=CPU, num_images_per_prompt=IMAGES, do_classifier_free_guidance=guided)


def plain_output(pipe: DiffusionPipeline, x: torch.Tensor, t: torch.Tensor, guided: bool = True) -> torch.Tensor:
    """The model output of one step, as the pipelines compute it in their loops."""
    embeds = encoded(pipe, guided)
    rows = 2 if guided else 1
    told = {"encoder_hidden_states": torch.cat([embeds[1], embeds[0]]) if guided else embeds[0]}
    if len(embeds) == 4:
        told["added_cond_kwargs"] = {
            "text_embeds": torch.cat([embeds[3], embeds[2]]) if guided else embeds[2],
            "time_ids": torch.tensor([[SIDE, SIDE, 0, 0, SIDE, SIDE]], dtype=torch.float32).repeat(rows * len(x), 1),
        }
    with torch.no_grad():
        output = pipe.unet(torch.cat([x] * rows), t, **told, return_dict=False)[0]
    if not guided:
        return output
    uncond, cond = output.chunk(2)
    return uncond + SCALE * (cond - uncond)


def plain_log_probs(pipe: DiffusionPipeline, latents: torch.Tensor, guided: list[bool]) -> torch.Tensor:
    """(N, T): of each stored step, with mean and standard deviation from the scheduler's own `step`."""
    pipe.scheduler.set_timesteps(STEPS)
    columns = []
    for step, t in enumerate(pipe.scheduler.timesteps):
        x, following = latents[:, step], latents[:, step + 1]
        output = plain_output(pipe, x, t, guided[step])

        def taken(noise: torch.Tensor, x=x, t=t, output=output) -> torch.Tensor:
            return pipe.scheduler.step(output, t, x, eta=1.0, variance_noise=noise, return_dict=False)[0]

        mean = taken(torch.zeros_like(x))
        std = (taken(torch.ones_like(x)).double() - mean).mean()
        residual = (following.double() - mean) / std
        columns.append((-residual.square() / 2 - std.log() - math.log(2 * math.pi) / 2).mean((1, 2, 3)))
    return torch.stack(columns, 1)


def test_the_engine_tells_the_unet_what_the_pipeline_tells_it(
    own: Pipeline, plain: DiffusionPipeline, family: str, monkeypatch
) -> None:
    """Every tensor that a guided call of the pipeline hands to its U-Net."""
    calls = []
    forward = plain.unet.forward
    monkeypatch.setattr(plain.unet, "forward", lambda *args, **kwargs: calls.append(kwargs) or forward(*args, **kwargs))
    plain(TEXTS, num_inference_steps=1, guidance_scale=SCALE, output_type="latent")
    expected = calls[0]
    got = own.family.conditioning(TextEncoder(own, torch.float32).encode(PROMPTS), guided=True)
    pairs = [(got["encoder_hidden_states"], expected["encoder_hidden_states"])]
    assert ("added_cond_kwargs" in got) == (expected["added_cond_kwargs"] is not None) == (family == "sdxl")
    if family == "sdxl":
        assert got["added_cond_kwargs"].keys() == expected["added_cond_kwargs"].keys()
        pairs += [(got["added_cond_kwargs"][name], tensor) for name, tensor in expected["added_cond_kwargs"].items()]
    for tensor, other in pairs:
        torch.testing.assert_close(tensor, other, rtol=1e-5, atol=1e-6)
    assert got["encoder_hidden_states"][2:].std() > 0.1  # and the two prompts are told apart
    assert not torch.allclose(got["encoder_hidden_states"][2], got["encoder_hidden_states"][3])


@pytest.mark.parametrize("interval", [None, (300, 600)], ids=["guided", "guided in an interval"])
def test_log_probs_are_those_of_plain_diffusers(own: Pipeline, plain: DiffusionPipeline, interval) -> None:
    policy, trajectories = sampled(own, interval=interval)
    guided = policy.guided.tolist()
    assert any(guided) and all(guided) == (interval is None)
    expected = plain_log_probs(plain, trajectories.latents, guided)[:, policy.transitions.stochastic]
    assert expected.shape == trajectories.log_probs.shape
    # float32 rounding of mu times the residual over std (about 1 to 50), averaged over 256 numbers
    torch.testing.assert_close(trajectories.log_probs.double(), expected, rtol=0, atol=1e-5)
    again = log_prob_pass(policy, own.denoiser, trajectories, micro_batch=5)
    torch.testing.assert_close(again.double(), expected, rtol=0, atol=1e-5)


def test_log_probs_without_guidance(own: Pipeline, plain: DiffusionPipeline) -> None:
    policy, trajectories = sampled(own, scale=None)
    expected = plain_log_probs(plain, trajectories.latents, [False] * STEPS)[:, policy.transitions.stochastic]
    torch.testing.assert_close(trajectories.log_probs.double(), expected, rtol=0, atol=1e-5)


def test_images_are_those_of_the_pipelines_own_call(own: Pipeline, plain: DiffusionPipeline, monkeypatch) -> None:
    """Given x_T and the noise of every step."""
    policy, trajectories = sampled(own)
    table, latents = policy.transitions, trajectories.latents
    noises = []
    for step in range(STEPS):
        output = plain_output(plain, latents[:, step], table.timesteps[step])
        mean = table.sample_coef[step] * latents[:, step] + table.output_coef[step] * output
        noise = (latents[:, step + 1] - mean) / table.std[step]
        noises.append((noise if table.std[step] else torch.zeros_like(noise)).float())  # Euler's schedule ends without noise
    step = plain.scheduler.step
    pending = iter(noises)
    monkeypatch.setattr(
        plain.scheduler, "step", lambda m, t, x, eta, return_dict: step(m, t, x, eta=eta, variance_noise=next(pending))
    )
    expected = plain(
        TEXTS, num_images_per_prompt=IMAGES, num_inference_steps=STEPS, guidance_scale=SCALE, eta=1.0, latents=latents[:, 0],
        output_type="pt",
    ).images  # fmt: skip
    images = own.decode(latents[:, -1])
    assert images.shape == (len(TEXTS) * IMAGES, 3, SIDE, SIDE) and images.float().std() > 10
    assert (images.float() - 255 * expected).abs().max() <= 0.51  # one rounding to a byte
    assert next(pending, None) is None


def test_sdxl_with_an_encoded_empty_prompt(directories: dict[str, Path], tmp_path: Path) -> None:
    """`force_zeros_for_empty_prompt` decides what no prompt is."""
    zeros = TextEncoder(Pipeline.load(str(directories["sdxl"]), CPU, torch.float32), torch.float32).encode(PROMPTS)
    assert not zeros.negative_prompt_embeds.any() and not zeros.negative_pooled_prompt_embeds.any()
    directory = build("sdxl", tmp_path / "sdxl")
    index = json.loads((directory / "model_index.json").read_text())
    (directory / "model_index.json").write_text(json.dumps(index | {"force_zeros_for_empty_prompt": False}))
    encoder = TextEncoder(Pipeline.load(str(directory), CPU, torch.float32), torch.float32)
    encoded, empty = encoder.encode(PROMPTS), encoder.encode([Prompt(0, "", {})])
    assert torch.equal(encoded.negative_prompt_embeds, empty.prompt_embeds) and empty.prompt_embeds.any()
    assert torch.equal(encoded.negative_pooled_prompt_embeds, empty.pooled_prompt_embeds)
    encoder.pipeline.export(tmp_path / "export", encoder.pipeline.denoiser.state_dict())
    assert DiffusionPipeline.from_pretrained(tmp_path / "export").config.force_zeros_for_empty_prompt is False


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler"])
def test_the_sampler_can_be_chosen(own: Pipeline, family: str, directories: dict[str, Path], name: str, tmp_path: Path) -> None:
    """Whatever the model ships with: its noise schedule, the class that was asked for, and its export samples with that."""
    directory = str(directories[family])
    chosen = Pipeline.load(directory, CPU, torch.float32, name)
    assert type(chosen.scheduler).__name__ == name and read_family(directory).scheduler(name).config == chosen.scheduler.config
    assert torch.equal(chosen.scheduler.alphas_cumprod, own.scheduler.alphas_cumprod)
    default, table = (Transitions.from_scheduler(one.scheduler, 50) for one in (own, chosen))
    assert torch.equal(table.timesteps, default.timesteps)
    for column in ("sample_coef", "output_coef", "std"):
        torch.testing.assert_close(getattr(table, column)[:-1], getattr(default, column)[:-1], rtol=1e-5, atol=1e-7)
    assert len(table.stochastic) == (49 if name == "DDPMScheduler" else len(default.stochastic))
    chosen.export(tmp_path, chosen.denoiser.state_dict())
    assert type(DiffusionPipeline.from_pretrained(tmp_path).scheduler).__name__ == name


def test_the_vae_of_sdxl_stays_in_float32_beside_float16(directories: dict[str, Path]) -> None:
    for name, dtype in (("sdxl", torch.float32), ("sd1", torch.float16)):
        own = Pipeline.load(str(directories[name]), CPU, torch.float16)
        assert own.vae.dtype == dtype and own.whole.text_encoder.dtype == torch.float16 and own.denoiser.dtype == torch.float32
    assert Pipeline.load(str(directories["sdxl"]), CPU, torch.bfloat16).vae.dtype == torch.bfloat16  # has the range


def test_shapes_count_what_is_loaded(own: Pipeline, family: str, directories: dict[str, Path]) -> None:
    shapes = read_family(str(directories[family]))
    encoders = [own.whole.text_encoder] + ([own.whole.text_encoder_2] if family == "sdxl" else [])
    assert shapes.text_parameters == sum(count_parameters(encoder) for encoder in encoders)
    assert shapes.denoiser_parameters == count_parameters(own.denoiser) and shapes.vae_parameters == count_parameters(own.vae)
    assert shapes.latent_shape == own.latent_shape
    inputs, told = (
        shapes.denoiser_inputs(4, CPU),
        own.family.conditioning(TextEncoder(own, torch.float32).encode(PROMPTS), guided=True),
    )
    assert inputs["encoder_hidden_states"].shape == told["encoder_hidden_states"].shape
    for name, tensor in told.get("added_cond_kwargs", {}).items():
        assert inputs["added_cond_kwargs"][name].shape == tensor.shape


@pytest.mark.slow
def test_fast_paths_of_sdxl_compute_the_same(directories: dict[str, Path], monkeypatch) -> None:
    """Compiled and checkpointed, on what the policy hands over: the code compiled for the probe serves it as it is."""
    monkeypatch.setattr("prdp_fast.acceleration.compile.BACKEND", "aot_eager")
    torch._dynamo.reset()
    own = Pipeline.load(str(directories["sdxl"]), CPU, torch.float32)
    policy, trajectories = sampled(own)
    micro_batch = 4
    expected = log_prob_pass(policy, own.denoiser, trajectories, micro_batch)
    trained = own.denoiser.requires_grad_(True)
    shapes = read_family(str(directories["sdxl"]))
    speed = accelerate(
        Denoisers(trained, None, None), PerformanceSettings(compile="full", attention="sdpa"), shapes,
        train_rows=2 * micro_batch, sample_rows=2 * micro_batch, stage=2, device=CPU, dtype=torch.float32,
    )  # fmt: skip
    assert speed.decisions["compile trained"].value == speed.decisions["compile rollout"].value == "full"
    with torch._dynamo.config.patch(error_on_recompile=True):
        for denoiser in (trained, speed.sampling_view(trained)):
            again = log_prob_pass(policy, denoiser, trajectories, micro_batch)
            torch.testing.assert_close(again, expected, rtol=0, atol=1e-5)
    uncompile(trained)
    trained.train().enable_gradient_checkpointing()
    weights = torch.ones_like(expected)
    log_probs = gradient_pass(policy, trained, trajectories, weights, micro_batch, lambda loss, last: loss.backward())
    torch.testing.assert_close(log_probs, expected, rtol=0, atol=1e-5)
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in trained.add_embedding.parameters())


# What is no such model


def change(directory: Path, file: str, **values) -> None:
    path = directory / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def refusal(directory: Path | str) -> str:
    with pytest.raises(UserError) as caught:
        Pipeline.load(str(directory), CPU, torch.float32)
    assert "\n" not in str(caught.value) and repr(str(directory)) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "file", "values", "words"),
    [
        ("sd1", "model_index.json", {"_class_name": "KolorsPipeline"}, ["is a KolorsPipeline", "StableDiffusionXLPipeline"]),
        ("sd1", "model_index.json", {"text_encoder": [None, None]}, ["has no text_encoder", "save_pretrained"]),
        ("sdxl", "model_index.json", {"tokenizer_2": None}, ["has no tokenizer_2", "StableDiffusionXLPipeline needs"]),
        ("sd1", "unet/config.json", {"in_channels": 9}, ["U-Net of 9 input channels", "latents of 4"]),
        ("sd2", "model_index.json", {"unet": ["diffusers", "NoSuchModel"]}, ["NoSuchModel", "expected a UNet2DConditionModel"]),
        ("sd1", "model_index.json", {"vae": ["diffusers", "NoSuchModel"]}, ["vae is diffusers.NoSuchModel"]),
        ("sd1", "model_index.json", {"vae": ["os", "system"]}, ["vae is os.system; expected a network of diffusers"]),
        ("sd1", "model_index.json", {"vae": "AutoencoderKL"}, ['vae is "AutoencoderKL"; expected the library and the name']),
        ("sd1", "unet/config.json", {"sample_size": None}, ["sample_size is null; expected the side of its latents"]),
        ("sd1", "unet/config.json", {"act_fn": 5}, ["act_fn is 5; expected a text, as UNet2DConditionModel takes"]),
        ("sd1", "unet/config.json", {"cross_attention_dim": 24}, ["text encoders of width 16", "cross_attention_dim 24"]),
        ("sdxl", "text_encoder_2/config.json", {"projection_dim": 16}, ["projection_dim 16", "pooled embeddings of 24"]),
        ("sd1", "vae/config.json", {"scaling_factor": None}, ["scaling_factor is null; expected a number above 0"]),
        ("sd1", "tokenizer/tokenizer_config.json", {"model_max_length": "77"}, ['model_max_length is "77"; expected a number']),
        ("sdxl", "scheduler/scheduler_config.json", {"trained_betas": []}, ["trained_betas is []; expected a list of numbers"]),
        ("sdxl", "scheduler/scheduler_config.json", {"trained_betas": [0.1]}, ["has 1 trained_betas and num_train"]),
        ("sdxl", "scheduler/scheduler_config.json", {"beta_schedule": "odd"}, ["DDIMScheduler refuses", "odd"]),
    ],
)  # fmt: skip
def test_wrong_pipelines_are_refused(directories, tmp_path: Path, name: str, file: str, values: dict, words: list[str]) -> None:
    directory = build(name, tmp_path / name)
    change(directory, file, **values)
    line = refusal(directory)
    assert all(word in line for word in words), line


def test_missing_files_are_named(directories, tmp_path: Path) -> None:
    directory = build("sdxl", tmp_path / "sdxl")
    (directory / "text_encoder_2" / "model.safetensors").unlink()
    assert "has no weights of its text_encoder_2" in refusal(directory)
    assert read_family(str(directory)).text_parameters  # planned without weights
    (directory / "text_encoder_2" / "config.json").unlink()
    with pytest.raises(UserError, match=r"has no text_encoder_2/config.json; expected a"):
        read_family(str(directory))
    directory = build("sdxl", tmp_path / "another")
    (directory / "tokenizer_2" / "tokenizer_config.json").rename(tmp_path / "kept.json")
    assert "has no tokenizer_2/tokenizer_config.json; expected a" in refusal(directory)  # which says what it pads with
    (tmp_path / "kept.json").rename(directory / "tokenizer_2" / "tokenizer_config.json")
    (directory / "scheduler" / "scheduler_config.json").write_text("{")
    assert "scheduler/scheduler_config.json is no JSON" in refusal(directory)
    (directory / "model_index.json").unlink()
    assert "has no model_index.json; expected a" in refusal(directory)


def test_a_sampler_without_betas_is_refused(tmp_path: Path) -> None:
    directory = build("sd1", tmp_path / "sd1")
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
    (directory / "scheduler/scheduler_config.json").write_text(json.dumps(config))
    assert "FlowMatchEulerDiscreteScheduler, which has no betas" in refusal(directory)


def test_unets_with_other_inputs_are_refused(tmp_path: Path) -> None:
    own = Pipeline.load(str(build("sdxl", tmp_path / "sdxl")), CPU, torch.float32)
    unet, vae = own.denoiser.config, own.vae.config

    class Changed:
        def __init__(self, **values) -> None:
            self.values = values

        def __getattr__(self, name: str):
            return self.values.get(name, getattr(unet, name))

    own.family.check(unet, vae)
    sd = StableDiffusion({}, 77, pretrained="m")
    for family, values, words in (
        (own.family, {"in_channels": 9}, "9 input channels on latents of 4"),
        (own.family, {"time_cond_proj_dim": 256}, "distilled"),
        (sd, {}, "addition_embed_type 'text_time'; expected None"),
    ):
        with pytest.raises(UserError, match=words):
            family.check(Changed(**values), vae)


def test_the_hubs_refusals_name_the_way_out(monkeypatch) -> None:
    import httpx2
    from huggingface_hub import errors

    response = httpx2.Response(403, request=httpx2.Request("GET", "https://huggingface.co"))
    for error, words in (
        (errors.GatedRepoError("gated", response=response), ["is gated", "huggingface.co/some/model", "hf auth login"]),
        (errors.RepositoryNotFoundError("404", response=response), ["nor a model on the hub", "check the name", "hf auth login"]),
        (errors.RemoteEntryNotFoundError("404", response=response), ["has no model_index.json on the hub"]),
        (errors.LocalEntryNotFoundError("offline"), ["out of reach", "network"]),
        (errors.HfHubHTTPError("500", response=response), ["HfHubHTTPError", "hf auth login"]),
        (ConnectionError("no route"), ["ConnectionError", "network"]),
    ):

        def download(*_, error=error):
            raise error

        monkeypatch.setattr(hub, "hf_hub_download", download)
        line = refusal("some/model")
        assert all(word in line for word in words), line
        with pytest.raises(UserError):
            read_family("some/model")
    monkeypatch.undo()
    assert "neither a directory nor a hub id" in refusal("./not/here/")


@pytest.mark.parametrize(
    ("side", "batches"),
    [(8, [32, 8]), (64, [16, 16, 8]), (96, [7, 7, 7, 7, 7, 5]), (128, [4] * 10), (512, [1] * 40)],
)
def test_large_pictures_are_decoded_a_few_at_a_time(side: int, batches: list[int]) -> None:
    class Vae:
        dtype, config, seen = torch.float32, SimpleNamespace(scaling_factor=1.0), []

        def decode(self, latents: torch.Tensor, return_dict: bool) -> tuple[torch.Tensor]:
            self.seen.append(len(latents))
            return (torch.zeros(len(latents), 3, 2, 2),)

    own = Pipeline(family=StableDiffusion({}, 77), denoiser=None, vae=Vae(), scheduler=None, whole=None)
    assert own.decode(torch.zeros(40, 1, 1, 1).expand(40, 4, side, side)).shape == (40, 3, 2, 2)
    assert own.vae.seen == batches
