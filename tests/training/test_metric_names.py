"""The table of metrics: what the code writes is in it, what is in it the code writes, and docs/metrics.md has it."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from plain_engine import CLIP, PlainEngine, run
from small_model import small_policy, small_trajectories, small_unet

from prdp_fast.config.load import load_recipe
from prdp_fast.core import distributed, metric_names
from prdp_fast.core.records import Prompt, Scores
from prdp_fast.objectives import ObjectiveInput, build_objective
from prdp_fast.training.metrics import epoch_metrics, quantiles
from prdp_fast.training.update import Experience, UpdateReport, source_of
from prdp_kernels.prdp_loss.reference import STATS

ROOT = Path(__file__).parents[2]
OBJECTIVES = [
    "{name: prdp}", "{name: prdp, pairs: best_worst}", "{name: ddpo}", "{name: ddpo, normalization: global}", "{name: grpo}",
    "{name: dpok}", "{name: rwr}", "{name: rebel}",
]  # fmt: skip


def unknown(names) -> list[str]:
    return [name for name in names if metric_names.find(name) is None]


def written_names() -> set[str]:
    """Every name that the source puts into `metrics` or `numbers`, of f-strings what stands before the first value."""
    found = set()

    def add(node: ast.expr | None) -> None:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
        elif isinstance(node, ast.JoinedStr) and isinstance(node.values[0], ast.Constant):
            found.add("".join(part.value if isinstance(part, ast.Constant) else "0" for part in node.values))

    def is_metrics(node: ast.expr) -> bool:
        return getattr(node, "id", getattr(node, "attr", "")) in ("metrics", "numbers", "row", "found", "position", "stats")

    files = [*ROOT.glob("prdp_fast/objectives/*.py"), *(ROOT / "prdp_fast/training" / f"{name}.py" for name in
             ("metrics", "update", "telemetry", "trainer"))]  # fmt: skip
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AugAssign) else []
            for target in targets:
                if isinstance(target, ast.Subscript) and is_metrics(target.value):
                    add(target.slice)
                elif is_metrics(target):
                    for inner in ast.walk(node.value):
                        for key in inner.keys if isinstance(inner, ast.Dict) else []:
                            add(key)
                        if isinstance(inner, ast.DictComp):
                            add(inner.key)
    return found


def test_every_name_that_the_source_writes_is_in_the_table() -> None:
    names = written_names()
    assert names >= {
        "clip_fraction",
        "kl_penalty",
        "drift",
        "unscored",
        "memory/host_peak_bytes",
        "position/pass",
        "images_per_s",
    }
    assert not unknown(names | set(STATS))


def test_every_name_in_the_table_is_written() -> None:
    text = "\n".join(
        path.read_text() for folder in ("prdp_fast", "kernels/prdp_kernels") for path in (ROOT / folder).rglob("*.py")
        if path.name != "metric_names.py"
    )  # fmt: skip
    for metric in metric_names.METRICS:
        first = metric.name.partition("/")[0]
        assert re.search(rf"[\"']{first}(\"|'|/)", text), f"{metric.name}: nothing writes it"
    assert len({metric.name for metric in metric_names.METRICS}) == len(metric_names.METRICS)


def test_the_page_has_the_table() -> None:
    assert metric_names.table() in (ROOT / "docs" / "metrics.md").read_text()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("reward/http/part", "reward/NAME"), ("reward_quantile/q05", "reward_quantile/qNN"),
        ("reward_quantile/anime/q50", "reward_quantile/SOURCE/qNN"), ("drift/step_017", "drift/step_NNN"), ("drift", "drift"),
        ("drift/step_x", None), ("new_metric", None), ("seconds", None), ("pairs/x", None),
    ],
)  # fmt: skip
def test_names_are_found(name: str, expected: str | None) -> None:
    found = metric_names.find(name)
    assert (found and found.name) == expected


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_objective_writes_what_the_table_has(objective: str) -> None:
    torch.manual_seed(0)
    log_probs = torch.randn(2, 4, 3) * 1e-3
    batch = ObjectiveInput(
        log_probs, log_probs - 1e-3, log_probs + 1e-3, torch.rand(2, 4), 0.5, 0.3, elements=8,
        seeds=torch.arange(8).view(2, 4), statistics=torch.ones(2, 2),
    )  # fmt: skip
    one = build_objective(load_recipe("smoke", [f"objective={objective}"]).objective, "torch")
    metrics = one(batch).metrics
    assert metrics and not unknown(metrics)
    clipped = one.outside_clip(log_probs - batch.old_log_probs)
    assert (clipped is None) == ("clip_fraction" not in metrics)
    if clipped is not None and "best_worst" not in objective:
        assert float(clipped.float().mean()) == pytest.approx(float(metrics["clip_fraction"]))


# ------------------------------------------------------------------------------------------------------- numbers of an update
def updated(updates: int, rewards: torch.Tensor | None = None, **options: int) -> UpdateReport:
    policy = small_policy()
    trajectories = small_trajectories(policy, small_unet(0), dtype=torch.float64)
    given = {} if rewards is None else {"rewards": rewards}
    reference = small_unet(1, torch.float64).requires_grad_(False)
    return run(policy, PlainEngine(small_unet(0, torch.float64)), reference, trajectories, updates, 24, **given, **options)


def test_numbers_by_step_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean over steps of a share is the share; the largest of them the largest."""
    report = updated(3, torch.tensor([0.3, 0.9, 0.1, float("nan"), 0.2, 0.8], dtype=torch.float64))
    monkeypatch.setattr(distributed, "all_reduce", lambda values, op: values)
    scores = Scores(torch.rand(6), {"a": torch.rand(6)}, {})
    row = epoch_metrics(Experience(SimpleNamespace(prompts=[]), scores, None), report)  # type: ignore[arg-type]
    assert not unknown(row)

    def steps(name: str) -> list[float]:
        return [value for key, value in row.items() if key.startswith(f"{name}/step_")]

    assert 0 < row["clip_fraction"] < 1 and len(steps("clip_fraction")) == len(steps("drift")) == 4
    assert sum(steps("clip_fraction")) / 4 == pytest.approx(row["clip_fraction"])
    assert max(steps("drift")) == pytest.approx(row["drift"])
    assert max(steps("ratio")) > CLIP, "some went beyond the clip range"
    assert len(steps("kl_to_reference")) == 4


def test_a_single_update_has_no_ratios_and_a_drawn_reference_no_steps() -> None:
    report = updated(1, reference_timesteps=2)
    assert {name.partition("/")[0] for name in report.by_step.peaks} == {"drift"} and not report.by_step.means


# ------------------------------------------------------------------------------------------------------------- rewards by source
def test_quantiles_are_of_all_ranks_and_of_each_source() -> None:
    found = quantiles([[0.0, 1.0, float("nan")], [2.0, 3.0, 4.0]], [["a", "b", "a"], []])
    assert found["reward_quantile/q50"] == 2.0 and found["reward_quantile/q25"] == 1.0
    assert found["reward_quantile/a/q95"] == 0.0 and found["reward_quantile/b/q05"] == 1.0
    assert not unknown(found) and len(found) == 15
    assert quantiles([[float("nan")]], [[]]) == {}
    many = quantiles([[1.0] * 40], [[str(number // 2) for number in range(40)]])
    assert len(many) == 5 * 17, "the row does not grow with the prompts"


def test_the_source_of_a_prompt() -> None:
    prompts = [Prompt(0, "x", {"source": "s", "part": "p"}), Prompt(1, "x", {"part": "p"}), Prompt(2, "x", {"source": 3})]
    assert [source_of(prompt) for prompt in prompts] == ["s", "p", None]
    experience = Experience(SimpleNamespace(prompts=prompts, images_per_prompt=2), None, None)  # type: ignore[arg-type]
    assert experience.sources == ["s", "s", "p", "p", None, None]
    experience.trajectories.prompts = prompts[2:]
    assert experience.sources == []
