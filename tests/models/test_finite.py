"""Weights and pictures that are NaN or infinite: found where they are loaded and decoded, and named."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_pipelines import build
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from prdp_fast.core.errors import UserError
from prdp_fast.core.records import Prompt, TextEmbeddings
from prdp_fast.models.finite import first_nonfinite
from prdp_fast.models.pipeline import Pipeline
from prdp_fast.models.text import TextEncoder

CPU = torch.device("cpu")


class Waits(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


def networks() -> dict[str, nn.Module]:
    return {
        "unet": nn.Sequential(*(nn.Linear(3, 3) for _ in range(20))),
        "vae": nn.BatchNorm2d(4).half(),  # has a buffer of whole numbers
        "empty": nn.Identity(),
    }


def test_finite_weights_are_one_wait_for_each_dtype() -> None:
    given = networks()
    with Waits() as few:
        assert first_nonfinite(given) is None
    given["unet"].extend(nn.Linear(3, 3) for _ in range(50))
    with Waits() as many:
        assert first_nonfinite(given) is None
    assert many.count == few.count <= 2


@pytest.mark.parametrize(
    ("network", "name", "value", "expected"),
    [
        ("unet", "7.bias", math.nan, "unet.7.bias (torch.float32) holds NaN"),
        ("unet", "19.weight", -math.inf, "unet.19.weight (torch.float32) holds infinity"),
        ("vae", "running_var", math.inf, "vae.running_var (torch.float16) holds infinity"),
    ],
)
def test_the_first_bad_weight_is_named(network: str, name: str, value: float, expected: str) -> None:
    given = networks()
    given[network].state_dict()[name].flatten()[-1:] = value
    assert first_nonfinite(given) == expected


def test_numbers_near_the_end_of_the_range_are_finite() -> None:
    assert first_nonfinite({"a": nn.Linear(4, 4).half().requires_grad_(False).apply(lambda m: m.weight.fill_(65504.0))}) is None


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return build("sd1", tmp_path_factory.mktemp("model") / "sd1")


WEIGHTS = {
    "unet": ("unet/diffusion_pytorch_model.safetensors", "conv_out.bias"),
    "vae": ("vae/diffusion_pytorch_model.safetensors", "decoder.conv_out.bias"),
    "text_encoder": ("text_encoder/model.safetensors", "final_layer_norm.bias"),
}


@pytest.mark.parametrize("component", list(WEIGHTS))
def test_a_checkpoint_with_nan_is_refused_by_the_name_of_the_tensor(directory: Path, component: str) -> None:
    file, suffix = WEIGHTS[component]
    kept = (directory / file).read_bytes()
    tensors = load_file(directory / file)
    name = next(key for key in tensors if key.endswith(suffix))
    tensors[name].flatten()[0] = math.nan
    save_file(tensors, directory / file, {"format": "pt"})
    try:
        with pytest.raises(UserError, match=rf"{component}\.\S*{suffix} \(torch.float32\) holds NaN; expected finite.*fetch"):
            Pipeline.load(str(directory), CPU, torch.float32)
    finally:
        (directory / file).write_bytes(kept)


def test_a_weight_that_float16_cannot_hold(directory: Path) -> None:
    file = directory / WEIGHTS["vae"][0]
    kept = file.read_bytes()
    tensors = load_file(file)
    tensors["decoder.conv_out.bias"][0] = 1e5
    save_file(tensors, file, {"format": "pt"})
    try:
        Pipeline.load(str(directory), CPU, torch.float32)
        Pipeline.load(str(directory), CPU, torch.bfloat16)
        with pytest.raises(UserError, match=r"vae\S* \(torch.float16\) holds infinity.*--config with bf16"):
            Pipeline.load(str(directory), CPU, torch.float16)
    finally:
        file.write_bytes(kept)


@pytest.fixture
def pipeline(directory: Path) -> Pipeline:
    return Pipeline.load(str(directory), CPU, torch.float32)


def test_pictures_that_are_not_finite_are_told_from_black_ones(pipeline: Pipeline) -> None:
    latents = torch.randn(5, *pipeline.latent_shape, generator=torch.Generator().manual_seed(0))
    whole, shown = pipeline.decode_checked(latents)
    assert shown.tolist() == [True] * 5 and torch.equal(pipeline.decode(latents), whole)
    latents[3, 0, 0, 0] = math.nan
    images, shown = pipeline.decode_checked(latents, batch=2)
    assert shown.tolist() == [True, True, True, False, True] and (images[3] == 0).any()


def test_decoding_goes_on_with_fewer_at_once(pipeline: Pipeline, monkeypatch) -> None:
    latents = torch.randn(7, *pipeline.latent_shape, generator=torch.Generator().manual_seed(0))
    expected, plain, widths, said = pipeline.decode(latents), pipeline.vae.decode, [], []

    def small(scaled: torch.Tensor, **options):
        widths.append(len(scaled))
        if len(scaled) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(scaled, **options)

    monkeypatch.setattr(pipeline.vae, "decode", small)
    images, _ = pipeline.decode_checked(latents, say=said.append)
    assert widths == [7, 3, 1, 1, 1, 1, 1, 1, 1] and len(said) == 2 and pipeline.decoded == 1
    assert int((images.int() - expected.int()).abs().max()) <= 1
    widths.clear()
    pipeline.decode_checked(latents, say=said.append)
    assert widths == [1] * 7 and len(said) == 2, "the size that fits is remembered"


def test_why_latents_are_not_finite(pipeline: Pipeline) -> None:
    encoded = TextEncoder(pipeline, torch.float32).encode([Prompt(0, "a cat", {})])

    def why(embeddings: TextEmbeddings = encoded, **options: bool) -> str:
        return pipeline.explain(pipeline.denoiser, embeddings, **({"latents": True} | options))

    assert "every weight of the unet is finite" in why() and "range of torch.float32" in why()
    assert "every weight of the vae is finite" in why(latents=False)
    spoilt = encoded._replace(prompt_embeds=encoded.prompt_embeds.half() * math.nan)
    assert "the text embeddings are not finite in torch.float16: use a --config with bf16" in why(spoilt)
    pipeline.denoiser.half()
    assert "left the range of torch.float16: use a --config with bf16" in why()
    pipeline.denoiser.conv_out.bias.data[1] = math.inf
    assert why() == "unet.conv_out.bias (torch.float16) holds infinity: fetch the model again"
    assert "lower optimizer.learning_rate" in why(trained=True)
