"""`prdp evaluate` as a user runs it, on the embedded model with few steps."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from launching import ROOT, free_port, start
from PIL import Image
from safetensors.torch import load_file, save_file

from prdp_fast import cli
from prdp_fast.commands import evaluate as evaluate_command
from prdp_fast.config.load import load_recipe
from prdp_fast.config.recipe import PromptSettings
from prdp_fast.core.errors import UserError
from prdp_fast.evaluation import run as evaluation_run
from prdp_fast.evaluation.blocks import BlockName, EvaluationDirectory
from prdp_fast.evaluation.plan import Model, find_set, parse_reward, plan_evaluation
from prdp_fast.evaluation.request import EvaluationRequest
from prdp_fast.world import TINY

pytestmark = pytest.mark.slow

UNET = "unet/diffusion_pytorch_model.safetensors"
FAST = ["--steps", "2", "--samples", "2", "--limit", "5", "--batch", "4"]  # blocks of two prompts: 2, 2, 1
MODEL = ["--prompts", "scenes:unseen_eval", "--rewards", "jpeg_size", "--guidance", "none"]
BOTH = "shapes_alignment:attributes=[fill,outline]"


def evaluate(*words: str | Path) -> int:
    return cli.main(["evaluate", *map(str, words)])


def result(output: Path) -> dict:
    return json.loads((output / "evaluation.json").read_text())


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """What training leaves: a record, and an export whose U-Net differs from the base's."""
    directory = tmp_path_factory.mktemp("runs") / "myrun"
    shutil.copytree(TINY, directory / "model")
    weights = load_file(directory / "model" / UNET)
    generator = torch.Generator().manual_seed(0)
    for name, tensor in weights.items():
        weights[name] = tensor + 0.1 * tensor.std(correction=0) * torch.randn(tensor.shape, generator=generator)
    save_file(weights, directory / "model" / UNET)
    recipe = load_recipe("tiny", ["sampler.num_inference_steps=2", "rewards.0.weight=0.5"])
    (directory / "run.json").write_text(json.dumps({"recipe": recipe.model_dump(mode="json"), "deepspeed": {}, "world_size": 1}))
    return directory


@pytest.fixture(scope="module")
def evaluated(run: Path, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("evaluated") / "out"
    assert evaluate(run, "--rewards", "jpeg_size", "shapes_alignment", *FAST, "--output", output) == 0
    return output


def test_a_model_against_itself_differs_by_nothing(tmp_path, capsys):
    assert evaluate("tiny", "--base", "tiny", *MODEL, *FAST, "--output", tmp_path / "out") == 0
    found = result(tmp_path / "out")["sets"]["scenes:unseen_eval"]
    entry = found["rewards"]["jpeg_size"]
    assert entry["difference"] == {"mean": 0.0, "stderr": 0.0, "low": 0.0, "high": 0.0, "n": 5}
    assert entry["win_rate"] == {"mean": 0.5, "stderr": 0.0, "low": 0.5, "high": 0.5, "n": 5}
    assert entry["base"] == entry["finetuned"] and entry["base"]["stderr"] > 0
    assert (found["diversity"]["ratio"]["mean"], found["diversity"]["base"]["mean"] > 0.01) == (1.0, True)
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "out" / "evaluation.json")


def test_a_run_against_its_base(run, evaluated):
    record = result(evaluated)
    assert record["settings"]["models"]["base"]["pretrained"] == "tiny"
    assert record["settings"]["models"]["finetuned"]["name"] == "myrun"
    assert record["settings"]["sampler"]["guidance_scale"] is None  # the recipe's
    assert set(record["sets"]) == {"seen", "unseen"}
    for found in record["sets"].values():
        trained = {label: entry["trained"] for label, entry in found["rewards"].items()}
        assert trained == {BOTH: "yes", "jpeg_size": "no", "shapes_alignment": "other options"}
        assert f"{BOTH}/strict" in found["details"] and len(found["prompts"]) == 5
        for entry in found["rewards"].values():
            base, finetuned = (np.array(entry["scores"][role]) for role in ("base", "finetuned"))
            assert base.shape == (5, 2) and (base != finetuned).any()
            assert entry["base"]["mean"] == pytest.approx(base.mean(), rel=1e-12)
            difference = finetuned.mean(1) - base.mean(1)
            assert entry["difference"]["mean"] == pytest.approx(difference.mean(), rel=1e-9)
            assert entry["difference"]["stderr"] == pytest.approx(difference.std(ddof=1) / math.sqrt(5), rel=1e-9)
            assert entry["win_rate"]["mean"] == pytest.approx(((finetuned > base) + 0.5 * (finetuned == base)).mean())
            assert entry["unscored"] == {"base": 0, "finetuned": 0}
        spread = found["diversity"]
        assert spread["ratio"]["mean"] == pytest.approx(spread["finetuned"]["mean"] / spread["base"]["mean"], rel=1e-12)


def test_the_scores_are_those_of_training_s_own_evaluation(evaluated):
    """The same prompts and noise through `evaluation.evaluate`, which training calls before and after."""
    from prdp_fast.evaluation.run import evaluate as evaluate_policy
    from prdp_fast.models.pipeline import Pipeline
    from prdp_fast.models.text import TextEncoder
    from prdp_fast.prompts.stream import PromptSet
    from prdp_fast.rewards import build_rewards
    from prdp_fast.sampling.policy import Policy
    from prdp_fast.sampling.transitions import Transitions

    pipeline = Pipeline.load("tiny", torch.device("cpu"), frozen_dtype=torch.float32)
    policy = Policy(Transitions.from_scheduler(pipeline.scheduler, 2), None, pipeline.family.predict)
    prompts = PromptSet.open("scenes", "unseen_eval").draw(5, seed=0)
    expected = evaluate_policy(
        policy, pipeline.denoiser, pipeline, TextEncoder(pipeline, torch.float32).encode,
        build_rewards(load_recipe("tiny").rewards), prompts, images_per_prompt=2, batch=4, seed=0,
    )  # fmt: skip
    found = result(evaluated)["sets"]["unseen"]
    assert found["prompts"] == expected.prompts
    means = np.array(found["rewards"][BOTH]["scores"]["base"]).mean(1)
    assert means == pytest.approx(expected.rewards.numpy(), abs=1e-3)  # a batch of another size rounds pixels differently
    assert found["details"][f"{BOTH}/strict"]["base"]["mean"] == pytest.approx(expected.strict.mean().item(), abs=0.11)


def test_the_tables_and_the_pictures(evaluated):
    text = (evaluated / "evaluation.md").read_text()
    entry = result(evaluated)["sets"]["unseen"]["rewards"]["jpeg_size"]
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    column = table[0].index("unseen: jpeg_size")
    rows = {row[0]: row[column] for row in table[:6] if len(row) == len(table[0])}
    base, difference = entry["base"], entry["difference"]
    assert rows["tiny (base)"] == f"{base['mean']:.4f} ± {base['stderr']:.4f} [{base['low']:.4f}, {base['high']:.4f}]"
    assert rows["difference"].startswith(f"{difference['mean']:+.4f} ± ")
    assert rows["win rate"].startswith(f"{entry['win_rate']['mean']:.3f} ± ")
    assert f"seen: {BOTH} (trained on)" in table[0] and "myrun (finetuned)" in rows
    # The left image of the first pair is the base's, magnified four times.
    picture = np.array(Image.open(evaluated / "samples" / "1-unseen.png").convert("RGB"))
    names = [BlockName(role, 1, 0) for role in ("base", "finetuned")]
    base, finetuned = (EvaluationDirectory(evaluated).load(name).images[0].permute(1, 2, 0).numpy() for name in names)
    assert (picture[8 : 8 + 128 : 4, 8 : 8 + 128 : 4] == base).all()
    assert (picture[8 : 8 + 128 : 4, 8 + 136 : 8 + 264 : 4] == finetuned).all()


def test_a_model_alone_has_one_row(tmp_path):
    prompts = tmp_path / "mine.txt"
    prompts.write_text("a small red circle\na large blue square\n")
    words = ["--prompts", prompts, "--rewards", "jpeg_size", "--guidance", "none", "--steps", "2", "--samples", "1"]
    assert evaluate("tiny", *words, "--output", tmp_path / "out") == 0
    found = result(tmp_path / "out")["sets"]["mine"]
    assert sorted(found["rewards"]["jpeg_size"]) == ["model", "scores", "trained", "unscored"]
    assert found["diversity"]["model"]["mean"] is None  # one image has no neighbour
    assert "| tiny | -" in (tmp_path / "out" / "evaluation.md").read_text()
    assert (tmp_path / "out" / "samples" / "0-mine.png").is_file()


def test_a_model_s_name_commands_no_terminal(tmp_path, capsys):
    model = tmp_path / "mo\x1b[31mdel"
    shutil.copytree(TINY, model)
    assert evaluate(model, *MODEL, *FAST, "--output", tmp_path / "out") == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and r"| mo\x1b[31mdel |" in shown


def test_the_picture_shows_the_first_prompts_of_a_set(tmp_path, monkeypatch):
    """Three of five, in blocks of two: the blocks keep no more images than the picture takes."""
    monkeypatch.setattr(evaluation_run, "KEPT_PICTURES", 3)
    assert evaluate("tiny", *MODEL, *FAST, "--output", tmp_path / "out") == 0
    blocks = [EvaluationDirectory(tmp_path / "out").load(BlockName("model", 0, number)) for number in range(3)]
    assert [len(block.images) for block in blocks] == [2, 1, 0]
    picture = np.array(Image.open(tmp_path / "out" / "samples" / "0-scenes-unseen_eval.png").convert("RGB"))
    assert picture.shape[1] == 3 * 128 + 4 * 8


def test_a_killed_evaluation_goes_on_where_it_stopped(run, evaluated, tmp_path):
    output = tmp_path / "out"
    words = [run, "--rewards", "jpeg_size", "shapes_alignment", *FAST, "--output", output]
    job = start(ROOT / "prdp_fast" / "cli.py", "evaluate", *words)
    deadline = time.monotonic() + 120
    while len(list(output.glob("work/*/*/block-*.pt"))) < 2:
        assert job.poll() is None and time.monotonic() < deadline, job.output()
        time.sleep(0.002)
    job.kill()
    done = {path: path.stat().st_mtime_ns for path in output.glob("work/*/*/block-*.pt")}
    assert 2 <= len(done) < 12 and not (output / "evaluation.json").exists()
    assert evaluate(*words) == 0
    assert (output / "evaluation.json").read_bytes() == (evaluated / "evaluation.json").read_bytes()
    assert {path: path.stat().st_mtime_ns for path in done} == done
    # A finished one loads no model.
    before = (output / "evaluation.json").read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation_run, "load_model", None)
        assert evaluate(*words) == 0
    assert (output / "evaluation.json").read_bytes() == before


def test_it_never_imports_deepspeed(tmp_path):
    """Which takes seconds, and is for training alone. A whole evaluation, and every module that it could have used."""
    words = ["tiny", *MODEL, "--steps", "2", "--samples", "1", "--limit", "1", "--output", str(tmp_path / "out")]
    paths = [path for name in ("evaluation", "reporting") for path in (ROOT / "prdp_fast" / name).glob("*.py")]
    modules = [f"prdp_fast.{path.parent.name}.{path.stem}" for path in paths if path.stem != "__init__"]
    assert {"prdp_fast.evaluation.run", "prdp_fast.reporting.model_card"} <= set(modules)
    code = (
        "import importlib, sys\n"
        "from prdp_fast import cli\n"
        f"assert cli.main(['evaluate', *{words}]) == 0\n"
        f"for module in {modules}: importlib.import_module(module)\n"
        "print('then', *(name for name in sys.modules if name.partition('.')[0] == 'deepspeed'))"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "then"


@pytest.mark.distributed
def test_two_ranks_find_what_one_finds(run, evaluated, tmp_path):
    """As torchrun starts them."""
    output = tmp_path / "out"
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port()), "-m", "prdp_fast.cli"]
    words = ["evaluate", run, "--rewards", "jpeg_size", "shapes_alignment", *FAST, "--output", output]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *launcher, *map(str, words)], env=environment, capture_output=True, text=True, timeout=300
    )  # fmt: skip
    text = done.stdout + done.stderr
    assert done.returncode == 0, text[-3000:]
    assert "tiny (base): 3 blocks" in text and "myrun (finetuned): 3 blocks" in text  # half of six: the other rank did the rest
    for name in ("evaluation.json", "evaluation.md"):
        assert (output / name).read_bytes() == (evaluated / name).read_bytes()


def test_another_evaluation_is_refused_and_can_be_restarted(tmp_path, capsys):
    output = tmp_path / "out"
    assert evaluate("tiny", *MODEL, *FAST, "--output", output) == 0
    capsys.readouterr()
    other = ["tiny", *MODEL, *FAST, "--seed", "1", "--output", output]
    before = (output / "evaluation.json").read_bytes()
    assert evaluate(*other) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "holds another evaluation: seed was 0, now 1" in error
    assert (output / "evaluation.json").read_bytes() == before
    assert evaluate(*other, "--restart") == 0
    assert (output / "evaluation.json").read_bytes() != before


def test_other_weights_are_another_evaluation(run, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(TINY, model)
    words = [model, *MODEL, "--steps", "2", "--samples", "1", "--limit", "1", "--output", tmp_path / "out"]
    assert evaluate(*words) == 0
    shutil.copy(run / "model" / UNET, model / UNET)
    assert evaluate(*words) == 2
    assert "models.model.digest was" in capsys.readouterr().err


def test_lora_weights_are_loaded_onto_the_base(run, tmp_path):
    from prdp_fast.config.recipe import LoraSettings
    from prdp_fast.models.families import read_family
    from prdp_fast.models.lora import add_adapter
    from prdp_fast.models.pipeline import Pipeline

    settings = LoraSettings(rank=2, alpha=6)
    pipeline = Pipeline.load(read_family("tiny", settings), torch.device("cpu"), torch.float32)
    trained = copy.deepcopy(pipeline.denoiser)
    add_adapter(trained, settings, seed=0)
    generator = torch.Generator().manual_seed(0)
    for name, weight in trained.named_parameters():
        if "lora_" in name:
            weight.data = 0.1 * torch.randn(weight.shape, generator=generator)
    state = {name: weight for name, weight in trained.state_dict().items() if "lora_" in name}
    lora_run = tmp_path / "lora"
    pipeline.export(lora_run / "model", state)
    loaded = evaluation_run.load_model(
        Model("x", "tiny", lora_run / "model", ""), read_family("tiny"), torch.device("cpu"), torch.float32
    )
    inputs = torch.randn(2, 4, 8, 8, generator=generator), 500, torch.randn(2, 6, 128, generator=generator)
    with torch.no_grad():
        plain = pipeline.denoiser(*inputs, return_dict=False)[0]
        expected, found = (denoiser(*inputs, return_dict=False)[0] for denoiser in (trained, loaded.denoiser))
    assert found == pytest.approx(expected, abs=1e-5) and not torch.allclose(plain, expected, atol=1e-3)
    shutil.copy(run / "run.json", lora_run / "run.json")
    assert evaluate(lora_run, "--prompts", "unseen", *FAST, "--output", tmp_path / "out") == 0
    entry = result(tmp_path / "out")["sets"]["unseen"]["rewards"][BOTH]
    assert entry["scores"]["base"] != entry["scores"]["finetuned"]


def test_clip_features(tmp_path):
    from transformers import CLIPConfig, CLIPModel, CLIPVisionModelWithProjection
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**sizes, "image_size": 32, "patch_size": 8, "projection_dim": 12}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config={**sizes, "vocab_size": 99}, vision_config=vision, projection_dim=12)).save_pretrained(
        tmp_path / "clip"
    )
    model = CLIPVisionModelWithProjection.from_pretrained(tmp_path / "clip").eval()
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor.save_pretrained(tmp_path / "clip")
    words = ["tiny", *MODEL, "--steps", "2", "--samples", "2", "--limit", "1", "--features", tmp_path / "clip"]
    assert evaluate(*words, "--output", tmp_path / "out") == 0
    from prdp_fast.evaluation.features import ClipFeatures

    images = torch.randint(0, 256, (2, 3, 40, 48), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    with torch.no_grad():
        expected = model(processor(pictures, return_tensors="pt")["pixel_values"]).image_embeds
    expected = expected / expected.norm(dim=-1, keepdim=True)
    assert ClipFeatures(str(tmp_path / "clip"))(images) == pytest.approx(expected.numpy(), abs=1e-5)
    assert result(tmp_path / "out")["settings"]["features"]["name"] == "the CLIP model clip"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tiny", "--rewards", "jpeg_size"], "--prompts is missing"),
        (
            ["tiny", "--prompts", "animals", "--rewards", "jpeg_size"],
            "'animals' names no set; expected SOURCE:NAME, e.g. animals",
        ),
        (["tiny", "--prompts", "animals:unsen_eval", "--rewards", "jpeg_size"], "did you mean 'unseen_eval'?"),
        (
            ["tiny", "--prompts", "animals:train", "animals:train", "--rewards", "jpeg_size"],
            "two sets are called",
        ),
        (["tiny", "--prompts", "animals:train"], "--rewards is missing"),
        (["tiny", "--prompts", "animals:train", "--rewards", "jpg_size"], "unknown reward 'jpg_size'"),
        (["tiny", "--prompts", "animals:train", "--rewards", "jpeg_size:qualty=3"], "did you mean 'quality'?"),
        (["tiny", "--prompts", "animals:train", "--rewards", "jpeg_size:80"], "'80' is no option; expected NAME:KEY=VALUE"),
        (["tiny", *MODEL, "--steps", "2000"], "num_inference_steps is 2000; expected 1 to 1000"),
        (["tiny", *MODEL, "--guidance", "0.5"], "guidance_scale 0.5"),
        (["tiny", *MODEL, "--guidance", "3", "--guidance-interval", "1", "2", "--steps", "2"], "holds none of the timesteps"),
        (["tiny", *MODEL, "--scheduler", "PNDM"], "--scheduler is 'PNDM'; expected DDPMScheduler or DDIMScheduler"),
        (["tiny", *MODEL, "--samples", "0"], "--samples is 0; expected at least 1"),
        (["tiny", *MODEL, "--seed", "-1"], "--seed is -1"),
        (["tiny", *MODEL, "--features", "nowhere"], "--features nowhere has no config.json"),
        (["no/such/model", *MODEL], "'no/such/model'"),
        ([".", *MODEL], "is neither a run (run.json) nor a diffusers pipeline"),
        (["unfinished"], "has no export"),
        (["broken"], "is no record of a run"),
        (["tiny", *MODEL, "--base", "larger"], "models can share noise only if their latents and pictures have one size"),
        (["tiny", *MODEL, "--output", "foreign"], "is not empty and holds no evaluation"),
    ],
)
def test_what_cannot_be_evaluated_is_one_line_before_any_work(words, message, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluation_run, "compute_blocks", None)
    for name in ("unfinished", "broken", "foreign"):
        Path(name).mkdir()
    shutil.copy(run / "run.json", "unfinished")
    Path("broken/run.json").write_text('{"recipe": {"rewards": []}}')
    Path("foreign/letter.txt").write_text("mine")
    if "larger" in words:
        shutil.copytree(TINY, "larger", ignore=shutil.ignore_patterns("*.safetensors"))
        config = json.loads(Path("larger/unet/config.json").read_text())
        Path("larger/unet/config.json").write_text(json.dumps(config | {"sample_size": 16}))
    assert evaluate(*words) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and error.startswith("error: ")
    assert not Path("evaluations").exists() and sorted(path.name for path in Path("foreign").iterdir()) == ["letter.txt"]


def test_a_reward_that_fails_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("def broken(images, prompts):\n    return 1 / 0\n")
    words = ["tiny", "--prompts", "animals:train", "--rewards", "python:function=mine.py:broken", "--guidance", "none", *FAST]
    assert evaluate(*words, "--output", "out") == 2
    error = capsys.readouterr().err
    assert "mine.py:broken raised ZeroDivisionError" in error and error.count("\n") == 1


def test_a_run_s_code_runs_only_if_the_command_says_so(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("theirs.py").write_text(
        "import pathlib\npathlib.Path('it ran').touch()\ndef score(images, prompts):\n    return [0.0] * len(prompts)\n"
    )
    shutil.copytree(run, "theirs")
    record = json.loads(Path("theirs/run.json").read_text())
    record["recipe"]["rewards"] = [{"name": "python", "options": {"function": "theirs.py:score"}}]
    Path("theirs/run.json").write_text(json.dumps(record))

    class Reached(Exception):
        pass

    def reached(*args, **kwargs):
        raise Reached

    monkeypatch.setattr(evaluation_run, "compute_blocks", reached)
    assert evaluate("theirs", "--limit", "2") == 2
    error = capsys.readouterr().err
    assert "this run's reward is the code 'theirs.py:score'" in error and "add --trust-code" in error and error.count("\n") == 1
    assert not Path("it ran").exists()
    with pytest.raises(Reached):
        evaluate("theirs", "--limit", "2", "--trust-code", "--output", "out")
    assert Path("it ran").exists()
    Path("it ran").unlink()
    with pytest.raises(Reached):  # what the user's own command line names needs no word more
        evaluate("theirs", "--limit", "2", "--rewards", "python:function=theirs.py:score", "--output", "out2")


def test_rewards_are_read_with_their_options():
    assert parse_reward("jpeg_size") == ("jpeg_size", {})
    assert parse_reward("a:x=1,y=[b,c],z=text") == ("a", {"x": 1, "y": ["b", "c"], "z": "text"})
    assert parse_reward("python:function=my.py:score") == ("python", {"function": "my.py:score"})


def test_sets_are_found_as_the_recipe_means_them():
    prompts = PromptSettings(source="scenes", seen="seen_eval", unseen="unseen_eval")
    assert find_set("unseen", prompts) == ("scenes", "unseen_eval", None)
    assert find_set("seen", prompts) == ("scenes", "seen_eval", None)
    assert find_set("train", prompts) == ("scenes", "train", None)
    assert find_set("animals:train", prompts) == ("animals", "train", None)
    assert find_set("seen", prompts.model_copy(update={"limit": 7})) == ("scenes", "train", 7)
    assert find_set("some/where.txt", None) == ("some/where.txt", "train", None)
    assert find_set("http://host:80/mine:train", prompts) == ("http://host:80/mine", "train", None)
    for url in ("s3://bucket/mine", "http://host:80/mine"):
        with pytest.raises(UserError, match=f"'{url}' names no set; expected SOURCE:NAME, e.g. {url}:unseen_eval"):
            find_set(url, prompts)


@pytest.mark.parametrize(("asked", "expected"), [(None, "DDIMScheduler"), ("DDPMScheduler", "DDPMScheduler")])
def test_both_models_sample_as_the_run_did_unless_told(run, tmp_path, asked, expected):
    """The embedded model ships with DDPM; its recipe may have asked for another."""
    recipe = load_recipe("tiny", ["sampler.scheduler=DDIMScheduler"])
    shutil.copytree(run / "model", tmp_path / "model")
    (tmp_path / "run.json").write_text(json.dumps({"recipe": recipe.model_dump(mode="json"), "deepspeed": {}, "world_size": 1}))
    plan = plan_evaluation(EvaluationRequest(str(tmp_path), scheduler=asked), cuda=False)
    assert [model["scheduler"] for model in plan.settings["models"].values()] == [expected, expected]


def test_sdxl_is_evaluated_like_the_others(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "models"))
    from tiny_pipelines import build

    words = [build("sdxl", tmp_path / "xl"), "--prompts", "animals:train", "--rewards", "jpeg_size", "--guidance", "3"]
    assert evaluate(*words, "--guidance-interval", "1", "600", *FAST, "--output", tmp_path / "out") == 0
    record = result(tmp_path / "out")
    assert record["settings"]["models"]["model"]["scheduler"] == "DDIMScheduler"  # in place of Euler's
    assert "guidance 3 at timesteps 1 to 600" in (tmp_path / "out" / "evaluation.md").read_text()
    assert record["sets"]["animals:train"]["rewards"]["jpeg_size"]["unscored"] == {"model": 0}


def test_the_command_line_s_defaults_are_the_request_s():
    parser = argparse.ArgumentParser()
    evaluate_command.add_arguments(parser)
    args = vars(parser.parse_args(["tiny"]))
    assert args.pop("restart") is False
    for field in dataclasses.fields(EvaluationRequest):
        default = "tiny" if field.name == "model" else field.default
        assert args.pop(field.name) in (default, list(default) if isinstance(default, tuple) else default), field.name
    assert not args, "an option that nothing reads"
