"""Files of a run directory that a disk, a copy or a stranger has changed while no job ran."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from damage import damage

from campaign import facts
from campaign.cases.signals import ONE, ONE_EMA, ONE_LORA, ONE_OFFLOAD, THREE, THREE_OFFLOAD, TWO, TWO_EMA, TWO_LORA, TWO_PLAIN
from campaign.scene import Case, Scene
from campaign.settings import EPOCHS, Setting
from prdp_fast.core import checkpoint_files  # to write a manifest as a stranger would
from prdp_fast.core.records import Prompt
from prdp_fast.prompts.shards import write_index, write_shards
from prdp_fast.prompts.stream import PromptSet, PromptStream

# By what a checkpoint has of it; of several one is drawn.
KINDS = {
    # At stage 0 the optimizer's state is in the file of the weights.
    "weights": r"zero/.*model_states\.pt", "optimizer": r"zero/.*optim_states\.pt", "state": r"state\.json",
    "manifest": r"manifest\.json", "average": r"average-.*\.safetensors", "any": r"(zero/.*\.pt|.*\.json|average-.*)",
}  # fmt: skip


def pick(scene: Scene, checkpoint: Path, kind: str) -> str:
    """A file of a kind, by its path in the checkpoint."""
    names = sorted(path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file())
    return scene.draw.choice([name for name in names if re.fullmatch(KINDS[kind], name)])


def spoil(scene: Scene, path: Path, how: str) -> None:
    """Args: how: as `damage` has it; one bit is a random one."""
    if how != "bit":
        damage(path.parent, path.name, how)
        return
    data = bytearray(path.read_bytes())
    position, bit = scene.draw.randrange(len(data)), scene.draw.randrange(8)
    data[position] ^= 1 << bit
    path.write_bytes(data)
    scene.injected.append(f"bit {bit} of byte {position:,} of {len(data):,}")


def newest_damaged(scene: Scene, kind: str, how: str) -> None:
    """One file of the newest checkpoint. The run falls back to the one before and says so."""
    scene.crashed()
    checkpoint = scene.run / f"checkpoints/epoch-{EPOCHS - 1:06d}"
    name = pick(scene, checkpoint, kind)
    spoil(scene, checkpoint / name, how)
    scene.injected.append(f"{name} of {checkpoint.name}")
    scene.must_name(f"more-{Path(name).name}" if how == "extra" else Path(name).name)
    scene.finish(says=f"falls back to epoch-{EPOCHS - 2:06d}")


def all_damaged(scene: Scene, kind: str, how: str) -> None:
    """Every checkpoint. The run is refused and nothing removed; with the files put back from a copy it goes on."""
    scene.crashed()
    kept = scene.folder / "kept"
    shutil.copytree(scene.run / "checkpoints", kept)
    for checkpoint in facts.checkpoints(scene.run).values():
        name = pick(scene, checkpoint, kind)
        spoil(scene, checkpoint / name, how)
        scene.injected.append(f"{name} of {checkpoint.name}")
        scene.must_name(Path(name).name)
    scene.end(scene.start(), (2,), "error: .* has no whole checkpoint")
    there = {path.relative_to(scene.run / "checkpoints") for path in (scene.run / "checkpoints").rglob("*") if path.is_file()}
    missing = {path.relative_to(kept) for path in kept.rglob("*") if path.is_file()} - there
    if how != "missing" and missing:
        scene.lost.append(f"{len(missing)} files of checkpoints that were damaged are gone")
    shutil.rmtree(scene.run / "checkpoints")
    shutil.copytree(kept, scene.run / "checkpoints")
    scene.finish(says=f"continuing after epoch {EPOCHS - 1}")


def other_file(scene: Scene, name: str, how: str, says: str) -> None:
    """A file that can be made again, or done without."""
    scene.crashed()
    spoil(scene, scene.run / name, how)
    scene.injected.append(f"{name}: {how}")
    if says:
        scene.must_name(name)
    scene.finish(says=says)


def other_prompts(scene: Scene) -> None:
    """The evaluation before training is that of a run of other prompts."""
    scene.crashed()
    path = scene.run / "evaluation_before.pt"
    sets = torch.load(path, weights_only=True)
    for values in sets.values():
        values["prompts"] = [f"{prompt}, again" for prompt in values["prompts"]]
        values["rewards"] += 1
        del values["sha256"]  # as in files of earlier versions
    torch.save(sets, path)
    scene.injected.append("evaluation_before.pt of other prompts")
    scene.must_name("evaluation_before.pt")
    scene.finish(says=BEFORE)


def shard_emptied(scene: Scene) -> None:
    """A shard that in the third epoch the last rank alone needs. The run stops, saved, and goes on with it put back."""
    folder, ranks = scene.folder / "prompts", scene.case.setting.ranks
    prompts = [Prompt(number, f"a red circle, number {number}", {}) for number in range(4 * EPOCHS)]
    write_index(folder, {"train": write_shards(prompts, folder, "train", shard_size=1)}, "1")
    stream = PromptStream(PromptSet.open(folder, "train"), seed=0, prompts_per_epoch=4, rank=ranks - 1, world_size=ranks)
    path = folder / f"train-{scene.draw.choice(stream.epoch(2)).index:05d}.tar.gz"
    kept = path.read_bytes()
    fault = json.dumps({"do": "empty", "call": 2, "path": str(path), "rank": 0})
    job = {"prompts__source": folder, "evaluation__prompts": 0, "checkpoint__every": 100}
    says = rf"error: prompt shard {path} cannot be read .*; 2 finished epochs are saved"
    scene.injected.append(f"{path.name} is emptied while epoch 1 is scored")
    scene.end(scene.start(env={"CAMPAIGN_FAULT": fault}, **job), (2,), says, within=scene.bound_s)
    path.write_bytes(kept)
    scene.finish(says="continuing after epoch 2", **job)
    if facts.epochs(scene.run) != EPOCHS:
        scene.unexpected.append(f"{facts.epochs(scene.run)} epochs, expected {EPOCHS}")


def record_damaged(scene: Scene, how: str) -> None:
    """run.json says which job a run is: refused until it is put back."""
    scene.crashed()
    kept = (scene.run / "run.json").read_bytes()
    spoil(scene, scene.run / "run.json", how)
    scene.injected.append(f"run.json: {how}")
    refused = scene.end(scene.start(), (2,) if how != "bit" else (0, 2))
    if refused.status == 2:
        (scene.run / "run.json").write_bytes(kept)
        scene.finish()
    scene.finished = True


def half_a_row(scene: Scene) -> None:
    scene.crashed()
    path = scene.run / "metrics.jsonl"
    kept = path.read_bytes().splitlines(keepends=True)
    row = scene.draw.choice(kept)
    path.write_bytes(b"".join(kept) + row[: scene.draw.randrange(1, len(row) - 1)])
    scene.injected.append("half a row at the end of metrics.jsonl")
    scene.finish()


def row_overwritten(scene: Scene) -> None:
    """A row that nothing can make again: its loss is said."""
    scene.crashed()
    path = scene.run / "metrics.jsonl"
    kept = path.read_bytes().splitlines(keepends=True)
    kept[1] = b"\0" * (len(kept[1]) - 1) + b"\n"
    path.write_bytes(b"".join(kept))
    scene.injected.append("zeros over the second row of metrics.jsonl")
    scene.must_name("metrics.jsonl")
    scene.finish()


def leftovers(scene: Scene) -> None:
    """What a start that was killed may have left, and what it cannot have."""
    scene.crashed()
    partial_one = scene.run / f"checkpoints/.epoch-{EPOCHS:06d}.partial"
    shutil.copytree(scene.run / f"checkpoints/epoch-{EPOCHS - 1:06d}", partial_one)
    (partial_one / "manifest.json").unlink()
    (scene.run / ".lock").write_text("\0\0\0")
    for name in ("rank-00000.json", "stop.json", "fault.json", "hang.json"):
        (scene.run / "ranks" / name).write_text('{"job": "anoth')
    scene.injected.append("a checkpoint half written, a garbled lock, garbled files of ranks")
    scene.finish(says=f"continuing after epoch {EPOCHS - 1}")


class Program:
    """What a pickle makes of it when it is read: a call of `touch`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.path}",)


def foreign(scene: Scene, kind: str, zipped: bool) -> None:
    """A file with a program in it, and a manifest that is right: whoever can write the one can write the other."""
    scene.crashed()
    checkpoint, trace = scene.run / f"checkpoints/epoch-{EPOCHS - 1:06d}", scene.folder / "trace"
    name = pick(scene, checkpoint, kind)
    content = torch.load(checkpoint / name, weights_only=False)
    torch.save(content | {"more": Program(trace)}, checkpoint / name, _use_new_zipfile_serialization=zipped)
    rewrite_manifest(checkpoint)
    scene.injected.append(f"a program in {name} of {checkpoint.name}")
    scene.must_name(Path(name).name)
    scene.end(scene.start(), (2,), "expected tensors and plain values alone")
    if trace.exists():
        scene.untold.append("a program in a checkpoint was run")
    shutil.rmtree(checkpoint)  # as the line advises
    scene.finish(says=f"continuing after epoch {EPOCHS - 2}")


def foreign_pickle(scene: Scene) -> None:
    """Bytes that are no pickle at all, with a manifest that is right."""
    scene.crashed()
    checkpoint = scene.run / f"checkpoints/epoch-{EPOCHS - 1:06d}"
    name = pick(scene, checkpoint, "weights")
    (checkpoint / name).write_bytes(scene.draw.randbytes(20_000))
    rewrite_manifest(checkpoint)
    scene.injected.append(f"random bytes in {name} of {checkpoint.name}, with their right hash")
    scene.must_name(checkpoint.name)
    scene.end(scene.start(), (2,), "it cannot be read")
    shutil.rmtree(checkpoint)
    scene.finish(says=f"continuing after epoch {EPOCHS - 2}")


def rewrite_manifest(checkpoint: Path) -> None:
    files = {name: checkpoint_files.measure(checkpoint / name) for name in checkpoint_files.read_manifest(checkpoint)[0]}
    checkpoint_files.write_manifest(checkpoint, files, kept=False)


def renamed(scene: Scene) -> None:
    """A copy of an old checkpoint under a newer name."""
    scene.crashed()
    shutil.rmtree(scene.run / f"checkpoints/epoch-{EPOCHS - 1:06d}")
    shutil.copytree(scene.run / f"checkpoints/epoch-{EPOCHS - 2:06d}", scene.run / f"checkpoints/epoch-{EPOCHS - 1:06d}")
    scene.injected.append(f"epoch-{EPOCHS - 2:06d} under the name of the next")
    scene.must_name("state.json")
    scene.finish(says=f"falls back to epoch-{EPOCHS - 2:06d}")


def _newest(kind: str, how: str, setting: Setting, short: bool = False) -> Case:
    words = {"bit": "one bit flipped in", "cut": "half of", "missing": "missing:", "empty": "nothing in", "extra": "a second"}
    what = "a file" if kind == "any" else kind
    return Case(f"newest checkpoint, {words[how]} {what} ({setting})", setting, partial(newest_damaged, kind=kind, how=how),
                short=short)  # fmt: skip


def _other(name: str, how: str, setting: Setting, says: str, short: bool = False) -> Case:
    return Case(f"{name}: {how} ({setting})", setting, partial(other_file, name=name, how=how, says=says), short=short)


def _case(name: str, setting: Setting, play: Callable[[Scene], None], **more) -> Case:
    return Case(name, setting, play, **more)


BEFORE, CHOICES = "evaluation_before.pt is missing or damaged", "acceleration.json was damaged: chosen anew"
CASES = [
    _newest("weights", "bit", TWO), _newest("weights", "cut", TWO_LORA), _newest("weights", "missing", ONE),
    _newest("weights", "empty", ONE_EMA), _newest("weights", "bit", THREE), _newest("optimizer", "bit", TWO_EMA),
    _newest("optimizer", "cut", ONE_OFFLOAD), _newest("optimizer", "missing", TWO),
    _newest("optimizer", "bit", ONE_EMA), _newest("optimizer", "bit", THREE_OFFLOAD), _newest("optimizer", "extra", TWO),
    _newest("state", "bit", TWO_PLAIN), _newest("state", "missing", ONE), _newest("state", "missing", TWO_EMA),
    _newest("state", "cut", ONE_LORA), _newest("manifest", "bit", TWO_LORA),
    _newest("manifest", "missing", ONE_LORA), _newest("manifest", "empty", ONE_OFFLOAD), _newest("average", "bit", ONE_EMA, True),
    _newest("average", "cut", TWO_EMA), _newest("average", "missing", TWO_LORA), _newest("any", "bit", ONE),
    _newest("any", "bit", TWO_LORA), _newest("any", "bit", ONE_EMA),
    _case("all checkpoints, half of weights", TWO, partial(all_damaged, kind="weights", how="cut")),
    _case("all checkpoints, one bit of optimizer", ONE_EMA, partial(all_damaged, kind="optimizer", how="bit")),
    _case("all checkpoints, manifest missing", ONE, partial(all_damaged, kind="manifest", how="missing")),
    _other("evaluation_before.pt", "cut", TWO, BEFORE), _other("evaluation_before.pt", "bit", ONE_EMA, BEFORE, True),
    _other("evaluation_before.pt", "bit", TWO_PLAIN, BEFORE),
    _other("evaluation_before.pt", "missing", ONE_LORA, BEFORE), _other("evaluation_before.pt", "missing", TWO_EMA, BEFORE),
    _other("evaluation_before.pt", "cut", ONE, BEFORE),
    _case("evaluation_before.pt of other prompts", TWO, other_prompts),
    _case("evaluation_before.pt of other prompts, 1 rank", ONE_LORA, other_prompts),
    _other("acceleration.json", "cut", TWO_EMA, CHOICES),
    _other("acceleration.json", "bit", ONE_EMA, ""),
    _case("run.json: cut", TWO_PLAIN, partial(record_damaged, how="cut")),
    _case("run.json: empty", ONE, partial(record_damaged, how="empty")),
    _case("run.json: bit", ONE_LORA, partial(record_damaged, how="bit")),
    _case("a shard that the last rank needs is emptied", TWO, shard_emptied, compare="no"),
    _case("a shard that the only rank needs is emptied", ONE, shard_emptied, compare="no"),
    _case("half a row at the end of metrics.jsonl", TWO_LORA, half_a_row),
    _case("zeros over a row of metrics.jsonl", ONE_EMA, row_overwritten, compare="no", short=True),
    _case("what an earlier start may have left", TWO_PLAIN, leftovers),
    _case("a program in the weights of a checkpoint", TWO, partial(foreign, kind="weights", zipped=True)),
    _case("a program in the optimizer of a checkpoint", ONE_OFFLOAD, partial(foreign, kind="optimizer", zipped=False)),
    _case("a corrupt pickle with its right hash", TWO_EMA, foreign_pickle),
    _case("a corrupt pickle with its right hash, 1 rank", ONE, foreign_pickle),
    _case("an old checkpoint under a newer name", ONE_LORA, renamed),
]  # fmt: skip
