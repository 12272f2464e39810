"""A checkpoint goes on on other ranks and at another ZeRO stage: its state to the bit, and its course to rounding."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import launching
import pytest
import torch
from drive_reshard import AFTER, BEFORE, PAIRS, RATE, SAME, kind_of, make_engine, stage_of, update
from launching import ROOT

from prdp_fast.core import distributed
from prdp_fast.core.errors import UserError
from prdp_fast.training.shards import NotDataError, average_name

DRIVE = ROOT / "tests/drive_reshard.py"
MOMENTS = ("exp_avg", "exp_avg_sq")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the jobs have told."""
    folder = tmp_path_factory.mktemp("reshard")
    for ranks, action in ((1, "write"), (2, "write"), (1, "read"), (2, "read"), (3, "read")):
        launching.run(DRIVE, folder, action, ranks=ranks)
    return folder


def told(folder: Path, source: str, written_by: int, target: str, ranks: int) -> tuple[dict[str, Any], dict[str, Any]]:
    written = folder / f"{source}-by-{written_by}.pt"
    return torch.load(written), torch.load(written.with_suffix("").with_name(f"{written.stem}-to-{target}-by-{ranks}.pt"))


def check_loaded(source: str, target: str, written: dict[str, Any], read: dict[str, Any]) -> None:
    """Every number of the state as it was saved."""
    saved, loaded = written["saved"], read["loaded"]
    assert loaded["step"] == saved["step"] == (None if kind_of(source) == "fresh" else BEFORE)
    assert loaded["own"] == saved["own"], "updates, fp16's headroom, DeepSpeed's steps"
    assert loaded["computes with its masters"]
    kinds = ["weight", *(MOMENTS if saved["step"] else ()), *(["average"] if stage_of(source) < 3 > stage_of(target) else ())]
    assert {*kinds} == {*saved, *loaded} & {"weight", "average", *MOMENTS} & {*saved} & {*loaded}
    for kind in kinds:
        assert saved[kind].keys() == loaded[kind].keys()
        for name, value in saved[kind].items():
            assert value.abs().max() > 0 or kind_of(source) in ("fresh", "lora"), "it would be equal to what was forgotten"
            assert torch.equal(loaded[kind][name], value), f"{kind} of {name}"


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: "{}@{}-{}@{}".format(*pair))
def test_other_ranks_and_stages(pair: tuple[str, int, str, int], folder: Path) -> None:
    """And on for two updates.

    Allowed: a weight of size w is rounded by an update to eps w; a gradient is a sum of rounded numbers, which is u of itself off
    (u of the dtype that it is computed in; more where it has come through the layers of a U-Net), and AdamW's step, a ratio of
    two such, at most 2 u of the learning rate.
    """
    source, written_by, target, _ = pair
    written, read = told(folder, *pair)
    assert read["resharded"] == f"{written_by} rank{'s' * (written_by > 1)} at ZeRO stage {stage_of(source)}"
    check_loaded(source, target, written, read)
    eps = torch.finfo(torch.float32).eps
    u = {"bf16": torch.finfo(torch.bfloat16).eps, "lora": 16 * eps}.get(kind_of(source), eps)
    for kind in ("weight", "average"):
        ours, theirs = read["later"].get(kind), written["later"].get(kind)
        for name in ours.keys() if ours and theirs else ():
            if name == "kept":
                continue
            allowed = AFTER * (eps * float(theirs[name].abs().max()) + 2 * u * RATE)
            assert float((ours[name] - theirs[name]).abs().max()) <= allowed, f"{kind} of {name}"
            moved = float((theirs[name] - written["saved"][kind][name]).abs().max())
            assert moved > 20 * allowed, f"{kind} of {name} hardly moved: this would accept anything"
    assert read["later"]["step"] == written["later"]["step"]


@pytest.mark.slow
@pytest.mark.parametrize("pair", SAME, ids=lambda pair: "{}@{}-{}@{}".format(*pair))
def test_the_same_ranks_and_stage_go_on_to_the_bit(pair: tuple[str, int, str, int], folder: Path) -> None:
    written, read = told(folder, *pair)
    assert read["resharded"] is None
    check_loaded(pair[0], pair[2], written, read)
    for kind in {"weight", *MOMENTS, "average"} & read["later"].keys():
        for name, value in written["later"][kind].items():
            assert torch.equal(read["later"][kind][name], value), f"{kind} of {name}"


# What is no checkpoint of this job.


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, torch.device]]:
    """By one rank at stage 1, in this process."""
    device, folder = distributed.init(), tmp_path_factory.mktemp("written")
    engine = make_engine("1", folder, device, average=True)
    update(engine, 0)
    engine.save(folder / "checkpoint")
    yield folder / "checkpoint", device
    distributed.shutdown()


@pytest.fixture
def checkpoint(written: tuple[Path, torch.device], tmp_path: Path) -> Path:
    return Path(shutil.copytree(written[0], tmp_path / "checkpoint"))


def load_at_stage_0(checkpoint: Path, case: str = "0", average: bool = True) -> None:
    make_engine(case, checkpoint.parent, torch.device("cpu"), average=average).load(checkpoint)


def test_other_weights(checkpoint: Path) -> None:
    with pytest.raises(UserError, match=r"trains other weights than this job: 0\.bias was \(7,\), now none"):
        load_at_stage_0(checkpoint, "0-lora", average=False)


def test_a_missing_average(checkpoint: Path) -> None:
    (checkpoint / average_name(0)).unlink()
    load_at_stage_0(checkpoint, average=False)
    with pytest.raises(UserError, match="has no average of the weights"):
        load_at_stage_0(checkpoint)


def test_files_for_nvme(checkpoint: Path) -> None:
    (checkpoint / "zero/offloaded_tensors").mkdir()
    with pytest.raises(UserError, match="of 1 rank at ZeRO stage 1, would have to be resharded for 1 at stage 0, and"):
        load_at_stage_0(checkpoint)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "plain pickle"])
@pytest.mark.parametrize("name", ["mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"])
def test_a_program_in_a_shard_is_not_run(checkpoint: Path, name: str, zipped: bool) -> None:
    ran = checkpoint.parent / "ran"

    class Program:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (ran,)

    torch.save(
        {"dp_world_size": Program(), "optimizer_state_dict": Program()},
        checkpoint / "zero" / name,
        _use_new_zipfile_serialization=zipped,
    )
    with pytest.raises(NotDataError, match=f"{name}: it asks for getattr when it is read, expected tensors and plain values"):
        load_at_stage_0(checkpoint)
    assert not ran.exists()


def test_a_fragment_too_few_and_a_rank_too_few(checkpoint: Path) -> None:
    path = checkpoint / "zero/zero_pp_rank_0_mp_rank_00_optim_states.pt"
    content = torch.load(path, weights_only=False)
    (fragments,) = content["optimizer_state_dict"]["param_slice_mappings"]
    fragments["2.weight"].numel -= 1
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"has 20 of the 21 numbers of 2\.weight"):
        load_at_stage_0(checkpoint)
    path.rename(path.with_name(path.name.replace("rank_0_", "rank_1_")))
    with pytest.raises(ValueError, match=r"has optimizer states of ranks \[1\], expected those of 1 ranks"):
        load_at_stage_0(checkpoint)
