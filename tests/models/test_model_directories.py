"""What people give as model.pretrained: other layouts of the same model, and what is no model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from mutations import POINTER, painted
from safetensors.torch import load_file, save_file
from tiny_pipelines import build

from prdp_fast.core.errors import UserError
from prdp_fast.models.configs import check_arguments
from prdp_fast.models.families import read_family
from prdp_fast.models.files import adapter_base
from prdp_fast.models.pipeline import Pipeline
from prdp_fast.models.weights import find_weights

CPU = torch.device("cpu")
NETWORKS = ("unet", "vae", "text_encoder")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return build("sd1", tmp_path_factory.mktemp("models") / "sd1")


@pytest.fixture(scope="module")
def expected(model: Path) -> torch.Tensor:
    return painted(model)


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "copy"))


def refusal(directory: Path | str) -> str:
    with pytest.raises(UserError) as caught:
        read_family(str(directory))
    assert "\n" not in str(caught.value) and repr(str(directory)) in str(caught.value)
    return str(caught.value)


def change(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def weights(directory: Path, network: str) -> Path:
    (path,) = (directory / network).glob("*.safetensors")
    return path


# The same model in other files.


def test_a_variant_alone_is_loaded_and_said(copy: Path, expected: torch.Tensor) -> None:
    for network in ("unet", "text_encoder"):
        path = weights(copy, network)
        path.rename(path.with_name(f"{path.stem}.fp16.safetensors"))
    (copy / "unet" / "LICENSE").write_text("a name without a suffix")
    assert torch.equal(painted(copy), expected)
    (note,) = read_family(str(copy)).notes
    assert "nothing but a variant of the weights of unet (fp16), text_encoder (fp16)" in note


def test_beside_the_plain_file_a_variant_is_not_loaded(copy: Path, expected: torch.Tensor) -> None:
    for network in NETWORKS:
        path = weights(copy, network)
        save_file(
            {name: torch.zeros_like(value) for name, value in load_file(path).items()},
            path.with_name(f"{path.stem}.fp16.safetensors"),
        )
    assert torch.equal(painted(copy), expected) and read_family(str(copy)).notes == ()


def test_a_pointer_that_is_not_read_is_in_nobodys_way(copy: Path, expected: torch.Tensor) -> None:
    """git clone without lfs, and git lfs pull of the safetensors alone."""
    (copy / "unet" / "diffusion_pytorch_model.bin").write_bytes(POINTER)
    (copy / "text_encoder" / "pytorch_model.bin").write_bytes(POINTER)
    (copy / "vae" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(POINTER)
    assert torch.equal(painted(copy), expected)


@pytest.mark.parametrize("suffix", [".bin", ".fp16.bin"])
def test_torchs_own_files(copy: Path, expected: torch.Tensor, suffix: str) -> None:
    for network in NETWORKS:
        path = weights(copy, network)
        stem = "pytorch_model" if network == "text_encoder" else path.stem
        torch.save(load_file(path), path.with_name(stem + suffix))
        path.unlink()
    assert torch.equal(painted(copy), expected)
    path.with_name(stem + suffix).write_bytes(POINTER)
    assert f"{stem}{suffix} is a git-lfs pointer of {len(POINTER)} bytes; run git lfs pull" in refusal(copy)


def split(path: Path) -> Path:
    """Over two files, with their index."""
    tensors = load_file(path)
    halves = [dict(list(tensors.items())[part::2]) for part in (0, 1)]
    names = [f"{path.stem}-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for name, half in zip(names, halves, strict=True):
        save_file(half, path.with_name(name), {"format": "pt"})
    index = path.with_name(f"{path.name}.index.json")
    weight_map = {key: name for name, half in zip(names, halves, strict=True) for key in half}
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    path.unlink()
    return index


def test_weights_split_over_files(copy: Path, expected: torch.Tensor) -> None:
    indexes = [split(weights(copy, network)) for network in ("unet", "text_encoder")]
    assert torch.equal(painted(copy), expected)
    for index in indexes:
        part = sorted(index.parent.glob("*00002-of*"))[0]
        whole = part.read_bytes()
        part.write_bytes(whole[:-3])
        assert f"{part} is cut off: {len(whole) - 3:,} bytes of {len(whole):,}" in refusal(copy)
        part.unlink()
        assert f"{part} is missing, of which {index.name} speaks" in refusal(copy)
        part.write_bytes(whole)
        for content in ("[]", "{", '{"weight_map": 3}', '{"weight_map": null}'):
            text = index.read_text()
            index.write_text(content)
            assert f"{index} is no index of weights" in refusal(copy)
            index.write_text(text)


def test_vaes_of_older_diffusers(copy: Path, expected: torch.Tensor) -> None:
    """Whose attention had other names, as that of SD 1.5 on the hub."""
    path, tensors = weights(copy, "vae"), {}
    for name, value in load_file(path).items():
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            name = name.replace(f"attentions.0.{new}", f"attentions.0.{old}")
        tensors[name] = value
    assert tensors.keys() != load_file(path).keys()
    save_file(tensors, path, {"format": "pt"})
    assert torch.equal(painted(copy), expected)


def test_heads_and_tables_that_are_left_over_do_no_harm(copy: Path, expected: torch.Tensor) -> None:
    path = weights(copy, "text_encoder")
    more = {"text_projection.weight": torch.zeros(16, 16), "text_model.embeddings.position_ids": torch.arange(20)[None]}
    save_file(load_file(path) | more, path, {"format": "pt"})
    assert torch.equal(painted(copy), expected)


def test_layers_that_are_left_over_are_of_another_model(copy: Path) -> None:
    path = weights(copy, "vae")
    save_file(load_file(path) | {"decoder.up_blocks.3.resnets.0.conv1.weight": torch.zeros(1)}, path, {"format": "pt"})
    with pytest.raises(UserError, match=r"has further layers, decoder\.up_blocks\.3\.resnets.*config\.json describes"):
        Pipeline.load(str(copy), CPU, torch.float32)


def test_a_text_encoder_that_is_cut_short_is_said(copy: Path, expected: torch.Tensor) -> None:
    """Clip skip, by num_hidden_layers."""
    change(copy / "text_encoder/config.json", num_hidden_layers=1)
    (note,) = read_family(str(copy)).notes
    assert "text_encoder uses 1 of the 2 layers in its files" in note
    assert not torch.equal(painted(copy), expected)
    change(copy / "text_encoder/config.json", num_hidden_layers=0)
    assert "num_hidden_layers is 0; expected a whole number from 1" in refusal(copy)


# Tokenizers


@pytest.mark.parametrize("length", [None, "absent", int(1e30), 248])
def test_prompts_are_cut_where_the_text_encoder_ends(copy: Path, expected: torch.Tensor, length, tmp_path: Path) -> None:
    path = copy / "tokenizer/tokenizer_config.json"
    values = json.loads(path.read_text())
    del values["model_max_length"], values["max_length"]
    path.write_text(json.dumps(values | ({} if length == "absent" else {"model_max_length": length})))
    assert torch.equal(painted(copy), expected)
    (note,) = read_family(str(copy)).notes
    has = "has model_max_length 248" if length == 248 else "has no model_max_length"
    assert f"tokenizer {has}; its prompts are cut at the 20 tokens of text_encoder" in note
    pipeline = Pipeline.load(str(copy), CPU, torch.float32)
    pipeline.export(tmp_path / "export", pipeline.denoiser.state_dict())
    assert read_family(str(tmp_path / "export")).notes == (), "the export has a length"


def test_a_shorter_tokenizer_is_left_as_it_is(copy: Path) -> None:
    change(copy / "tokenizer/tokenizer_config.json", model_max_length=9)
    pipeline = Pipeline.load(str(copy), CPU, torch.float32)
    assert pipeline.family.notes == () and pipeline.whole.tokenizer.model_max_length == 9


def test_a_tokenizer_of_another_model(copy: Path) -> None:
    content = json.loads((copy / "tokenizer/tokenizer.json").read_text())
    content["model"]["vocab"] |= {f"word{number}</w>": 10_000 + number for number in range(200)}
    (copy / "tokenizer/tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"tokenizer knows \d+ words and its text encoder 150"):
        Pipeline.load(str(copy), CPU, torch.float32)
    (copy / "tokenizer/tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"has no words; expected tokenizer.json|did not load as"):
        Pipeline.load(str(copy), CPU, torch.float32)


# What is no model.


def test_a_single_file_is_told_how_to_become_a_directory(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "v1-5.safetensors"
    shutil.copy(weights(model, "unet"), path)
    line = refusal(path)
    assert "is a single checkpoint file" in line and f"from_single_file({str(path)!r}).save_pretrained(" in line
    folder = tmp_path / "folder"
    folder.mkdir()
    shutil.copy(path, folder / "v1-5.safetensors")
    assert "has no model_index.json, but v1-5.safetensors, which is a single checkpoint file" in refusal(folder)
    path.write_bytes(POINTER)
    assert "is a git-lfs pointer" in refusal(path)
    (tmp_path / "model.yaml").write_text("a: 1")
    assert "is a file; expected a diffusers pipeline directory" in refusal(tmp_path / "model.yaml")


def test_an_adapter_names_its_base(tmp_path: Path) -> None:
    adapter = tmp_path / "run" / "model"
    adapter.mkdir(parents=True)
    (adapter / "pytorch_lora_weights.safetensors").write_bytes(b"x")
    assert "is a LoRA adapter, not a model, and names no base: give the model that it was trained on" in refusal(adapter)
    (adapter / "README.md").write_text("---\nbase_model: owner/by-card\n---\n")
    assert "was trained on 'owner/by-card': give that as model.pretrained" in refusal(adapter)
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "owner/by-peft"}))
    assert "'owner/by-peft'" in refusal(adapter)
    (tmp_path / "run" / "run.json").write_text(json.dumps({"recipe": {"model": {"pretrained": "owner/by-run"}}}))
    assert "'owner/by-run'" in refusal(adapter)
    for content in ("[]", "{", "null", '{"recipe": null}'):
        (tmp_path / "run" / "run.json").write_text(content)
        (adapter / "adapter_config.json").write_text(content)
        assert adapter_base(adapter) == "owner/by-card"


def test_runs_and_components(copy: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text("{}")
    assert "is a run directory without an exported pipeline" in refusal(run)
    shutil.copytree(copy, run / "model")
    assert f"is a run directory; give the model that it made, {str(run / 'model')!r}" in refusal(run)
    assert f"is one component of a pipeline; give the whole, {str(copy)!r}" in refusal(copy / "unet")
    (tmp_path / "empty").mkdir()
    assert "has no model_index.json; expected a diffusers pipeline directory" in refusal(tmp_path / "empty")


def test_weights_in_integers_are_refused(copy: Path) -> None:
    path = weights(copy, "vae")
    save_file({name: value.to(torch.int8) for name, value in load_file(path).items()}, path)
    assert "holds quantised weights" in refusal(copy) and str(path) in refusal(copy)


def test_what_a_constructor_takes() -> None:
    """Published configurations differ from annotations where nothing is wrong with them."""

    class Network:
        def __init__(
            self, a: int | tuple[int] = 1, b: float = 1.0, c: bool = False, d: str | None = None, e: float = True, f=None,
            g: tuple[tuple[int, ...], ...] | None = None,
        ) -> None: ...  # fmt: skip

    for right in (
        {"a": 2}, {"a": [2, 3]}, {"b": 2}, {"c": None}, {"d": None}, {"e": False}, {"f": {}}, {"g": [[1], [2, 3]]}, {"other": {}},
    ):  # fmt: skip
        check_arguments("m", "config.json", right, Network)
    for wrong in (
        {"a": "2"},
        {"a": [2, "x"]},
        {"a": 2.5},
        {"b": "x"},
        {"b": True},
        {"c": 1},
        {"d": 3},
        {"a": True},
        {"b": [1.0]},
    ):
        with pytest.raises(UserError, match=r"'m': config\.json: . is .*as Network takes; correct it there"):
            check_arguments("m", "config.json", wrong, Network)


def test_no_weights_at_all(tmp_path: Path) -> None:
    assert find_weights(tmp_path) is None and find_weights(tmp_path / "missing") is None
