"""What a run leaves for others: a pipeline or an adapter that every loader opens. Its card: tests/reporting."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from tiny_pipelines import FAMILIES, build

from prdp_fast.config.load import load_recipe
from prdp_fast.config.recipe import LoraSettings
from prdp_fast.core import hub as core_hub
from prdp_fast.core.errors import UserError
from prdp_fast.core.run_directory import first_difference
from prdp_fast.models import lora
from prdp_fast.models.families import Family, read_family
from prdp_fast.models.pipeline import Pipeline
from prdp_fast.training.results import push

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def directories(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pipelines")
    return {family: build(family, root / family) for family in FAMILIES}


def call(denoiser: torch.nn.Module, shapes: Family) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)

    def fill(value):
        if isinstance(value, dict):
            return {key: fill(inner) for key, inner in value.items()}
        return torch.randn(value.shape, generator=generator) if isinstance(value, torch.Tensor) else value

    inputs = fill(shapes.denoiser_inputs(2, "cpu")) | {"timestep": torch.tensor([3, 600])}
    with torch.no_grad():
        return denoiser(**inputs)[0]


# A rank and an alpha that differ, and a convolution (sd1) or linear layer (the others) beside the projections.
ADAPTERS = [LoraSettings(rank=2), LoraSettings(rank=3, alpha=7.0, targets=["to_q", "to_out.0", "proj_in", "conv1"])]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("settings", ADAPTERS, ids=["default", "alpha and convolutions"])
def test_an_adapter_opens_in_a_pipeline_of_its_own(
    family: str, settings: LoraSettings, directories: dict[str, Path], tmp_path: Path
) -> None:
    shapes = read_family(str(directories[family]), settings)
    pipeline = Pipeline.load(shapes, CPU, torch.float32)
    base = call(pipeline.denoiser, shapes)
    lora.add_adapter(pipeline.denoiser, settings, 0)
    with torch.no_grad():
        for name, parameter in pipeline.denoiser.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(len(name)))
    state = {name: value.detach().clone() for name, value in pipeline.denoiser.named_parameters() if value.requires_grad}
    expected = call(pipeline.denoiser, shapes)
    pipeline.export(tmp_path, state)
    assert {path.name for path in tmp_path.iterdir()} == {lora.WEIGHTS, lora.PEFT, lora.PEFT_CONFIG, lora.KOHYA, "scheduler"}
    saved = load_file(tmp_path / lora.WEIGHTS)
    assert len(saved) == len(state) and all(name.startswith("unet.") for name in saved)
    assert {value.dtype for value in saved.values()} == {torch.float32}

    fresh = DiffusionPipeline.from_pretrained(directories[family], dtype=torch.float32)
    fresh.load_lora_weights(tmp_path)
    opened = call(fresh.unet, shapes)
    torch.testing.assert_close(opened, expected, rtol=1e-5, atol=1e-5)
    assert (opened - base).abs().max() > 1e-3
    fresh.unload_lora_weights()
    assert torch.equal(call(fresh.unet, shapes), base)


COMFY = """
def apply(unet, tensors, layer_of):  # as ComfyUI reads a LoRA: alpha / rank if there is an alpha, else 1
    for key in tensors:
        for down, up in (("lora_A", "lora_B"), ("lora_down", "lora_up")):
            if key.endswith(f".{down}.weight"):
                name = key.removesuffix(f".{down}.weight")
                a, b = tensors[key].float(), tensors[f"{name}.{up}.weight"].float()
                alpha = tensors.get(f"{name}.alpha")
                scale = 1.0 if alpha is None else float(alpha) / len(a)
                weight = unet.get_submodule(layer_of(name)).weight
                weight.data += scale * (b.flatten(1) @ a.flatten(1)).reshape(weight.shape)
"""

LOADERS = (
    COMFY
    + """
import sys, torch
from diffusers import DiffusionPipeline
from peft import PeftModel
from safetensors.torch import load_file

base, adapter, inputs, result = sys.argv[1:]
inputs = torch.load(inputs, weights_only=True)

def pipeline():
    return DiffusionPipeline.from_pretrained(base, dtype=torch.float32)

def call(unet):
    with torch.no_grad():
        return unet(**inputs)[0]

found = {}
pipe = pipeline()
pipe.load_lora_weights(adapter)
found["diffusers"] = call(pipe.unet)
found["peft"] = call(PeftModel.from_pretrained(pipeline().unet, adapter))
unet = pipeline().unet
apply(unet, load_file(f"{adapter}/pytorch_lora_weights.safetensors"), lambda name: name.removeprefix("unet."))
found["diffusers' layout in ComfyUI"] = call(unet)
unet = pipeline().unet
names = {"lora_unet_" + name.replace(".", "_"): name for name, _ in unet.named_modules()}
apply(unet, load_file(f"{adapter}/kohya.safetensors"), names.get)
found["kohya's layout in ComfyUI"] = call(unet)
pipe = pipeline()
pipe.load_lora_weights(adapter, weight_name="kohya.safetensors")
found["kohya's layout in diffusers"] = call(pipe.unet)
assert not any(name.startswith("prdp") for name in sys.modules)
torch.save(found, result)
"""
)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_every_loader_scales_an_adapter_alike(family: str, directories: dict[str, Path], tmp_path: Path) -> None:
    """alpha 7 at rank 3, in a fresh process: with the wrong scale the output is far from it."""
    settings = LoraSettings(rank=3, alpha=7.0)
    shapes = read_family(str(directories[family]), settings)
    pipeline = Pipeline.load(shapes, CPU, torch.float32)
    base = call(pipeline.denoiser, shapes)
    lora.add_adapter(pipeline.denoiser, settings, 0)
    with torch.no_grad():
        for name, parameter in pipeline.denoiser.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(len(name)))
    state = {name: value for name, value in pipeline.denoiser.named_parameters() if value.requires_grad}
    pipeline.export(tmp_path / "adapter", state)
    expected = call(pipeline.denoiser, shapes)
    generator = torch.Generator().manual_seed(0)

    def fill(value):
        if isinstance(value, dict):
            return {key: fill(inner) for key, inner in value.items()}
        return torch.randn(value.shape, generator=generator) if isinstance(value, torch.Tensor) else value

    inputs = fill(shapes.denoiser_inputs(2, "cpu")) | {"timestep": torch.tensor([3, 600])}
    torch.save(inputs, tmp_path / "inputs.pt")
    words = [str(path) for path in (directories[family], tmp_path / "adapter", tmp_path / "inputs.pt", tmp_path / "found.pt")]
    subprocess.run([sys.executable, "-c", LOADERS, *words], check=True, timeout=200, env={**os.environ, "PYTHONPATH": ""})
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    assert len(found) == 5
    for loader, output in found.items():
        assert (output - expected).norm() < 1e-4 * (expected - base).norm(), loader
    assert (expected - base).abs().max() > 1e-2
    assert json.loads((tmp_path / "adapter" / lora.PEFT_CONFIG).read_text())["base_model_name_or_path"] == family


@pytest.mark.slow
def test_equal_adapters_are_equal_files(tmp_path: Path) -> None:
    """whatever the order of Python's sets, which is chance in every process."""
    script = (
        "import sys, torch\nfrom pathlib import Path\nsys.path[:0] = sys.argv[2:]\nfrom small_model import small_unet\n"
        "from prdp_fast.config.recipe import LoraSettings\nfrom prdp_fast.models import lora\n"
        "unet = small_unet()\nlora.add_adapter(unet, LoraSettings(rank=2, alpha=3), 0)\n"
        "state = {name: value for name, value in unet.named_parameters() if value.requires_grad}\n"
        "lora.export_adapter(Path(sys.argv[1]), 'unet', unet, state, 'owner/base')\n"
    )
    tests = Path(__file__).resolve().parent.parent
    for seed in ("1", "2"):
        words = [str(tmp_path / seed), str(tests.parent), str(tests.parent / "kernels"), str(tests)]
        subprocess.run([sys.executable, "-c", script, *words], check=True, timeout=200, env=os.environ | {"PYTHONHASHSEED": seed})
    names = sorted(path.name for path in (tmp_path / "1").iterdir())
    assert names == sorted([lora.WEIGHTS, lora.PEFT, lora.PEFT_CONFIG, lora.KOHYA])
    for name in names:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes(), name


# Whole pipelines


def networks(directory: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {path.parent.name: load_file(path) for path in directory.glob("*/*.safetensors")}


def paint(directory: Path, **options) -> torch.Tensor:
    """By the card's own lines."""
    pipe = DiffusionPipeline.from_pretrained(directory, **options)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe("a red circle", num_inference_steps=2, guidance_scale=2.0, output_type="pt", generator=generator).images


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_in_16_bits_exports_what_it_loaded(
    family: str, dtype: torch.dtype, directories: dict[str, Path], tmp_path: Path
) -> None:
    """to the bit, in float32: the VAE and the text encoders that it used are rounded. Any one dtype opens it."""
    pipeline = Pipeline.load(str(directories[family]), CPU, dtype)
    assert pipeline.whole.text_encoder.dtype == dtype
    state = {name: value + 1e-3 for name, value in pipeline.denoiser.state_dict().items()}
    assert pipeline.export(tmp_path, state) == []
    before, after = networks(directories[family]), networks(tmp_path)
    assert before.keys() == after.keys() and len(before) == (4 if family == "sdxl" else 3)
    for name, tensors in after.items():
        expected = state if name == "unet" else before[name]
        assert tensors.keys() == expected.keys()
        assert all(value.dtype == torch.float32 and torch.equal(value, expected[key]) for key, value in tensors.items())
    assert pipeline.whole.text_encoder.dtype == dtype, "what is in use stays as it is"
    exact = paint(tmp_path)
    assert torch.equal(paint(tmp_path, dtype=torch.float32), exact)
    for other in (torch.float16, torch.bfloat16):
        assert paint(tmp_path, dtype=other).shape == exact.shape


def test_a_base_in_half_precision_is_exported_as_its_own_values(directories: dict[str, Path], tmp_path: Path) -> None:
    base = tmp_path / "base"
    DiffusionPipeline.from_pretrained(directories["sd1"], dtype=torch.float16).save_pretrained(base, variant="fp16")
    pipeline = Pipeline.load(str(base), CPU, torch.bfloat16)
    assert pipeline.export(tmp_path / "export", pipeline.denoiser.state_dict()) == []
    before, after = networks(base), networks(tmp_path / "export")
    for name, tensors in after.items():
        assert all(
            value.dtype == torch.float32 and torch.equal(value, before[name][key].float()) for key, value in tensors.items()
        )
    assert paint(tmp_path / "export").isfinite().all()


@pytest.mark.parametrize("gone", [True, False], ids=["gone", "exchanged"])
def test_where_the_base_is_another_by_then_the_weights_in_use_are_exported(gone: bool, tmp_path: Path) -> None:
    base = build("sd1", tmp_path / "base")
    pipeline = Pipeline.load(str(base), CPU, torch.bfloat16)
    if gone:
        shutil.rmtree(base)
    else:
        build("sd1", base, seed=1)
    notes = pipeline.export(tmp_path / "export", pipeline.denoiser.state_dict())
    assert len(notes) == 2 and all(
        note.startswith("warning: the exported ") and "is rounded to torch.bfloat16" in note for note in notes
    )
    for name in ("vae", "text_encoder"):
        used = getattr(pipeline.whole, name).state_dict()
        saved = networks(tmp_path / "export")[name]
        assert all(torch.equal(value, used[key].float()) for key, value in saved.items())
    assert paint(tmp_path / "export").isfinite().all()


# The hub


class FakeHub:
    """Stands for HfApi: remembers what it is asked, and fails at what it is told to."""

    calls: list[tuple]
    fails: Exception | None = None

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
        type(self).calls.append(("create", repo_id, private, exist_ok))

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> str:
        if self.fails is not None:
            raise self.fails
        names = sorted(path.relative_to(folder_path).as_posix() for path in folder_path.rglob("*") if path.is_file())
        type(self).calls.append(("upload", repo_id, names))
        return f"https://hub/{repo_id}"


@pytest.fixture
def hub(monkeypatch) -> type[FakeHub]:
    fake = type("Fake", (FakeHub,), {"calls": []})
    monkeypatch.setattr(core_hub, "HfApi", fake)
    return fake


def test_a_push_uploads_the_directory_to_a_private_repository(hub: type[FakeHub], tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    for name in ("README.md", "unet/config.json"):
        (tmp_path / name).write_text("x")
    assert push(tmp_path, "me/tuned") == "pushed to https://hub/me/tuned"
    assert hub.calls == [("create", "me/tuned", True, True), ("upload", "me/tuned", ["README.md", "unet/config.json"])]


@pytest.mark.parametrize("error", [OSError("disk"), RuntimeError("401\nUnauthorized"), ConnectionError()])
def test_a_push_that_fails_is_one_line_with_the_command(hub: type[FakeHub], tmp_path: Path, error: Exception) -> None:
    hub.fails = error
    line = push(tmp_path, "me/tuned")
    assert line.startswith("warning: ") and "\n" not in line
    assert line.endswith(f"by hand: hf upload me/tuned {tmp_path}")
    assert " ".join(str(error).split()) in line


def test_without_a_network_the_real_client_fails_into_that_line(tmp_path: Path) -> None:
    """HF_HUB_OFFLINE, which every test runs under."""
    assert push(tmp_path, "me/tuned").startswith("warning: model.push_to_hub me/tuned failed (")


@pytest.mark.parametrize("name", ["tuned", "a/b/c", "me/", "/x", "me/tu ned", "../x"])
def test_what_is_no_hub_id_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"model\.push_to_hub: .* is no hub id; expected owner/name"):
        load_recipe("smoke", [f"model.push_to_hub='{name}'"])


def test_a_resumed_run_may_be_pushed_elsewhere() -> None:
    jobs = [{"recipe": load_recipe("smoke", more).model_dump(mode="json")} for more in ([], ["model.push_to_hub=me/tuned"])]
    assert first_difference(*jobs) is None
