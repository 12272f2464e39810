"""`auto` compiles what pays in the rest of the job, and remembers what compiling took here."""

from __future__ import annotations

import pytest
import torch
from small_model import small_family, small_unet

from prdp_fast.acceleration import choose as choosing
from prdp_fast.acceleration.choose import Denoisers, accelerate
from prdp_fast.acceleration.payback import KEPT, SECONDS, WorkLeft, key_of, learn_seconds, learnt_seconds, payback
from prdp_fast.acceleration.probe import Decision
from prdp_fast.config.load import load_recipe
from prdp_fast.config.recipe import PerformanceSettings
from prdp_fast.core.files import read_json
from prdp_fast.planning.job import Job
from prdp_fast.training.speed import work_left
from prdp_fast.training.state import TrainState

CPU, ROWS = torch.device("cpu"), 4


def work(rows: float, seconds: float | None = None) -> WorkLeft:
    return WorkLeft({"trained": rows, "rollout": rows, "reference": rows}, seconds)


def test_by_hand() -> None:
    """A rollout of 1,000 rows of a tenth of a second: a third of 100 s, against 54 s for a model of SD 1's 38 blocks."""
    found = payback("rollout", work(1000), 0.1, 38, {})
    assert (found.saves, found.costs) == (pytest.approx(32), 54) and not found.pays
    assert payback("rollout", work(2000), 0.1, 38, {}).pays
    assert not payback("rollout", work(2000, seconds=60), 0.1, 38, {}).pays  # the job ends before
    assert payback("rollout", work(1000), 0.1, 19, {}).pays  # half the blocks
    assert payback("rollout", work(1000), 0.1, 38, {"rollout": 8.0}).costs == 8  # from a warm cache
    # Of a call that is 1.25 times as fast as diffusers' own, 15 of 100 s: compiled it would take .68 of 125.
    assert payback("rollout", work(1000), 0.1, 38, {}, gained=1.25).saves == pytest.approx(15)
    slower = payback("rollout", work(1000), 0.1, 38, {}, gained=1.6)
    assert not slower.pays and "slower than the project's own kernels" in str(slower)


@pytest.fixture
def as_on_cuda(monkeypatch):
    """Plan as on CUDA, and compile nothing."""
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)  # where another test may have learnt how long it takes
    real, cuda = choosing.plan_compiling, torch.device("cuda")
    monkeypatch.setattr(choosing, "plan_compiling", lambda setting, device, *rest: real(setting, cuda, *rest))
    monkeypatch.setattr(torch, "compile", lambda forward, **options: forward)


def decide(rows: float | None, remembered=None, mode: str = "auto") -> dict[str, Decision]:
    return accelerate(
        Denoisers(small_unet(), None, small_unet().requires_grad_(False)), PerformanceSettings(compile=mode, attention="sdpa"),
        small_family(), train_rows=ROWS, sample_rows=ROWS, stage=2, device=CPU, dtype=torch.float32,
        work=None if rows is None else work(rows), remembered=remembered,
    ).decisions  # fmt: skip


def test_a_short_job_is_not_compiled(as_on_cuda) -> None:
    decisions = decide(100)
    reasons = [decision.reason for name, decision in decisions.items() if name.startswith("compile")]
    assert len(reasons) == 3 and all("saves about 0 s of this job, costs about" in reason for reason in reasons)


@pytest.mark.parametrize("rows", [1e9, None])
def test_a_long_job_is_tried(as_on_cuda, rows) -> None:
    tried = [decision for name, decision in decide(rows).items() if name.startswith("compile")]
    assert tried and not any("of this job" in decision.reason for decision in tried)
    assert "first call" in tried[0].milliseconds


def test_what_the_user_set_is_compiled_in_a_short_job_too(as_on_cuda) -> None:
    assert all(decision.value == "full" for name, decision in decide(1, mode="full").items() if name.startswith("compile"))


def test_a_resumed_run_keeps_what_it_compiled(as_on_cuda) -> None:
    past = {f"compile {role}": {"value": "full"} for role in SECONDS}
    assert not any("of this job" in decision.reason for decision in decide(1, remembered=past).values())


def test_what_it_took_is_remembered(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    key = key_of(small_unet(), ROWS, CPU)
    assert learnt_seconds(key) == {}
    learn_seconds(key, {"compile rollout": Decision("full", "", {"first call": 8000.0}), "compile trained": Decision("off", "")})
    learn_seconds("another", {"compile rollout": Decision("full", "", {"first call": 9000.0})})
    assert learnt_seconds(key) == {"rollout": 8.0} and len(read_json(tmp_path / KEPT)) == 2
    (tmp_path / KEPT).write_text('["spoilt"]')
    assert learnt_seconds(key) == {}
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    assert learnt_seconds(key) == {}


def test_the_work_that_is_left_of_a_job() -> None:
    settings = load_recipe("smoke", ["schedule.epochs=10", "schedule.time_limit_minutes=3", "schedule.updates_per_epoch=1"])
    job = Job.prepare(settings, "zero2.json", world_size=2, cuda=False)
    images, left = 4 * 4, 6 / 2  # of an epoch; 6 epochs, 2 ranks
    found = work_left(job, TrainState(epoch=4, wall_s=100.0))
    # 4 steps, 3 of them with a density, two evaluations each under guidance.
    assert found.rows == {"trained": left * images * 3 * 2, "rollout": left * images * 4 * 2, "reference": left * images * 3 * 2}
    assert found.seconds == 180  # each start has them all
