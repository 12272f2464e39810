"""SD3 and FLUX.1 through the deepspeed command at ZeRO-2: train, resume, export, open in a fresh process, evaluate."""

from __future__ import annotations

import gc
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import launching
import pytest
import torch
from diffusers import DiffusionPipeline
from launching import TRAIN
from safetensors.torch import load_file
from tiny_pipelines import PIXELS, TOKENS, build, opening
from transformers import PreTrainedModel

from prdp_fast import cli
from prdp_fast.acceleration.probe import distance
from prdp_fast.config.load import load_recipe
from prdp_fast.core import distributed
from prdp_fast.core.errors import UserError
from prdp_fast.core.records import Prompt
from prdp_fast.models import lora, pipeline
from prdp_fast.models.text import TextEncoder
from prdp_fast.planning.job import Job
from prdp_fast.prompts import write_index, write_shards
from prdp_fast.training.trainer import Trainer

pytestmark = pytest.mark.slow

EPOCHS, STEPS, PROMPTS, IMAGES = 2, 3, 2, 2
SETTINGS = [
    "rewards=[{name: jpeg_size}]", f"schedule.epochs={EPOCHS}", "schedule.updates_per_epoch=1",
    f"schedule.prompts_per_epoch={PROMPTS}", f"schedule.images_per_prompt={IMAGES}", "evaluation.prompts=2",
    f"sampler.num_inference_steps={STEPS}", f"sampler.max_sequence_length={TOKENS}", f"sampler.image_size={PIXELS}",
    "optimizer.learning_rate=1e-3", "checkpoint.keep=2", "performance.attention=sdpa", "performance.compile=off",
]  # fmt: skip
ADAPTER = ["model.lora={rank: 2, alpha: 3}", "optimizer.learning_rate=1e-2", "optimizer.eps=1e-4"]
RUNS: dict[str, tuple[str, list[str]]] = {
    "sd35": ("sd35", ["model.ema_decay=0.5"]),
    "flux": ("flux_dev", ["sampler.guidance_scale=null", "sampler.embedded_guidance=2.5", "sampler.stochastic_steps=[0, 1]"]),
    "sd3 lora": ("sd3", ADAPTER),
    "flux lora": ("flux_schnell", [*ADAPTER, "sampler.guidance_scale=null"]),
}
TEXTS = ["a red circle", "two blue squares"]


def train(name: str, model: Path, output: Path, *arguments: str, prompts: Path, ranks: int) -> str:
    more = RUNS[name][1] + ([f"prompts={{source: {prompts}, stored_embeddings: true}}"] if name == "flux" else [])
    words = [word for setting in [*SETTINGS, f"model.pretrained={model}", *more] for word in ("--set", setting)]
    return launching.run(
        TRAIN, "--recipe", "smoke", "--config", "zero2.json", "--output", output, *words, *arguments, ranks=ranks,
        cwd=output.parent,
    ).stdout  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pipelines")
    return {name: build(family, root / family) for name, (family, _) in RUNS.items()}


@pytest.fixture(scope="module")
def prompts(models: dict[str, Path], tmp_path_factory) -> Path:
    """A set whose embeddings are stored."""
    directory = tmp_path_factory.mktemp("prompts") / "set"
    rows = [Prompt(number, f"a {colour} {shape}", {}) for number, (colour, shape) in enumerate(
        (colour, shape) for colour in ("red", "blue", "green") for shape in ("circle", "square")
    )]  # fmt: skip
    sets = {"train": rows[:4], "seen_eval": rows[:2], "unseen_eval": rows[4:]}
    write_index(directory, {name: write_shards(part, directory, name, shard_size=20) for name, part in sets.items()}, "test")
    assert cli.main(["embed", str(directory), "--model", str(models["flux"]), "--max-sequence-length", str(TOKENS)]) == 0
    return directory


@pytest.fixture(scope="module")
def runs(models: dict[str, Path], prompts: Path, tmp_path_factory) -> dict[str, tuple[Path, str]]:
    """Each on one rank, and what it printed."""
    root = tmp_path_factory.mktemp("runs")
    return {
        name: (root / name.replace(" ", "-"), train(name, models[name], root / name.replace(" ", "-"), prompts=prompts, ranks=1))
        for name in RUNS
    }


def weights(directory: Path, component: str = "transformer") -> dict[str, torch.Tensor]:
    """Of an adapter, or of a pipeline's component."""
    if (directory / lora.WEIGHTS).is_file():
        return load_file(directory / lora.WEIGHTS)
    (file,) = (directory / component).glob("*.safetensors")
    return load_file(file)


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def unmoved(name: str) -> bool:
    """The last block's words go nowhere: they have queries, and what is asked for is thrown away. Positions are no weights."""
    return name == "pos_embed.pos_embed" or ("transformer_blocks.1." in name and ("add_q_proj" in name or "norm_added_q" in name))


@pytest.mark.parametrize("name", RUNS)
def test_a_run_trains_the_transformer_and_nothing_else(runs, models: dict[str, Path], name: str) -> None:
    (run, printed), rows = runs[name], metrics(runs[name][0])
    assert ("reference weights" in printed) == ("VAE and text encoder" in printed and not name.endswith("lora"))
    assert [row["epoch"] for row in rows] == list(range(EPOCHS))
    for row in rows:
        assert all(math.isfinite(row[key]) for key in ("reward", "loss", "log_prob", "grad_norm"))
        assert row["grad_norm"] > 0 and row["skipped_updates"] == 0 and row["drift"] < 1e-4
    assert rows[0]["kl_to_reference"] == 0 and rows[1]["kl_to_reference"] != 0
    card = (run / "model" / "README.md").read_text()
    assert "The transformer of" in card or "A LoRA of rank 2" in card
    if name.endswith("lora"):
        trained = weights(run / "model")
        assert all(key.startswith("transformer.") for key in trained) and any(
            ".add_k_proj.lora_B." in key for key in trained
        ) == (name == "sd3 lora" or "flux" in name)
        moved = {key for key, value in trained.items() if ".lora_B." in key and (value != 0).any()}
        assert moved >= {key for key in trained if ".to_v.lora_B." in key or ".add_v_proj.lora_B." in key}
        assert f'"targets": {json.dumps(["attn.to_q", "attn.to_k"])[:-1]}' in json.dumps(
            json.loads((run / "run.json").read_text())
        )
        return
    before, after = weights(models[name]), weights(run / "model")
    assert before.keys() == after.keys()
    still = [key for key in before if torch.equal(before[key], after[key])]
    assert [key for key in still if not unmoved(key)] == []
    for component in [path.name for path in models[name].glob("text_encoder*")] + ["vae"]:
        before, after = weights(models[name], component), weights(run / "model", component)
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before), component


@pytest.fixture
def in_this_process() -> Iterator[None]:
    """A job of one rank is built in the test's own process; afterwards it is as it was."""
    before = dict(os.environ)
    yield
    distributed.shutdown()
    os.environ.clear()
    os.environ.update(before)


def weights_alive(kind: type) -> int:
    """Numbers in the weights of every network of a class that this process holds."""
    gc.collect()
    networks = [thing for thing in gc.get_objects() if isinstance(thing, kind)]
    return sum({id(value): value.numel() for network in networks for value in network.parameters()}.values())


@pytest.mark.parametrize("made", ["by these encoders", "by an earlier version"])
def test_stored_embeddings_leave_the_text_encoders_where_they_lie(
    models: dict[str, Path], prompts: Path, made: str, tmp_path: Path, monkeypatch, in_this_process: None
) -> None:
    """They are not read where the store knows them; else they are compared, and then let go."""
    directory = tmp_path / "set"
    shutil.copytree(prompts, directory)
    if made == "by an earlier version":
        manifest = json.loads((directory / "embeddings.json").read_text())
        del manifest["encoder"]
        (directory / "embeddings.json").write_text(json.dumps(manifest))
    words = [f"model.pretrained={models['flux']}", f"prompts={{source: {directory}, stored_embeddings: true}}", *RUNS["flux"][1]]
    job = Job.prepare(load_recipe("smoke", [*SETTINGS, *words]), "zero2.json", world_size=1, cuda=False)
    assert job.footprint(cuda=False).frozen_parameters == job.family.vae_parameters
    read, load_network = [], pipeline.load_network
    monkeypatch.setattr(pipeline, "load_network", lambda *args: read.append(args[2]) or load_network(*args))
    held = weights_alive(PreTrainedModel)
    trainer = Trainer.build(job, distributed.init())
    encoders = {"text_encoder", "text_encoder_2"}
    assert set(read) == {"transformer", "vae"} | (encoders if made == "by an earlier version" else set())
    assert weights_alive(PreTrainedModel) == held and not trainer.pipeline.text_encoders
    held_prompts = [prompt for drawn in job.evaluation_prompts.values() for prompt in drawn]
    rows = trainer.encode(held_prompts)
    whole = pipeline.Pipeline.load(job.family, torch.device("cpu"), torch.float32)
    fresh = TextEncoder(whole, torch.float32).encode(held_prompts)
    for row, expected in zip(rows, fresh, strict=True):
        assert (row is None) == (expected is None) and (row is None or torch.equal(row, expected.half().float()))


def test_stored_embeddings_of_other_encoders_or_lengths_are_refused(
    models: dict[str, Path], prompts: Path, tmp_path: Path, in_this_process: None
) -> None:
    other = build("flux_dev", tmp_path / "other", seed=1)
    longer = f"sampler.max_sequence_length={TOKENS + 1}"
    for model, more, how in ((other, [], "by [0-9.]+"), (models["flux"], [longer], "in shape.*see --max-sequence-length")):
        words = [f"model.pretrained={model}", f"prompts={{source: {prompts}, stored_embeddings: true}}", *RUNS["flux"][1], *more]
        job = Job.prepare(load_recipe("smoke", [*SETTINGS, *words]), "zero2.json", world_size=1, cuda=False)
        assert not job.knows_embeddings()
        with pytest.raises(UserError, match=rf"was made with .* this model's .*prompt_embeds differ {how}.*run 'prdp embed'"):
            Trainer.build(job, distributed.init())


def test_tables_beside_the_weights_are_rounded_alike_and_exported_as_loaded(
    models: dict[str, Path], tmp_path: Path, in_this_process: None
) -> None:
    """Of positions: in 16 bits the policy, its reference and the gathered copy of ZeRO-3 read the same ones."""
    config = json.loads((Path(__file__).parents[2] / "configs" / "zero3.json").read_text()) | {"bf16": {"enabled": True}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    settings = load_recipe("smoke", [*SETTINGS, f"model.pretrained={models['sd35']}"])
    job = Job.prepare(settings, str(tmp_path / "config.json"), world_size=1, cuda=False)
    trainer = Trainer.build(job, distributed.init())
    own, *copies = (
        dict(denoiser.named_buffers()) for denoiser in (trainer.engine.engine.module, trainer.engine.gathered, trainer.reference)
    )
    assert own["pos_embed.pos_embed"].dtype == torch.bfloat16
    assert all(torch.equal(own["pos_embed.pos_embed"], copy["pos_embed.pos_embed"]) for copy in copies)
    loaded = weights(models["sd35"])["pos_embed.pos_embed"]
    assert torch.equal(trainer.engine.full_state_dict()["pos_embed.pos_embed"], loaded) and loaded.dtype == torch.float32


FRESH = """
import json, sys, torch
from diffusers import DiffusionPipeline
for base, adapter, options, result in zip(*(sys.argv[start::4] for start in (1, 2, 3, 4))):
    opening, call = json.loads(options)
    pipe = DiffusionPipeline.from_pretrained(base, dtype=torch.float32, **opening)
    if adapter:
        pipe.load_lora_weights(adapter)
    assert not any(name.startswith("prdp") for name in sys.modules)
    pipe.set_progress_bar_config(disable=True)
    torch.save(pipe(**call, output_type="pt", generator=torch.Generator().manual_seed(0)).images, result)
"""


def call(name: str) -> dict[str, Any]:
    guidance = {"flux": {"guidance_scale": 2.5}, "flux lora": {}}.get(name, {"guidance_scale": 2.0})
    given = {"num_inference_steps": STEPS, "height": PIXELS, "width": PIXELS, "max_sequence_length": TOKENS}
    return {"prompt": TEXTS, **given, **guidance}


def paint(pipe: DiffusionPipeline, name: str) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe(**call(name), output_type="pt", generator=torch.Generator().manual_seed(0)).images


def test_the_exports_open_in_a_fresh_process(runs, models: dict[str, Path], tmp_path: Path) -> None:
    """and paint what the original pipeline paints with the trained weights, or with an adapter's product added by hand."""
    files = {name: tmp_path / f"{name}.pt" for name in RUNS}
    arguments = []
    for name, (family, _) in RUNS.items():
        export, adapter = runs[name][0] / "model", name.endswith("lora")
        options = json.dumps([opening(family), call(name)])
        arguments += [str(models[name] if adapter else export), str(export) if adapter else "", options, str(files[name])]
    subprocess.run(
        [sys.executable, "-c", FRESH, *arguments], check=True, cwd=tmp_path, timeout=200, env={**os.environ, "PYTHONPATH": ""}
    )
    for name, (family, _) in RUNS.items():
        pipe = DiffusionPipeline.from_pretrained(models[name], dtype=torch.float32, **opening(family))
        before, trained = paint(pipe, name), weights(runs[name][0] / "model")
        with torch.no_grad():
            if not name.endswith("lora"):
                pipe.transformer.load_state_dict(trained)
            for key in [key for key in trained if ".lora_A." in key]:
                layer = pipe.transformer.get_submodule(key.removeprefix("transformer.").split(".lora_A.")[0])
                layer.weight += trained[key.replace(".lora_A.", ".lora_B.")] @ trained[key]
        after = paint(pipe, name)
        torch.testing.assert_close(torch.load(files[name], weights_only=True), after, rtol=0, atol=1e-4)
        assert (after - before).abs().max() > 1e-3, name


@pytest.mark.parametrize("name", ["flux", "sd3 lora"])
def test_a_run_is_evaluated(runs, name: str, tmp_path: Path, capsys) -> None:
    command = ["evaluate", str(runs[name][0]), "--prompts", "unseen", "--limit", "2", "--samples", "2", "--output", str(tmp_path)]
    assert cli.main(command) == 0, capsys.readouterr()
    assert "jpeg_size" in capsys.readouterr().out


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["sd35", "flux lora"])
def test_on_two_ranks_and_resumed(runs, models: dict[str, Path], prompts: Path, name: str, tmp_path: Path) -> None:
    """Two ranks train as one does, and what is resumed after the first epoch ends in the same bits."""
    run = tmp_path / "two"
    train(name, models[name], run, prompts=prompts, ranks=2)
    for row, alone in zip(metrics(run), metrics(runs[name][0]), strict=True):
        for key in ("reward", "log_prob", "loss", "grad_norm"):
            assert row[key] == pytest.approx(alone[key], rel=2e-3, abs=1e-6), f"epoch {row['epoch']}: {key}"
    whole = weights(run / "model")
    alone = weights(runs[name][0] / "model")
    assert distance(list(whole.values()), [alone[key] for key in whole]) < 1e-2
    if name != "sd35":
        return
    for path in [*run.glob("checkpoints/epoch-000002"), run / "model"]:
        shutil.rmtree(path)
    (run / "summary.json").unlink()
    train(name, models[name], run, "--resume", "auto", prompts=prompts, ranks=2)
    resumed = weights(run / "model")
    assert resumed.keys() == whole.keys() and all(torch.equal(resumed[key], whole[key]) for key in whole)
    assert [row["epoch"] for row in metrics(run)] == list(range(EPOCHS))
