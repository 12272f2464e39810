"""The short form of `make fault-campaign`: faults in running jobs that no other test makes; and that its verdicts can be bad."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from campaign import facts
from campaign.cases import every
from campaign.command import main, play
from campaign.judge import VERDICTS, judge
from campaign.scene import Case, Kit, Scene, Start
from campaign.table import Row, Table
from safetensors.torch import save_file

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

SEED = 3
CASES = every()
BROKEN = """
import sys
from prdp_fast import train
{extra}
sys.exit(train.main())
"""


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kit]:
    folder = tmp_path_factory.mktemp("campaign")
    yield Kit(folder)
    shutil.rmtree(folder)


@pytest.mark.parametrize("case", [case for case in CASES if case.short], ids=lambda case: case.name)
def test_a_fault(kit: Kit, case: Case) -> None:
    row, scene = play(case, kit, SEED)
    if row.skipped:
        pytest.skip(row.skipped)
    assert row.is_sound, f"{row.when}\n{row.verdicts}\n" + "\n---\n".join(start.text[-3000:] for start in scene.starts)


@pytest.mark.parametrize(
    ("name", "extra", "verdicts"),
    [
        (
            "newest checkpoint, one bit flipped in average (1 rank, stage 1, EMA)",
            "from prdp_fast.core import checkpoint_files\ncheckpoint_files.content_fault = lambda *_: None",
            {"silent", "unexpected"},
        ),
        (
            "SIGUSR1 in checkpoint",
            "from prdp_fast.training.watch import Watch\nWatch.save = lambda *_, **__: None",
            {"lost"},
        ),
    ],
    ids=["an engine that verifies nothing", "an engine that saves nothing"],
)
def test_a_broken_engine_is_found_out(kit: Kit, tmp_path: Path, name: str, extra: str, verdicts: set[str]) -> None:
    script = tmp_path / "broken.py"
    script.write_text(BROKEN.format(extra=extra))
    case = next(case for case in CASES if case.name == name)
    kit.reference(case.setting)
    row, _ = play(case, replace_script(kit, script), SEED)
    assert verdicts <= {found for found in VERDICTS if row.verdicts[found]}, row


def replace_script(kit: Kit, script: Path) -> Kit:
    other = object.__new__(Kit)
    other.__dict__.update(kit.__dict__ | {"script": script})
    return other


# The judges, without a job.


def run_of(folder: Path, *, weight: float = 1.0, reward: float = 0.5, epochs: int = 2) -> Path:
    """What a finished run leaves, as far as it is compared."""
    (folder / "model").mkdir(parents=True)
    save_file({"w": torch.tensor([weight, 2.0])}, folder / "model/w.safetensors")
    rows = [{"epoch": epoch, "reward": reward, "loss": 2.0, "seconds/update": random.random()} for epoch in range(epochs)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "summary.json").write_text('{"evaluation": {}}')
    torch.save({"seen": {"rewards": torch.tensor([reward, float("nan")])}}, folder / "evaluation_before.pt")
    return folder


def test_results_are_compared_to_the_bit(tmp_path: Path) -> None:
    expected = run_of(tmp_path / "expected")
    assert facts.difference(run_of(tmp_path / "same"), expected) is None
    found = {
        name: facts.difference(run_of(tmp_path / name, **change), expected)
        for name, change in {
            "weights": {"weight": 1.0000001}, "nan": {"weight": float("nan")}, "reward": {"reward": 0.5000001},
            "rows": {"epochs": 3},
        }.items()
    }  # fmt: skip
    assert found["weights"] == "model/w.safetensors:w by up to 1.2e-07" and "not finite" in found["nan"]
    assert found["reward"] == "metrics.jsonl, epoch 0: reward" and "has the epochs [0, 1, 2]" in found["rows"]
    assert facts.difference(tmp_path / "weights", expected, rate=1e-6) is None
    assert facts.difference(run_of(tmp_path / "step", weight=1.00001), expected, rate=1e-6) is not None
    assert facts.difference(tmp_path / "reward", expected, rate=1e-6) == "evaluation_before.pt"
    assert "reward 0.6, expected 0.5" in str(facts.difference(run_of(tmp_path / "far", reward=0.6), expected, rate=1e-6))
    (tmp_path / "same/summary.json").unlink()
    assert facts.difference(tmp_path / "same", expected) == "same is not finished"


class NoKit:
    def reference(self, setting: object) -> tuple[Path, Path]:
        raise AssertionError("nothing is compared")


@pytest.mark.parametrize(
    ("whole", "text", "after", "lost"),
    [
        (3, "continuing after epoch 3 from epoch-000003", 4, False),
        (3, "continuing after epoch 2 from epoch-000002", 4, True),
        (3, "epoch 1/4  reward 0.1", 4, True),
        (0, "epoch 1/4  reward 0.1", 1, False),
        (2, "continuing after epoch 2 from epoch-000002", 1, True),
        (0, "stopped by SIGTERM: 3 of 4 epochs are saved in RUN; the same command goes on", 3, False),
        (0, "stopped by SIGTERM: 3 of 4 epochs are saved in RUN; the same command goes on", 2, True),
    ],
)
def test_lost_checkpoints(monkeypatch, tmp_path: Path, whole: int, text: str, after: int, lost: bool) -> None:
    """Args: whole, after: epoch of the newest whole one before and after a start."""
    scene = Scene(CASES[0], tmp_path, random.Random(0), NoKit())
    scene._whole = whole
    monkeypatch.setattr(facts, "newest_whole", lambda run: after)
    scene.look_for_losses(Start(0, 1.0, text, 0))
    assert bool(scene.lost) == lost


def test_a_traceback_and_untold_damage(tmp_path: Path) -> None:
    case = replace(CASES[0], compare="no")
    scene = Scene(case, tmp_path, random.Random(0), NoKit())
    scene.starts.append(Start(2, 1.0, "weights.pt is fine", 0))
    scene.must_name("weights.pt")  # from the next start on
    scene.starts.append(Start(1, 1.0, "Traceback (most recent call last):", 0))
    verdicts = judge(case, scene)
    assert verdicts["traceback"] == ["start 2 shows a traceback"] and verdicts["silent"] == ["no line names weights.pt"]
    assert not judge(replace(case, mendable=False), scene)["traceback"]


def test_the_table_counts_what_was_found(tmp_path: Path) -> None:
    good = Row("a | b", "1 rank", "now", [0], [1.0], "said", {name: [] for name in VERDICTS}, compared="exact")
    bad = replace(good, verdicts=good.verdicts | {"lost": ["epoch 3"], "hung": ["start 1"]})
    table = Table(tmp_path / "table", "make fault-campaign", 1)
    for row in (good, bad, replace(good, verdicts={}, skipped="no mount")):
        table.add(row)
    written = json.loads((tmp_path / "table.json").read_text())
    assert written["totals"] == {
        "faults": 2, "not possible here": 1, "starts": 2, "lost checkpoints": 1, "silent corruptions": 0, "hangs": 1,
        "tracebacks": 0, "resumed runs that differ": 0, "otherwise than documented": 0,
    }  # fmt: skip
    assert written["status"] == "unfinished" and written["commit"]
    page = (tmp_path / "table.md").read_text()
    assert "| lost checkpoints | 1 |" in page and "a \\| b" in page and "**lost checkpoints**: epoch 3" in page


def test_the_campaign_has_the_faults_that_it_promises(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0 and len(capsys.readouterr().out.splitlines()) == len(CASES) >= 60
    assert {case.setting.ranks for case in CASES} == {1, 2} and {case.setting.stage for case in CASES} == {0, 1, 2, 3}
    assert all({getattr(case.setting, name) for case in CASES} == {True, False} for name in ("offload", "lora", "ema"))
    assert main(["--only", "no such fault"]) == 2


# What quietly spoilt a run once, or did not say what was wrong. Words of the names of cases.
ON_ANY_NUMBER_OF_RANKS = (
    "evaluation_before.pt", "evaluation_before.pt of other prompts", "newest checkpoint, one bit flipped in optimizer",
    "newest checkpoint, half of", "newest checkpoint, missing: state", "all checkpoints", "a corrupt pickle", "a program in",
    "objective.kl_weight 1e-300", "a reward answers 1e38", "a reward calls sys.exit(0)", "SIGKILL of the launcher",
    "SIGTERM to deepspeed", "SIGHUP to deepspeed", "a second job", "two jobs in one directory", "the next job after one",
    "is emptied", "a reward raises", "a reward hangs", "hangs in the background",
)  # fmt: skip


@pytest.mark.parametrize("words", ON_ANY_NUMBER_OF_RANKS)
def test_the_campaign_tries_it_on_one_rank_and_on_two(words: str) -> None:
    assert {case.setting.ranks for case in CASES if words in case.name} == {1, 2}
