"""Bad input: one clear line, exit status 2, before work starts, and nothing overwritten."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import launching
import pytest
from launching import ROOT, TRAIN

from prdp_fast import train
from prdp_fast.prompts import ensure_scene_shards


def refused(capsys, *arguments: str) -> str:
    """The one line of a refused command, run as a dry run so that a missing refusal ends quickly."""
    assert train.main([*arguments, "--dry-run"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, f"expected one line, got {lines}"
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text("rewards:\n  - name: shapes_alignment\nobjective:\n  name: prdp\n  klweight: 1e-5\n")
    return path


def test_unknown_key_names_file_section_and_nearest(capsys, recipe: Path) -> None:
    line = refused(capsys, "--recipe", str(recipe))
    assert line == "error: recipe mine.yaml: unknown key 'klweight' under 'objective'; did you mean 'kl_weight'?"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("scheduel.epochs=3", ["unknown key 'scheduel'", "did you mean 'schedule'"]),
        ("rewards.0.name=shape_alignment", ["unknown reward 'shape_alignment'", "did you mean 'shapes_alignment'"]),
        ("rewards.0.wieght=2", ["unknown key 'wieght'", "did you mean 'weight'"]),
        ("rewards.3.weight=2", ["list of 1"]),
        ("rewards=[]", ["rewards"]),
        ("sampler.eta=0", ["eta 0", "0 < eta <= 1"]),
        ("sampler.eta=0.5", ["DDPMScheduler has no eta"]),
        ("sampler.guidance_scale=1", ["guidance_scale 1.0", "null"]),
        ("sampler.guidance_scale=0.5", ["guidance_scale 0.5"]),
        ("sampler.num_inference_steps=1001", ["num_inference_steps is 1001", "1 to 1000"]),
        ("sampler.num_inference_steps=ten", ["num_inference_steps", "'ten'"]),
        ("schedule.micro_batch=0", ["schedule.micro_batch: 0", "at least 1, or auto"]),
        ("schedule.micro_batch=many", ["schedule.micro_batch: 'many'", "or auto"]),
        ("performance.activation_checkpointing=maybe", ["activation_checkpointing", "'maybe'"]),
        ("schedule.images_per_prompt=1", ["images_per_prompt is 1"]),
        ("schedule.prompts_per_epoch=200000", ["200000", "134276"]),
        ("objective.name=ppo", ["'ppo'", "'prdp', 'ddpo', 'dpok', 'grpo', 'rwr', 'rebel'"]),
        ("objective={name: rebel, kl_weight: 1}", ["unknown key 'kl_weight' under 'objective'", "known: name, eta"]),
        ("objective.reference=moving_average", ["objective.reference 'moving_average' without model.ema_decay"]),
        ("objective={trajectories: reference, reference: last_epoch}", ["trajectories 'reference' with reference 'last_epoch'"]),
        ("objective={name: ddpo, running_min_count: 20}", ["running_min_count 20 is above running_buffer 16"]),
        ("objective.kl_weight=0", ["kl_weight is 0", "greater than 0"]),
        ("optimizer.learning_rate=.nan", ["learning_rate", "finite"]),
        ("prompts.train=trian", ["trian"]),
        ("prompts.source=nowhere", ["nowhere"]),
        ("prompts.stored_embeddings=true", ["prompts.stored_embeddings is set", "has none", "prdp embed", "--model tiny"]),
        ("prompts.source='pipe:curl http://x'", ["pipe"]),
        ("model.pretrained=./no-such-model", ["no-such-model"]),
        ("kernels=triton", ["kernels is 'triton'", "no CUDA device", "TRITON_INTERPRET=1"]),
        ("sampler.guidance_interval=[2000,3000]", ["[2000, 3000]", "none of the timesteps", "widen it"]),
        ("sampler.guidance_interval=[700,300]", ["[700, 300]", "first <= second"]),
        ("schedule.update_timesteps=2", ["update_timesteps", "updates_per_epoch 2", "remove update_timesteps"]),
        ("schedule={updates_per_epoch: 1, reference_timesteps: 9}", ["reference_timesteps is 9", "3 stochastic steps"]),
        ("performance.compile=fast", ["performance.compile is 'fast'", "'blocks'"]),
        ("evaluation=3", ["evaluation is 3"]),
        ("seed", ["section.key=value"]),
    ],
)
def test_bad_setting(capsys, monkeypatch, override: str, words: list[str]) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    line = refused(capsys, "--recipe", "smoke", "--set", override)
    for word in words:
        assert word in line


def test_unknown_recipe_and_config(capsys) -> None:
    assert "did you mean 'tiny'" in refused(capsys, "--recipe", "tinny")
    assert "zero2.json" in refused(capsys, "--config", "zero9.json")


def test_recipe_that_is_no_yaml_or_repeats_a_key(capsys, tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("rewards: [\n")
    assert "broken.yaml: not valid YAML" in refused(capsys, "--recipe", str(path))
    path.write_text("seed: 1\nseed: 2\n")
    assert "'seed' is given twice" in refused(capsys, "--recipe", str(path))


def test_prompts_must_divide_by_ranks(capsys, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "0")
    line = refused(capsys, "--recipe", "smoke")
    assert "prompts_per_epoch is 4" in line and "3 ranks" in line


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"train_micro_batch_size_per_gpu": 7}, ["train_micro_batch_size_per_gpu is 7", "schedule.micro_batch", "16"]),
        ({"gradient_accumulation_steps": 999}, ["gradient_accumulation_steps is 999"]),
        ({"train_batch_size": 999}, ["train_batch_size is 999"]),
        ({"gradient_clipping": 0.5}, ["gradient_clipping is 0.5", "optimizer.max_grad_norm", "1.0"]),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1.0}}}, ["lr is 1.0", "optimizer.learning_rate", "3e-05"]),
        ({"optimizer": {"type": "Lion"}}, ["'Lion'", "AdamW"]),
        ({"scheduler": {"type": "WarmupLR"}}, ["scheduler", "warmup_updates"]),
        ({"zero_optimization": {"stage": 4}}, ["stage is 4"]),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, ["bf16 and fp16"]),
        ({"bf16": {"enabled": True}, "zero_optimization": {"stage": 0}}, ["stage 0", "stage 1"]),
    ],
)
def test_deepspeed_values_that_contradict_the_recipe(capsys, tmp_path: Path, change: dict, words: list[str]) -> None:
    config = json.loads((ROOT / "configs" / "zero2.json").read_text()) | change
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(config))
    line = refused(capsys, "--recipe", "smoke", "--config", str(path))
    assert "mine.json" in line
    for word in words:
        assert word in line


def test_deepspeed_values_that_agree_are_accepted(capsys, tmp_path: Path) -> None:
    config = json.loads((ROOT / "configs" / "zero2.json").read_text())
    config["train_micro_batch_size_per_gpu"] = 16
    config["optimizer"]["params"] |= {"lr": 3e-5, "betas": [0.9, 0.999]}
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(config))
    assert train.main(["--recipe", "smoke", "--config", str(path), "--dry-run", "--output", str(tmp_path / "out")]) == 0
    assert not (tmp_path / "out").exists()
    printed = capsys.readouterr().out
    assert "U-Net rows per epoch" in printed and "an epoch: " in printed and "at the worst moment" in printed


def test_auto_micro_batch_leaves_the_record_alone_and_refuses_a_number(capsys, tmp_path: Path) -> None:
    arguments = ["--recipe", "smoke", "--set", "schedule.micro_batch=auto"]
    assert train.main([*arguments, "--dry-run", "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    record = json.loads(printed[: printed.rindex("\n}\n") + 3])
    assert record["recipe"]["schedule"]["micro_batch"] == "auto"
    assert record["deepspeed"]["train_micro_batch_size_per_gpu"] == 1
    # 4 prompts x 4 images x 3 stochastic steps of 4
    assert "one update of a rank: 48 rows" in printed and "micro-batch auto, about 48: 1 backward" in printed
    config = json.loads((ROOT / "configs" / "zero2.json").read_text()) | {"train_micro_batch_size_per_gpu": 7}
    (tmp_path / "mine.json").write_text(json.dumps(config))
    line = refused(capsys, *arguments, "--config", str(tmp_path / "mine.json"))
    assert "train_micro_batch_size_per_gpu is 7" in line and "schedule.micro_batch makes it auto" in line


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return Path(shutil.copytree(ensure_scene_shards().parent, tmp_path / "shards"))


def test_missing_shard(capsys, shards: Path) -> None:
    (shards / "train-00003.tar.gz").unlink()
    line = refused(capsys, "--recipe", "smoke", "--set", f"prompts.source={shards}")
    assert "train-00003.tar.gz" in line


def test_corrupt_tar(capsys, shards: Path) -> None:
    path = shards / "train-00003.tar.gz"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    line = refused(capsys, "--recipe", "smoke", "--set", f"prompts.source={shards}")
    assert "train-00003.tar.gz" in line


def test_empty_prompt_set(capsys, tmp_path: Path) -> None:
    path = tmp_path / "empty.txt"
    path.write_text("\n\n")
    assert "empty.txt" in refused(capsys, "--recipe", "smoke", "--set", f"prompts.source={path}")


def snapshot(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", ["another run", "never", "foreign files"])
def test_output_directory_in_use_is_refused_and_untouched(tmp_path: Path, kind: str) -> None:
    from prdp_fast.core.errors import UserError
    from prdp_fast.core.run_directory import claim

    job = {"recipe": {"schedule": {"epochs": 3, "images_per_prompt": 16}}, "world_size": 1}
    if kind == "foreign files":
        (tmp_path / "thesis.tex").write_text("years of work")
        expected = "not empty"
    else:
        claim(tmp_path, job, "auto")
        expected = "holds a run already" if kind == "never" else "images_per_prompt was 16, now 32"
    before = snapshot(tmp_path)
    other = json.loads(json.dumps(job))
    if kind == "another run":
        other["recipe"]["schedule"]["images_per_prompt"] = 32
    with pytest.raises(UserError, match=expected):
        claim(tmp_path, other, "never" if kind == "never" else "auto")
    assert snapshot(tmp_path) == before


def test_the_same_job_may_go_on_longer(tmp_path: Path) -> None:
    from prdp_fast.core.run_directory import claim

    job = {"recipe": {"schedule": {"epochs": 3}}}
    claim(tmp_path, job, "auto")
    claim(tmp_path, {"recipe": {"schedule": {"epochs": 9}}}, "auto")
    assert json.loads((tmp_path / "run.json").read_text())["recipe"]["schedule"]["epochs"] == 9


BROKEN_REWARD = """
import sys
sys.path[:0] = [{root!r}, {kernels!r}]
import torch
from prdp_fast import train
from prdp_fast.rewards import jpeg_size
from prdp_fast.rewards.base import RewardOutput
calls = 0
original = jpeg_size.JpegSize.score
def score(self, images, prompts, metadata):
    global calls
    calls += 1
    if calls <= {good}:
        return original(self, images, prompts, metadata)
    return RewardOutput({scores})
jpeg_size.JpegSize.score = score
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("scores", "good", "words"),
    [
        ("torch.zeros(len(prompts) - 1)", 0, ["jpeg_size", "(7,)", "expected (8,)"]),
        # The evaluation before training makes two calls, the first epoch one: the second epoch fails.
        ("torch.full((len(prompts),), float('nan'))", 3, ["jpeg_size", "16"]),
    ],
    ids=["wrong number", "all NaN in epoch 2"],
)
def test_a_reward_that_does_not_score(tmp_path: Path, scores: str, good: int, words: list[str]) -> None:
    code = BROKEN_REWARD.format(root=str(ROOT), kernels=str(ROOT / "kernels"), scores=scores, good=good)
    arguments = [
        "--recipe", "smoke", "--output", str(tmp_path / "run"), "--set", "rewards=[{name: jpeg_size}]",
        "--set", "evaluation.prompts=8", "--set", "sampler.num_inference_steps=2", "--set", "checkpoint.every=100",
    ]  # fmt: skip
    script = tmp_path / "broken_reward.py"
    script.write_text(code)
    result = launching.start(script, *arguments).wait(300)
    assert result.returncode == 2, result.stderr[-3000:]
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in result.stderr
    for word in words:
        assert word in lines[0]
    checkpoints = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("epoch-*"))
    assert checkpoints == (["epoch-000001"] if good else []), "the epoch that was finished must not be lost"


def test_a_reward_whose_model_cannot_be_had_stops_the_job_before_it_loads_anything(tmp_path: Path) -> None:
    arguments = [
        "--recipe",
        "smoke",
        "--output",
        str(tmp_path / "run"),
        "--set",
        f"rewards=[{{name: pickscore, options: {{model: {tmp_path}}}}}]",
    ]
    result = launching.start(TRAIN, *arguments).wait(300)
    assert result.returncode == 2, result.stderr[-3000:]
    assert [line for line in result.stderr.splitlines() if "error" in line.lower()] == [
        f"error: reward 'pickscore': '{tmp_path}' has no config.json; expected the files of the model, as on the hub"
    ]
    found = {path.name for path in (tmp_path / "run").iterdir()}
    assert found == {"run.json", ".lock", "ranks"}, "nothing may have been evaluated yet"
