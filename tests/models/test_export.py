"""What a run leaves for others: an adapter that diffusers opens, and the way to the hub. Its card: tests/reporting."""

from __future__ import annotations

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
    assert sorted(path.name for path in tmp_path.iterdir()) == [lora.WEIGHTS, "scheduler"]
    saved = load_file(tmp_path / lora.WEIGHTS)
    assert len(saved) == len(state) and all(name.startswith("unet.") for name in saved)
    assert {value.dtype for value in saved.values()} == {torch.float32}

    fresh = DiffusionPipeline.from_pretrained(directories[family], dtype=torch.float32)
    fresh.load_lora_weights(tmp_path)
    opened = call(fresh.unet, shapes)
    torch.testing.assert_close(opened, expected, rtol=1e-6, atol=1e-6)
    assert (opened - base).abs().max() > 1e-3
    fresh.unload_lora_weights()
    assert torch.equal(call(fresh.unet, shapes), base)


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
