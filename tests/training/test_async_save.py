"""A checkpoint that is written while training goes on is the one that was copied, byte for byte."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from small_model import SHAPE, WIDTH, small_unet
from torch import nn

from prdp_fast.config.deepspeed import resolve_config
from prdp_fast.config.load import CONFIGS, load_recipe
from prdp_fast.config.recipe import LoraSettings, OptimizerSettings
from prdp_fast.core import distributed
from prdp_fast.models import lora
from prdp_fast.models.families import StableDiffusion
from prdp_fast.planning.memory import Activations, Footprint, copy_of_checkpoint
from prdp_fast.training.engine import ZeroEngine
from prdp_fast.training.host_copy import HostCopies

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def alone() -> Iterator[torch.device]:
    """A job of one rank, in this process."""
    yield distributed.init()
    distributed.shutdown()


def engine_of(name: str, precision: str, folder: Path, *, adapter: bool = False, average: bool = False) -> ZeroEngine:
    config = json.loads((CONFIGS / f"{name}.json").read_text()) | {"bf16": {"enabled": precision == "bf16"}}
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    denoiser = small_unet()
    if adapter:
        lora.add_adapter(denoiser, LoraSettings(rank=2), 0)
    resolved = resolve_config(str(path), load_recipe("smoke"), world_size=1, stochastic_steps=2, cuda=False)
    return ZeroEngine(denoiser, OptimizerSettings(learning_rate=1e-3), resolved, CPU, ema_decay=0.5 if average else None)


def update(engine: ZeroEngine) -> None:
    generator = torch.Generator().manual_seed(5)
    sample = torch.randn(2, *SHAPE, generator=generator).to(engine.dtype)
    context = torch.randn(2, 6, WIDTH, generator=generator).to(engine.dtype)
    engine.set_scale(1.0)
    with engine.accumulating():
        output = engine.denoiser(sample, torch.arange(2) * 100, encoder_hidden_states=context, return_dict=False)[0]
        engine.backward(output.float().square().mean(), last=True)
    assert engine.step().applied


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("name", "precision", "adapter", "average"),
    [
        ("zero0", "float32", False, True), ("zero1", "bf16", False, True), ("zero2", "bf16", True, True),
        ("zero2", "float32", False, False), ("zero3", "bf16", False, False), ("zero3_offload", "float32", True, False),
    ],
)  # fmt: skip
def test_what_is_written_is_what_was_copied(
    alone: torch.device, tmp_path: Path, name: str, precision: str, adapter: bool, average: bool
) -> None:
    """Byte for byte the files that a save at that moment wrote, although training has changed everything since; twice, for the
    second copy takes the room of the first."""
    engine = engine_of(name, precision, tmp_path, adapter=adapter, average=average)
    for number in (1, 2):
        update(engine)
        at_once, behind = tmp_path / f"{number}", tmp_path / f"{number} behind"
        for folder in (at_once, behind):
            folder.mkdir()
        names = {path.relative_to(at_once) for path in engine.save(at_once)}
        write = engine.copy(behind)
        update(engine)
        assert {path.relative_to(behind) for path in write()} == names
        assert content(behind) == content(at_once)
    assert content(tmp_path / "1") != content(tmp_path / "2")
    later = engine.full_state_dict()
    engine.load(tmp_path / "2 behind")
    update(engine)
    assert all(torch.equal(value, later[key]) for key, value in engine.full_state_dict().items()), "and goes on as the run did"


@pytest.mark.parametrize(("name", "precision"), [("zero0", "float32"), ("zero2", "bf16"), ("zero3", "float32")])
@pytest.mark.parametrize("adapter", [False, True], ids=["whole", "lora"])
def test_the_plan_counts_the_copy(alone: torch.device, tmp_path: Path, name: str, precision: str, adapter: bool) -> None:
    average = name != "zero3"
    engine = engine_of(name, precision, tmp_path, adapter=adapter, average=average)
    update(engine)
    engine.copy(tmp_path)
    found = sum(buffer.numel() for buffer in engine.copies._used)
    settings = load_recipe("smoke", ["model.ema_decay=0.5"] if average else [])
    shapes = StableDiffusion(dict(small_unet().config), text_length=6)
    footprint = Footprint.of(
        settings, engine.config, shapes, Activations(0), 1, world_size=1, needs_reference=True, cuda=True
    )  # fmt: skip
    if adapter:
        footprint = copy.copy(footprint)
        object.__setattr__(footprint, "adapter_parameters", sum(value.numel() for value in engine.trained))
    planned = copy_of_checkpoint(footprint)
    assert planned.place == "host" and found == pytest.approx(planned.size, rel=0.02)


def test_copies_share_what_tensors_share_and_nothing_with_them() -> None:
    copies = HostCopies(CPU)
    whole = torch.arange(10.0)
    value = {
        "views": [whole[2:6], whole[::2], whole.view(2, 5).t()], "weight": nn.Parameter(torch.ones(3)), "empty": torch.empty(0),
        "half": whole.bfloat16(), "numbers": {"step": 3, "list": [1, 2]}, "again": whole,
    }  # fmt: skip
    copies.begin()
    taken = copies.take(value)
    expected = copy.deepcopy(value)
    whole.zero_()
    value["weight"].data.zero_()
    value["numbers"]["list"].append(3)
    assert taken["numbers"] == expected["numbers"]
    for one, other in zip(
        [*taken["views"], taken["weight"], taken["empty"], taken["half"], taken["again"]],
        [*expected["views"], expected["weight"], expected["empty"], expected["half"], expected["again"]],
        strict=True,
    ):
        assert type(one) is type(other) and one.requires_grad == other.requires_grad and one.stride() == other.stride()
        assert torch.equal(one, other)
    storages = {tensor.untyped_storage().data_ptr() for tensor in [*taken["views"], taken["again"]]}
    assert len(storages) == 1 and whole.untyped_storage().data_ptr() not in storages


def test_the_room_of_copies_is_used_again() -> None:
    copies, value = HostCopies(CPU), {"a": torch.ones(1000), "b": torch.ones(1000), "c": torch.ones(7)}
    places = []
    for number in range(3):
        if number == 2:
            del value["c"]
        copies.begin()
        taken = copies.take(value)
        copies.finish()
        places.append({tensor.data_ptr() for tensor in taken.values()})
    assert places[0] == places[1] and places[2] <= places[0] and len(places[2]) == 2
    assert [buffer.numel() for buffer in copies._used] == [4000, 4000] and not copies._free, (
        "room that nothing takes is given back"
    )


def test_large_buffers_for_a_gpu_are_locked_in_memory_and_unlocked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the runtime's calls; a refusal leaves an ordinary buffer."""
    locked: dict[int, int] = {}

    class Runtime:
        answer = 0

        def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
            if self.answer == 0:
                locked[address] = size
            return self.answer

        def cudaHostUnregister(self, address: int) -> None:
            del locked[address]

    runtime = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    copies = HostCopies(torch.device("cuda"))
    for size in (2**18, 2**18, 2**19):
        copies.begin()
        assert torch.equal(copies.take([torch.ones(size), torch.ones(3)])[0], torch.ones(size))
        copies.finish()
        assert list(locked.values()) == [4 * size]
    runtime.answer = 2
    copies.begin()
    assert torch.equal(copies.take([torch.ones(2**20)])[0], torch.ones(2**20))
    copies.finish()
    assert not locked
