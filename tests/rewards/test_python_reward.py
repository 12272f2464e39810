"""A user's own function as a reward: found, called, and its faults told in one line."""

from __future__ import annotations

import math
from pathlib import Path

import launching
import pytest
import torch
from launching import ROOT, TRAIN

from prdp_fast.config.recipe import RewardSettings
from prdp_fast.core.errors import RewardError, UserError
from prdp_fast.rewards import RewardOutput, build_rewards
from prdp_fast.rewards.registry import build_reward

IMAGES = torch.stack([torch.full((3, 4, 4), value, dtype=torch.uint8) for value in (10, 20, 30)])
METADATA = [{"bonus": value} for value in (1.0, 2.0, 3.0)]


def reward(source: str, directory: Path, name: str = "score", **arguments):
    (directory / "mine.py").write_text(source)
    return build_reward("python", {"function": f"{directory / 'mine.py'}:{name}", "arguments": arguments})


def test_two_arguments_three_arguments_and_named_ones(tmp_path):
    two = reward("def score(images, prompts):\n    return images.float().mean((1, 2, 3))", tmp_path)
    assert torch.equal(torch.as_tensor(two.score(IMAGES, ["a"] * 3, METADATA).scores), torch.tensor([10.0, 20.0, 30.0]))
    three = reward(
        "def score(images, prompts, metadata):\n    return [m['bonus'] + len(p) for m, p in zip(metadata, prompts)]", tmp_path
    )
    assert three.score(IMAGES, ["", "x", "xx"], METADATA).scores == [1.0, 3.0, 5.0]
    named = reward("def score(images, prompts, *, scale):\n    return [scale] * len(images)", tmp_path, scale=2.5)
    assert named.score(IMAGES, ["a"] * 3, METADATA).scores == [2.5] * 3


def test_details_and_unscored_images_go_through(tmp_path):
    source = (
        "import torch\nfrom prdp_fast.rewards import RewardOutput\n"
        "def score(images, prompts):\n    return RewardOutput([1.0, float('nan'), 2.0], {'half': torch.ones(3) / 2})"
    )
    (tmp_path / "mine.py").write_text(source)
    settings = RewardSettings(name="python", weight=3.0, options={"function": f"{tmp_path / 'mine.py'}:score"})
    scores = build_rewards([settings]).score(IMAGES, ["a"] * 3, METADATA)
    assert scores.total[[0, 2]].tolist() == [3.0, 6.0] and math.isnan(scores.total[1])
    assert scores.details["python/half"].tolist() == [0.5] * 3


def test_a_module_on_the_path_and_a_relative_file(tmp_path, monkeypatch):
    (tmp_path / "own_rewards.py").write_text("def score(images, prompts):\n    return [7.0] * len(images)")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for function in ("own_rewards:score", "own_rewards.py:score"):
        assert build_reward("python", {"function": function}).score(IMAGES, ["a"] * 3, METADATA) == RewardOutput([7.0] * 3)


@pytest.mark.parametrize(
    ("source", "name", "words"),
    [
        ("def other(images, prompts): ...", "score", "has no function 'score'; it has other"),
        ("score = 3", "score", "has no function 'score'; it has none"),
        (
            "import no_such_library",
            "score",
            "could not be imported: ModuleNotFoundError: No module named 'no_such_library' (mine.py:1)",
        ),
        ("x = 1\ny = 1 / 0", "score", "could not be imported: ZeroDivisionError: division by zero (mine.py:2)"),
        ("def score(images: (", "score", "could not be imported: SyntaxError"),
        ("def score(images): ...", "score", "signature (images); expected to call it as (images, prompts) or"),
        ("def score(images, prompts): ...", "not a name", "expected 'path/to/file.py:function' or 'package.module:function'"),
    ],
)
def test_faults_before_any_work(tmp_path, source, name, words):
    with pytest.raises(UserError) as caught:
        reward(source, tmp_path, name)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("function", ["nowhere.py:score", "no_such_module:score", "no colon"])
def test_nothing_there(function):
    with pytest.raises(UserError, match=r"reward 'python': .*(no file|could not be imported|expected)"):
        build_reward("python", {"function": function})


def test_a_fault_while_scoring_stops_the_run_and_names_the_line(tmp_path):
    broken = reward("def score(images, prompts):\n    scores = {}\n    return scores['x']", tmp_path)
    with pytest.raises(RewardError, match=r"mine\.py:score raised KeyError: 'x' \(mine\.py:3\)"):
        broken.score(IMAGES, ["a"] * 3, METADATA)


def test_the_shipped_example_trains(tmp_path):
    """One epoch of the smoke recipe on examples/custom_reward.py."""
    launching.run(
        TRAIN, "--config", "zero2.json", "--recipe", "smoke", "--output", tmp_path / "run",
        "--set", "rewards=[{name: python, options: {function: examples/custom_reward.py:red}}]",
        "--set", "schedule.epochs=1", "--set", "schedule.updates_per_epoch=1", "--set", "schedule.prompts_per_epoch=2",
        "--set", "evaluation.prompts=0", "--set", "performance.attention=sdpa", "--set", "performance.fuse_qkv=off",
        ranks=1, cwd=ROOT,  # by which the example is found
    )  # fmt: skip
    assert (tmp_path / "run" / "summary.json").is_file()
    assert '"reward/python"' in (tmp_path / "run" / "metrics.jsonl").read_text()
