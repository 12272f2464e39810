"""Recipes and DeepSpeed files of any content: one line that says what is wrong, quickly, and nothing else."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from prdp_fast.config.deepspeed import resolve_config
from prdp_fast.config.load import CONFIGS, load_recipe, parse_value
from prdp_fast.core.errors import UserError

SETTINGS = load_recipe("smoke")


def resolved(path: Path, values: dict):
    path.write_text(json.dumps(values))
    return resolve_config(str(path), SETTINGS, world_size=1, stochastic_steps=3, cuda=False)


def changed(key: str, value: object) -> dict:
    config = json.loads((CONFIGS / "zero2.json").read_text())
    *above, last = key.split(".")
    place = config
    for part in above:
        place = place.setdefault(part, {})
    place[last] = value
    return config


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("bf16", True, 'bf16 is true; expected an object, e.g. {"enabled": true}'),
        ("fp16.enabled", "yes", 'fp16.enabled is "yes"; expected true, false or "auto"'),
        ("zero_optimization", None, 'zero_optimization is null; expected an object, e.g. {"stage": 2}'),
        ("zero_optimization.stage", "2", 'zero_optimization.stage is "2"; expected 0, 1, 2 or 3'),
        ("zero_optimization.stage", True, "zero_optimization.stage is true; expected 0, 1, 2 or 3"),
        (
            "zero_optimization.offload_optimizer", "cpu",
            'zero_optimization.offload_optimizer is "cpu"; expected an object, e.g. {"device": "cpu"}',
        ),
        (
            "zero_optimization.offload_param", {"device": ["cpu"]},
            'zero_optimization.offload_param.device is ["cpu"]; expected "none", "cpu" or "nvme"',
        ),
        (
            "zero_optimization.round_robin_gradients", True,
            "with zero_optimization.round_robin_gradients DeepSpeed takes one weight's float32 copy for another's, in "
            "checkpoints and in what is exported; remove it, or set it false",
        ),
        ("optimizer", ["AdamW"], 'optimizer is ["AdamW"]; expected an object, e.g. {"type": "AdamW"}'),
        ("optimizer.type", None, "optimizer.type is null; expected the name of an optimizer"),
        ("optimizer.params", 1e-5, 'optimizer.params is 1e-05; expected an object, e.g. {"lr": "auto"}'),
        ("optimizer.params.betas", [0.9], 'optimizer.params.betas is [0.9]; expected a list of two numbers, or "auto"'),
        ("gradient_clipping", "none", 'gradient_clipping is "none"; expected a number or "auto"'),
        ("train_batch_size", [1] * 99, f'train_batch_size is {str([1] * 99)[:80]}...; expected a whole number or "auto"'),
        ("data_types.grad_accum_dtype", "double", 'data_types.grad_accum_dtype is "double"; expected "fp32", "bf16" or "fp16"'),
    ],
)  # fmt: skip
def test_a_deepspeed_section_of_another_type(tmp_path: Path, key: str, value: object, line: str) -> None:
    with pytest.raises(UserError) as raised:
        resolved(tmp_path / "mine.json", changed(key, value))
    assert str(raised.value) == f"config mine.json: {line}"


READ = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping", "steps_per_print",
    "optimizer", "optimizer.type", "optimizer.params", "optimizer.params.lr", "optimizer.params.betas", "zero_optimization",
    "zero_optimization.stage", "zero_optimization.offload_optimizer", "zero_optimization.offload_optimizer.device",
    "zero_optimization.offload_param", "bf16", "bf16.enabled", "fp16", "fp16.enabled", "data_types",
    "data_types.grad_accum_dtype", "scheduler",
)  # fmt: skip


def test_any_value_of_any_key_is_taken_or_refused_in_a_line(tmp_path: Path) -> None:
    refused = []
    for key in READ:
        for value in (True, None, 0, 1, -1, 2.5, "cpu", "auto", [], ["x"], {}, {"a": 1}, float("inf")):
            try:
                config = resolved(tmp_path / "mine.json", changed(key, value))
                assert (config.stage in (0, 1, 2, 3) and not config.offloads_optimizer) or value == "cpu"
            except UserError as error:
                refused.append(str(error))
    assert len(refused) > 200
    assert all(line.startswith("config mine.json: ") and len(line) < 250 for line in refused)


@pytest.mark.parametrize("text", ["", "[]", "null", "[" * 100_000, '{"bf16": {', "\x00", '"x"'])
def test_a_deepspeed_file_that_is_no_object(tmp_path: Path, text: str) -> None:
    (tmp_path / "mine.json").write_text(text)
    with pytest.raises(UserError, match=r"config mine\.json: (not valid JSON|expected a DeepSpeed configuration object)"):
        resolve_config(str(tmp_path / "mine.json"), SETTINGS, world_size=1, stochastic_steps=3, cuda=False)


def test_null_and_auto_leave_offloading_out(tmp_path: Path) -> None:
    for value in (None, "auto"):
        config = resolved(tmp_path / "mine.json", changed("zero_optimization.offload_optimizer", value))
        assert config.values["zero_optimization"] == {"stage": 2} and not config.offloads_optimizer


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a: &a {k: 1}\n" + "".join(
    f"{new}: &{new} {{<<: [{', '.join([f'*{old}'] * 9)}]}}\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("? [a, b]\n: 1\n", "a key is a list; expected a name"),
        ("{{a: 1}: 2}", "a key is a mapping; expected a name"),
        ("seed: " + "[" * 20_000, "nested too deeply"),
        ("a: " + "[" * 60 + "]" * 60, "nested too deeply"),
        (BOMB, "more than 10,000 values"),
        (MERGES, "more than 10,000 values"),
        ("a: &a [*a]", "nested too deeply"),
        ("a: &a {b: *a}", "nested too deeply"),
        ("seed: " + "9" * 5_000, "not valid YAML"),
        ("when: 2020-13-45", "not valid YAML"),
        ('seed: !!int ""', "not valid YAML"),
        ("seed: !!bool maybe", "not valid YAML"),
        ("seed: !!python/object:os.system x", "not valid YAML"),
        ("\x00", "not valid YAML"),
        ("1: 2", "recipe mine.yaml"),
        ("null: 2", "recipe mine.yaml"),
        ("- 1", "expected a mapping"),
        ("", "expected a mapping"),
        ("rewards: {a: 1}", "rewards"),
        ("rewards: [null]\nobjective: [prdp]", "recipe mine.yaml"),
        ("seed: " + "x" * 100_000, "seed is 'xxx"),
    ],
    ids=lambda value: value[:20].split("\n")[0],
)
def test_a_recipe_that_is_none(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    start = time.perf_counter()
    with pytest.raises(UserError, match=r"recipe mine\.yaml: ") as raised:
        load_recipe(str(tmp_path / "mine.yaml"))
    assert time.perf_counter() - start < 5
    assert words in str(raised.value) and len(str(raised.value)) < 400


def test_a_value_of_the_command_line_that_is_none() -> None:
    for text in ("[" * 20_000, "{[a]: 1}", "!!int ''", "2020-13-45", "&a [*a]"):
        with pytest.raises(ValueError, match="is not valid YAML"):
            parse_value(text)
        with pytest.raises(UserError, match="--set "):
            load_recipe("smoke", [f"seed={text}"])
    with pytest.raises(UserError, match="list of 1; '²' is not in it"):
        load_recipe("smoke", ["rewards.²=1"])


def test_anchors_that_a_recipe_repeats_stay(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "rewards:\n- {name: jpeg_size, options: &o {quality: 80}}\n- {name: http, options: {<<: *o, url: x}}\n"
    )
    rewards = load_recipe(str(tmp_path / "mine.yaml")).rewards
    assert [reward.options for reward in rewards] == [{"quality": 80}, {"quality": 80, "url": "x"}]


@pytest.mark.parametrize(
    ("key", "last", "beyond"),
    [
        ("seed", 2**63 - 1, 2**63), ("evaluation.seed", 2**63 - 1, 2**63), ("optimizer.betas.0", 0, -1e-9),
        ("optimizer.betas.1", 0.999999999, 1), ("objective.clip_range", 1e30, 1e31),
        ("sampler.guidance_interval", [0, 2**31 - 1], [0, 2**31]), ("model.ema_decay", 1 - 2**-53, 1),
        ("sampler.guidance_scale", 1 + 2**-52, 1), ("schedule.images_per_prompt", 2, 1), ("prompts.limit", 1, 0),
    ],
)  # fmt: skip
def test_the_ends_of_what_is_promised(key: str, last: object, beyond: object) -> None:
    overrides = ["optimizer.betas=[0.5, 0.5]"]
    load_recipe("smoke", [*overrides, f"{key}={last}"])
    with pytest.raises(UserError, match=key.partition(".")[2].partition(".")[0] or key):
        load_recipe("smoke", [*overrides, f"{key}={beyond}"])
