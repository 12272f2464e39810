"""Studies: the grid, what is run again, what is found."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import yaml
from scipy import stats

from prdp_fast.cli import main
from prdp_fast.config.load import load_recipe
from prdp_fast.core.errors import UserError
from prdp_fast.planning.job import Job
from prdp_fast.studies import findings, runner
from prdp_fast.studies.declaration import STUDIES, Run, Study, check, grid, load_study, written
from prdp_fast.studies.page import page

SHIPPED = sorted(path.stem for path in STUDIES.glob("*.yaml"))
SMALL = {"title": "T", "question": "Q?", "recipe": "smoke", "arms": {"a": {}, "b": {"objective.kl_weight": 2.0}}, "baseline": "a"}


def small(**changes) -> Study:
    return Study.model_validate(SMALL | changes)


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("short", [False, True])
def test_every_shipped_study_is_made_of_recipes_that_load(name: str, short: bool) -> None:
    study = load_study(name)
    runs = grid(study, short=short)
    settings = check(study, runs)
    assert (
        set(settings) == set(study.arms)
        and len(runs) == len(study.arms) * len(study.seeds)
        and (len(study.seeds) >= 3 or name.startswith("learning_rates"))
    )
    # Equal budgets: the same number of images, which are reward queries, in every arm.
    schedules = [one.schedule for one in settings.values()]
    images = {one.epochs * one.prompts_per_epoch * one.images_per_prompt for one in schedules}
    assert short or len(images) == 1, images
    # A short form has the noisy steps that a subset is drawn from.
    for one in settings.values() if short else ():
        Job.prepare(one, "zero0.json", world_size=1, cuda=False)
    # No clock decides how much an arm learns.
    assert all(one.schedule.time_limit_minutes is None for one in settings.values())
    assert len({json.dumps(one.model_dump(mode="json")) for one in settings.values()}) == len(settings), "arms differ"


def test_the_grid_goes_through_the_arms_of_a_seed_first() -> None:
    runs = grid(small(settings={"schedule.epochs": 7}, seeds=[5, 3]), overrides=["seed=9"])
    assert [run.name for run in runs] == ["a-seed5", "b-seed5", "a-seed3", "b-seed3"]
    assert runs[1].overrides == ["objective.kl_weight=2.0", "schedule.epochs=7", "seed=9"]
    assert [run.arm for run in grid(small(), seeds=[1], arms=["b"])] == ["a", "b"], "the baseline is always there"
    with pytest.raises(UserError, match=r"--arms c: the study has no such arm; known: a, b"):
        grid(small(), arms=["c"])


@pytest.mark.parametrize(
    "value", [None, True, 1e-05, 3, "text", "a: b", [1, {"name": "x", "options": {"prefix": "", "n": None}}], {"name": "rwr"}]
)
def test_settings_survive_the_command_line(value) -> None:
    from prdp_fast.config.load import parse_value

    key, _, text = written("a.b", value).partition("=")
    assert key == "a.b" and "\n" not in text and parse_value(text) == value


def test_settings_reach_the_recipe() -> None:
    study = small(arms={"a": {}, "b": {"objective": {"name": "rwr", "temperature": 0.1}}})
    settings = check(study, grid(study))
    assert settings["b"].objective.name == "rwr" and settings["a"] == load_recipe("smoke", seed=0)
    wrong = small(arms={"a": {}, "b": {"objective": {"name": "rwr", "temprature": 0.1}}})
    runs = grid(wrong)
    with pytest.raises(UserError, match=r"arm 'b': recipe smoke.yaml: unknown key 'temprature' under 'objective'"):
        check(wrong, runs)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"baseline": "c"}, "baseline 'c' is no arm; known: a, b"),
        ({"arms": {"a": {}, "../b": {}}}, "arm '../b'; expected letters"),
        ({"seeds": [1, 1]}, "seeds [1, 1] has one twice"),
        ({"titel": "x"}, "unknown key 'titel'; did you mean 'title'?"),
        ({"question": None}, "question is None"),
    ],
)
def test_a_study_that_is_none_is_one_line(tmp_path: Path, capsys, changes: dict, words: str) -> None:
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(SMALL | changes))
    assert main(["study", str(tmp_path / "mine.yaml"), "--plan"]) == 2
    error = capsys.readouterr().err
    assert words in error and error.startswith("error: study mine.yaml: ") and len(error.splitlines()) == 1


def test_an_unknown_study_names_the_nearest(capsys) -> None:
    assert main(["study", "clippin"]) == 2
    assert "did you mean 'clipping'?" in capsys.readouterr().err


# Running.

FAKE = """
import json, pathlib, sys
output, status = pathlib.Path(sys.argv[1]), int(sys.argv[2])
print("trained", flush=True)
if status == 0:
    output.mkdir(parents=True, exist_ok=True)
    (output / "summary.json").write_text("{}")
elif status != 99:
    print("error: it blew up")
sys.exit(0 if status == 99 else status)
"""


def fake(monkeypatch, statuses: dict[str, int]) -> list[str]:
    """Training commands that end with these statuses, by run; 99 is a stop, which is status 0 without a summary."""
    started: list[str] = []

    def command(study, run, directory, config, num_gpus):
        started.append(run.name)
        return [sys.executable, "-c", FAKE, str(directory), str(statuses.get(run.name, 0))]

    monkeypatch.setattr(runner, "command", command)
    return started


def go(output: Path, config: str = "zero0.json", **changes) -> int:
    study = small(**changes)
    runs = grid(study, seeds=[0, 1])
    return runner.run_all(study, runs, check(study, runs), output, config=config, num_gpus=None, say=lambda line: None)


def test_finished_runs_are_left_alone_and_failures_are_noted(monkeypatch, tmp_path: Path) -> None:
    started = fake(monkeypatch, {"b-seed0": 1})
    assert go(tmp_path) == 0 and started == ["a-seed0", "b-seed0", "a-seed1", "b-seed1"]
    failed = Run("b", 0, [])
    assert runner.failure_of(tmp_path, failed) == {"status": 1, "reason": "error: it blew up"}
    assert runner.failure_of(tmp_path, Run("a", 0, [])) is None
    started = fake(monkeypatch, {})
    assert go(tmp_path) == 0 and started == ["b-seed0"], "what had failed is tried again"
    assert runner.failure_of(tmp_path, failed) is None


@pytest.mark.parametrize(("status", "told"), [(99, 130), (130, 130), (143, 143)])
def test_a_stopped_run_stops_the_study(monkeypatch, tmp_path: Path, status: int, told: int) -> None:
    started = fake(monkeypatch, {"b-seed0": status})
    assert go(tmp_path) == told and started == ["a-seed0", "b-seed0"]
    assert runner.failure_of(tmp_path, Run("b", 0, [])) is None


def test_a_finished_run_of_a_study_beside_this_one_is_taken(monkeypatch, tmp_path: Path) -> None:
    """Only for the same recipe, seed and DeepSpeed file; and a stopped or taken one is not taken again."""
    fake(monkeypatch, {"b-seed1": 99})
    assert go(tmp_path / "first") == 130
    for name, arm, seed in (("a-seed0", "a", 0), ("b-seed0", "b", 0), ("a-seed1", "a", 1)):
        settings = load_recipe("smoke", [f"{key}={value}" for key, value in SMALL["arms"][arm].items()], seed=seed)
        (tmp_path / "first" / name / "run.json").write_text(json.dumps({"recipe": settings.model_dump(mode="json")}))
    changes = {"arms": {"x": {"objective.kl_weight": 2.0}, "y": {}, "z": {"objective.kl_weight": 3.0}}, "baseline": "y"}
    started = fake(monkeypatch, {})
    assert go(tmp_path / "second", **changes) == 0 and started == ["z-seed0", "x-seed1", "z-seed1"]
    links = {path.name: path.readlink() for path in (tmp_path / "second").iterdir() if path.is_symlink()}
    assert links == {
        "x-seed0": Path("../first/b-seed0"), "y-seed0": Path("../first/a-seed0"), "y-seed1": Path("../first/a-seed1"),
    }  # fmt: skip
    started = fake(monkeypatch, {})
    assert go(tmp_path / "second", **changes) == 0 and started == []
    assert go(tmp_path / "third", config="zero1.json", **changes) == 0 and len(started) == 6


# Findings.


def test_intervals_are_students() -> None:
    for count in (2, 3, 5, 21):
        values = [math.sin(3 * number) for number in range(count)]
        found = findings.over_seeds(values)
        low, high = stats.t.interval(0.95, count - 1, loc=found["mean"], scale=found["stderr"])
        assert (found["low"], found["high"]) == (pytest.approx(low, rel=1e-6), pytest.approx(high, rel=1e-6))
    alone = findings.over_seeds([2.0, math.nan])
    assert (alone["mean"], alone["n"]) == (2.0, 1) and math.isnan(alone["low"])


def summary(before: float, after: float, held: float = 0.0) -> dict:
    def sets(first: float, second: float) -> dict:
        return {"before": {"mean": first, "strict": 0.1}, "after": {"mean": second, "strict": 0.3},
                "difference": {"mean": second - first}}  # fmt: skip

    return {
        "evaluation": {"unseen": sets(before, after) | {"held": {"other": sets(0.0, held)}}}, "images": 640, "wall_s": 120.0,
        "unet_forwards": {"rollout": 10, "update": 5},
    }  # fmt: skip


def write_runs(output: Path, gains: dict[str, list[float]]) -> None:
    for arm, of_seeds in gains.items():
        for seed, gain in enumerate(of_seeds):
            directory = output / f"{arm}-seed{seed}"
            directory.mkdir(parents=True)
            # The base differs from seed to seed by far more than the arms do.
            (directory / "summary.json").write_text(json.dumps(summary(seed, seed + gain, -gain)))
            rows = [{"epoch": epoch, "reward": seed + gain * epoch} for epoch in range(3)]
            (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_arms_are_compared_seed_by_seed(tmp_path: Path) -> None:
    """A gain that is a little lower on every seed is told apart, however much the seeds differ."""
    write_runs(tmp_path, {"a": [0.5, 1.5, 1.0], "b": [0.4, 1.39, 0.9]})
    found = findings.collect(small(), grid(small()), tmp_path)
    measured = found["b"]["measured"]
    assert measured["unseen"]["gain"]["mean"] == pytest.approx((0.4 + 1.39 + 0.9) / 3)
    against = measured["unseen"]["against"]
    assert against["mean"] == pytest.approx(-0.31 / 3) and against["verdict"] == "lower" and against["n"] == 3
    assert measured["unseen, other (held out)"]["against"]["verdict"] == "higher"
    assert measured["unseen, all right"]["gain"]["mean"] == pytest.approx(0.2)
    assert found["a"]["measured"]["unseen"]["against"]["verdict"] == "not told apart", "a baseline is no better than itself"
    assert found["b"]["cost"] == {"images": 640.0, "denoiser_rows": 15.0, "minutes": 2.0}


def test_what_the_seeds_do_not_tell_apart_is_said(tmp_path: Path) -> None:
    write_runs(tmp_path, {"a": [0.5, 1.5, 1.0], "b": [0.4, 1.6, 0.9]})
    found = findings.collect(small(), grid(small()), tmp_path)
    assert found["b"]["measured"]["unseen"]["against"]["verdict"] == "not told apart"
    few = findings.collect(small(), grid(small(), seeds=[0]), tmp_path)
    assert few["b"]["measured"]["unseen"]["against"]["verdict"] == "too few seeds"


def test_the_page_of_what_is_finished(tmp_path: Path, capsys) -> None:
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(SMALL))
    output = tmp_path / "study"
    write_runs(output, {"a": [0.5, 1.5, 1.0], "b": [0.4, 1.39]})
    (output / "b-seed2.failure.json").write_text('{"status": 1, "reason": "error: it blew up"}')
    assert main(["study", str(tmp_path / "mine.yaml"), "--output", str(output), "--page"]) == 0
    assert capsys.readouterr().out.strip() == str(output / "study.md")
    text = (output / "study.md").read_text()
    assert "- b, seed 2: error: it blew up" in text and "| b | 2 | " in text and "![](curves.png)" in text
    assert (output / "curves.png").read_bytes().startswith(b"\x89PNG")
    kept = json.loads((output / "study.json").read_text())
    assert kept["arms"]["b"]["failures"]["2"]["status"] == 1 and kept["study"]["baseline"] == "a"
    assert main(["study", str(tmp_path / "mine.yaml"), "--output", str(tmp_path / "none"), "--page"]) == 2


def test_a_page_of_arms_without_a_run() -> None:
    arms = {arm: {"seeds": [], "failures": {}, "measured": {}, "cost": {}} for arm in ("a", "b")}
    assert "| a | - | - | - | 0 |" in page(small(), arms, {}, None)


@pytest.mark.distributed
def test_a_study_in_its_short_form(tmp_path: Path, capsys, monkeypatch) -> None:
    """Two true runs, and the same command again, which runs nothing."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    words = [
        "study",
        "pairing",
        "--short",
        "--seeds",
        "0",
        "--arms",
        "random",
        "--config",
        "zero0.json",
        "--output",
        str(tmp_path),
    ]
    assert main(words) == 0, (tmp_path / "all-seed0.log").read_text()[-2000:]
    assert main(words) == 0
    assert capsys.readouterr().out.count("is finished") == 2
    kept = json.loads((tmp_path / "study.json").read_text())
    assert [kept["arms"][arm]["seeds"] for arm in ("all", "random")] == [[0], [0]]
    assert kept["arms"]["all"]["cost"]["images"] == kept["arms"]["random"]["cost"]["images"] == 16
