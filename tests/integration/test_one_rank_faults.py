"""What one rank alone finds, in whole jobs: one line, status 2, and the finished epochs are saved."""

from __future__ import annotations

import json
from pathlib import Path

import launching
import pytest
import torch
from launching import TRAIN, Finished
from safetensors.torch import load_file

from prdp_fast.core.records import Prompt
from prdp_fast.prompts.shards import write_index, write_shards
from prdp_fast.prompts.stream import PromptSet, PromptStream

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

SMALL = {
    "schedule.epochs": 4, "schedule.updates_per_epoch": 1, "schedule.prompts_per_epoch": 2, "schedule.images_per_prompt": 2,
    "sampler.num_inference_steps": 2, "evaluation.prompts": 0, "checkpoint.every": 100, "performance.attention": "sdpa",
    "performance.fuse_qkv": "off",
}  # fmt: skip
# A job in which something is otherwise: `extra` is run before training, with the module of the Trainer as `trainer`.
CHANGED = """
import os, sys
import torch
from prdp_fast import train
from prdp_fast.training import trainer
RANK = os.environ.get("RANK", "0")
{extra}
sys.exit(train.main())
"""
# A rank spoils a file, once it is in its second call.
SPOILS = """
import os, pathlib
calls = 0
def score(images, prompts):
    global calls
    calls += 1
    if calls == 2 and os.environ.get("SPOIL"):
        pathlib.Path(os.environ["SPOIL"]).write_bytes(b"")
    return images[:, 0].double().mean((1, 2)).div(255).float()
"""


def start(folder: Path, ranks: int, extra: str = "", env: dict[str, str] | None = None, **changes: object) -> Finished:
    folder.mkdir(exist_ok=True)
    script = TRAIN
    if extra:
        script = folder / "changed.py"
        script.write_text(CHANGED.format(extra=extra))
    values = SMALL | {"rewards": "[{name: jpeg_size}]"} | {name.replace("__", "."): value for name, value in changes.items()}
    words = ["--config", "zero2.json", "--recipe", "smoke", "--output", "run", *launching.settings(values)]
    return launching.start(script, *words, ranks=ranks, cwd=folder, env=env).wait(120)


def refusal(finished: Finished) -> str:
    assert finished.returncode == 2 and "Traceback" not in finished.text, finished.text[-4000:]
    (line,) = [line for line in finished.text.splitlines() if "error: " in line]
    return line


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "run/checkpoints").iterdir())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "run/model/unet/diffusion_pytorch_model.safetensors")


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A prompt a shard, so that of an epoch every rank reads another one."""
    prompts = [Prompt(number, f"a red circle, number {number}", {}) for number in range(8)]
    entry = write_shards(prompts, tmp_path / "prompts", "train", shard_size=1)
    write_index(tmp_path / "prompts", {"train": entry}, "1")
    return tmp_path / "prompts"


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_shard_that_only_one_rank_needs(tmp_path: Path, shards: Path, ranks: int) -> None:
    (tmp_path / "reward.py").write_text(SPOILS)
    needed = PromptStream(PromptSet.open(shards, "train"), seed=0, prompts_per_epoch=2, rank=ranks - 1, world_size=ranks).epoch(2)
    path = shards / f"train-{needed[-1].index:05d}.tar.gz"
    kept = path.read_bytes()
    job = {
        "rewards": f"[{{name: python, options: {{function: '{tmp_path / 'reward.py'}:score'}}}}]", "prompts__source": shards,
    }  # fmt: skip
    line = refusal(start(tmp_path / "one", ranks, env={"SPOIL": str(path)}, **job))
    assert line.startswith(f"error: prompt shard {path} cannot be read (") and ("(on rank 1)" in line) == (ranks == 2)
    assert line.endswith(f"; stopped in epoch 2; 2 finished epochs are saved in {tmp_path / 'one/run'}")
    assert checkpoints(tmp_path / "one") == ["epoch-000002"]
    path.write_bytes(kept)
    assert "continuing after epoch 2" in start(tmp_path / "one", ranks, **job).stdout
    start(tmp_path / "whole", ranks, **job)
    found, expected = weights(tmp_path / "one"), weights(tmp_path / "whole")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


NO_MEMORY = """
plain = trainer.{what}
def exhausted(*arguments, **options):
    if RANK == "{rank}" and ({when}):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    return plain(*arguments, **options)
trainer.{what} = exhausted
"""


@pytest.mark.parametrize(
    ("what", "when", "said"),
    [
        ("rollout", "options['epoch'] == 1", "out of memory in the rollout, even one row at a time; use a higher ZeRO stage"),
        ("reference_pass", "True", "out of memory in the reference, even one row at a time; use a higher ZeRO stage"),
        ("PromptStream.epoch", "arguments[1] == 1", "out of memory (CUDA out of memory. Tried to allocate 2 GiB); lower sampler"),
    ],
    ids=["rollout", "reference", "prompts"],
)
def test_memory_that_one_rank_lacks(tmp_path: Path, what: str, when: str, said: str) -> None:
    extra = NO_MEMORY.format(what=what, when=when, rank=1)
    line = refusal(start(tmp_path, 2, extra))
    assert line.startswith(f"error: {said}") and "(on rank 1); stopped in epoch 1; 1 finished epochs are saved" in line
    assert checkpoints(tmp_path) == ["epoch-000001"]


@pytest.mark.parametrize("what", ["Pipeline.load", "results.compare_all"], ids=["while it is built", "at its end"])
def test_memory_that_is_lacking_outside_of_epochs(tmp_path: Path, what: str) -> None:
    finished = start(tmp_path, 1, NO_MEMORY.format(what=what, when="True", rank=0), schedule__epochs=1)
    line = refusal(finished)
    assert line.startswith("error: out of memory (CUDA out of memory. Tried to allocate 2 GiB); use more ranks, a higher ZeRO ")
    assert line.endswith(f"--resume {tmp_path / 'run'}")


def test_an_evaluation_that_one_rank_has_no_memory_for(tmp_path: Path) -> None:
    """The text encoder, say. The first evaluation is before any epoch, the second is saved."""
    extra = NO_MEMORY.format(what="evaluate", when="open('calls', 'a').write('x') and os.path.getsize('calls') > 2", rank=1)
    line = refusal(start(tmp_path, 2, extra, evaluation__prompts=2, evaluation__every=2))
    assert "out of memory (CUDA" in line and "(on rank 1); stopped in evaluation; 2 finished epochs are saved" in line
    assert checkpoints(tmp_path) == ["epoch-000002"]


def test_machines_that_do_not_share_the_run_directory(tmp_path: Path) -> None:
    """Told at the start, and not with the first checkpoint: a rank in another current directory stands for one."""
    (tmp_path / "elsewhere").mkdir()
    extra = """
train.SHARED_S = 1.0
if RANK == "1":
    os.chdir("elsewhere")
"""
    line = refusal(start(tmp_path, 2, extra))
    assert line.startswith(f"error: --output {tmp_path / 'elsewhere/run'} on ")
    assert "is not the directory that rank 0 writes into; expected one on a file system that all machines share" in line
    assert not (tmp_path / "run/checkpoints").exists() and not (tmp_path / "elsewhere/run").exists()


def test_an_evaluation_of_fewer_prompts_than_ranks(tmp_path: Path) -> None:
    finished = start(tmp_path, 2, schedule__epochs=1, evaluation__prompts=1)
    assert finished.returncode == 0, finished.text[-3000:]
    sets = json.loads((tmp_path / "run/summary.json").read_text())["evaluation"]
    assert [sets[name][moment]["n"] for name in ("seen", "unseen") for moment in ("before", "after")] == [1] * 4
