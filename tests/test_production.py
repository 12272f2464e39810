"""docs/production.md: what it names of keys, files, statuses, times and lines is what the code has."""

from __future__ import annotations

import argparse
import errno
import json
import os
import re
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import torch
from test_security import is_test

from prdp_fast import train
from prdp_fast.config.deepspeed import resolve_config
from prdp_fast.config.load import load_recipe
from prdp_fast.config.recipe import ScheduleSettings
from prdp_fast.config.tracking import PrometheusSettings
from prdp_fast.core import checkpoint_files, last_words, parents, ranks, run_directory, run_lock, stops, watchdog
from prdp_fast.core.errors import AgreedError, OneRankError, UserError
from prdp_fast.core.stops import Request, Stopped
from prdp_fast.training import trainer as trainer_module
from prdp_fast.training.checkpoint import Checkpoints
from prdp_fast.training.trackers import build, feed
from prdp_fast.training.trackers.base import RunToTrack
from prdp_fast.training.trackers.prometheus import Prometheus
from prdp_fast.training.watch import Watch

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "production.md").read_text(encoding="utf-8")
RUN = "/runs/sd14"  # of the page's lines
DAMAGED, NUMBERS = "tests/integration/test_damaged_checkpoints.py", "tests/integration/test_fault_campaign.py"
# First cell of each line in the tables that say what happens, and the tests that hold the line.
HELD = {
    "SIGTERM, SIGUSR1, SIGHUP": ["tests/core/test_stop_requests.py::test_a_signal_is_noted_and_interrupts_only_what_may_be"],
    "SIGINT (Ctrl-C)": ["tests/integration/test_stops.py::test_an_interrupted_run_of_one_process_has_status_130"],
    "`prdp train --num_gpus N`": ["tests/core/test_launcher.py::test_the_status_is_that_of_the_stop"],
    "`torchrun`": ["tests/config/test_launch_examples.py::test_the_grace_fits_into_what_the_launcher_gives"],
    "`deepspeed`": [
        "tests/integration/test_stops.py::test_ranks_notice_that_the_deepspeed_command_above_their_launcher_is_gone",
        f"{NUMBERS}::test_the_campaign_tries_it_on_one_rank_and_on_two",
    ],
    "`srun`": ["tests/config/test_launch_examples.py::test_slurm_s_options_are_before_the_first_command"],
    "ranks that do not divide the prompts of an epoch": [
        "tests/integration/test_elastic.py::test_other_ranks_that_do_not_divide_the_epoch_are_told_which_do"
    ],
    "another precision (bf16, fp16, float32)": ["tests/core/test_run_directory.py::test_the_precision_stays"],
    "quantised weights or gradients of ZeRO": ["tests/test_production.py::test_quantised_weights_are_another_run"],
    "stage 3 where the recipe keeps a moving average": ["tests/test_production.py::test_stage_3_keeps_no_average"],
    "offload to NVMe, on one of the two sides": ["tests/training/test_reshard.py::test_files_for_nvme"],
    "a file of a checkpoint: one bit, half of it, all of it": [
        f"{DAMAGED}::test_a_run_falls_back_and_ends_as_if_nothing_had_happened"
    ],
    "every checkpoint": [f"{DAMAGED}::test_without_a_whole_one_the_run_is_refused"],
    "`evaluation_before.pt`, `acceleration.json`": [
        "tests/integration/test_train.py::test_a_lost_evaluation_of_the_reference_is_that_of_the_reference_again",
        "tests/training/test_results.py::test_a_file_of_other_prompts_is_another_run_s",
        "tests/integration/test_goes_on.py::test_time_limited_starts_go_on_until_every_epoch_is_done",
    ],
    "`run.json`": ["tests/core/test_run_directory.py::test_a_damaged_record_is_made_again_only_where_nothing_is_computed"],
    "a shard of prompts": ["tests/integration/test_one_rank_faults.py::test_a_shard_that_only_one_rank_needs"],
    "the server of [prompts behind a URL](prompts.md#from-a-url)": [
        "tests/prompts/test_prompt_urls.py::test_what_passes",
        "tests/prompts/test_prompt_urls.py::test_giving_up",
        "tests/prompts/test_prompt_urls.py::test_a_server_that_is_away",
    ],
    "rows of `metrics.jsonl`": [f"{NUMBERS}::test_a_fault"],
    "no room, or a read-only disk, for a checkpoint, a tracker or a picture": [
        f"{DAMAGED}::test_a_full_disk_is_a_line_and_training_goes_on",
        "tests/training/test_telemetry.py::test_tensorboard_without_room_ends_nothing",
        f"{NUMBERS}::test_a_fault",
    ],
    "no room at the end": [f"{DAMAGED}::test_a_last_checkpoint_without_room_fails_the_run_after_the_export"],
    "0": ["tests/integration/test_stops.py::test_a_stop_inside_a_reward_is_saved_and_goes_on_bit_for_bit"],
    "1": [
        "tests/integration/test_stops.py::test_a_killed_rank_is_named_and_no_other_has_a_traceback",
        "tests/integration/test_stops.py::test_a_rank_that_fails_alone_speaks_first_and_alone",
    ],
    "2": [f"{DAMAGED}::test_without_a_whole_one_the_run_is_refused"],
    "3": ["tests/integration/test_stops.py::test_a_rank_that_does_not_come_is_named_and_every_rank_leaves_its_stacks"],
    "130": ["tests/integration/test_stops.py::test_an_interrupted_run_of_one_process_has_status_130"],
}


# Lines of the table of times, by what the results file calls them.
FIGURES = {
    "written at once: training stands still": "written at once: training stands still",
    "copied: training stands still": "copied, from then on: training stands still",
    "the first copy of a start, for which the system has to find the memory": "copied, the first time: training stands still",
    "from the beginning of a copy until the checkpoint is there": "copied, from then on: until the checkpoint is there",
    "a bare copy of as many bytes": "a bare copy of as many bytes",
    "verified, from the disk": "verify",
    "loaded, from the disk": "load",
}


def tables() -> list[list[list[str]]]:
    """Cells of every table, heads left out."""
    found = re.findall(r"(?:^\|.*\n)+", PAGE, re.MULTILINE)
    return [[[cell.strip() for cell in line.strip("|").split("|")] for line in one.splitlines()][2:] for one in found]


def table(heading: str) -> dict[str, str]:
    """First cell and last of the first table under a heading."""
    (rows,) = (one for one in tables() if PAGE.index(one[0][0]) and under(heading, one))
    return {row[0]: row[-1] for row in rows}


def under(heading: str, rows: list[list[str]]) -> bool:
    part = PAGE.split(f"# {heading}\n")[1].split("\n#")[0]
    return f"| {' | '.join(rows[0])} |" in part


def test_every_line_of_its_tables_is_held_by_tests() -> None:
    lines = [row[0] for one in tables() if one[0][0] not in FIGURES for row in one if not row[0].startswith("`configs/launch/")]
    assert sorted(lines) == sorted(HELD) and len(tables()) == 7
    assert [test for tests in HELD.values() for test in tests if not is_test(test)] == []


def test_figures_are_those_that_were_measured() -> None:
    (rows,) = (one for one in tables() if one[0][0] in FIGURES)
    parts = json.loads((ROOT / "benchmarks/results/async-save-cpu-2026-11-28.json").read_text())["parts"]
    found = {row[0]: tuple(row[1:]) for row in rows}
    measured = {words: parts[name] for words, name in FIGURES.items()}
    assert found == {words: (f"{one['seconds']:.1f}", f"{one['gb_per_s']:.2f}") for words, one in measured.items()}


def test_statuses() -> None:
    found = {name: int(status) for names, status in table("Stops").items() for name in re.findall(r"SIG\w+", names)}
    assert found == stops.STATUS
    assert {int(status) for status in table("Exit status")} == {
        0, last_words.FAILED, watchdog.LOST_RANK, 2, watchdog.HUNG, *stops.STATUS.values()
    }  # fmt: skip
    assert table("Exit status")[str(watchdog.HUNG)] == "a rank did not come in time"
    assert table("Exit status")[str(last_words.FAILED)].startswith("a rank died")


def test_times_and_numbers() -> None:
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    schedule, patience_s = ScheduleSettings(), load_recipe("smoke").collective_timeout_s
    prose = " ".join(PAGE.split())
    for words in (
        f"`--grace` ({parser.parse_args([]).grace:g} seconds) is the time",
        f"`schedule.reward_timeout_s` ({schedule.reward_timeout_s:g}) for a call",
        f"`schedule.collective_timeout_minutes` for the others, {patience_s / 60:g} unless rewards",
        f"Then the run ends with status {watchdog.HUNG}:",
        f"trackers have {build.CLOSING_S:g} seconds together", "up to three times", "within 90 seconds what rank 0 has written",
        f"prometheus: {{port: {PrometheusSettings().port}}}", "It is on the loopback address unless `host` says otherwise",
        "`schedule.stop_after` stops a run likewise after so many minutes", "`configs/launch/slurm.sbatch`",
    ):  # fmt: skip
        assert words in prose, words
    assert (feed.MOST_TRIES, train.SHARED_S, PrometheusSettings().host) == (3, 90.0, "127.0.0.1")


def test_files_and_variables() -> None:
    names = {value for name, value in vars(run_directory).items() if name.isupper() and isinstance(value, str)} | {ranks.RANKS}
    spans = set(re.findall(r"`([^`\n]+)`", PAGE))
    files = {span for span in spans if re.fullmatch(r"[\w-]+\.(json|jsonl|pt|txt)|[a-z]+/", span)} - {"stacks-00005.txt"}
    assert files >= {"run.json", "metrics.jsonl", "evaluation_before.pt", "acceleration.json", "ranks/", "trackers/"}
    assert {name.rstrip("/") for name in files} <= names
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "prdp_fast").rglob("*.py"))
    variables = {span for span in spans if re.fullmatch(r"[A-Z][A-Z_]{4,}", span)} - {"SIGTERM", "SIGKILL"}
    assert variables >= {"SLURM_JOB_END_TIME", "MLFLOW_TRACKING_URI"}
    libraries = {"WANDB_API_KEY", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"}  # which the trackers' own clients read
    assert not [name for name in variables - libraries if name not in source]
    may_change = ("schedule.micro_batch", "sampler.rollout_batch", "performance.coalesce_gradients")
    assert may_change == run_directory.ROUNDS and all(f"`{name}`" in PAGE for name in may_change)
    assert all(key in run_directory.MAY_CHANGE for key in (*may_change, "tracking"))


def test_quantised_weights_are_another_run(tmp_path: Path) -> None:
    job = {"recipe": {"seed": 0}, "deepspeed": {"zero_optimization": {"stage": 3}}}
    run_directory.claim(tmp_path, job, "auto")
    for key in ("zero_quantized_weights", "zero_quantized_gradients"):
        with pytest.raises(UserError, match=rf"{key} was None, now True"):
            run_directory.claim(tmp_path, job | {"deepspeed": {"zero_optimization": {"stage": 3, key: True}}}, "auto")


def test_stage_3_keeps_no_average() -> None:
    settings = load_recipe("smoke", ["model.ema_decay=0.9"])
    with pytest.raises(UserError, match=r"at ZeRO stage 3 no average is kept"):
        resolve_config("zero3.json", settings, world_size=1, stochastic_steps=3, cuda=False)


# The lines that a job prints, as the page has them.


@cache
def examples() -> list[str]:
    return [line for block in re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]


def example(start: str) -> str:
    (line,) = (line for line in examples() if line.startswith(start))
    return line


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Rank 5 of 8 in epoch 412, with a checkpoint of epoch 400; and a call that makes the page's places of this test's."""
    run = tmp_path / "run"
    (run / "ranks").mkdir(parents=True)
    (run / "checkpoints/epoch-000400").mkdir(parents=True)
    monkeypatch.setattr(ranks.socket, "gethostname", lambda: "gpu-01")
    ranks.join(run, "start", 5, 8)
    ranks.enter("rollout", 412)
    yield SimpleNamespace(run=run, plain=lambda text: text.replace(str(run), RUN))
    ranks.forget()


class Ended(BaseException):
    pass


def ends(status: int) -> NoReturn:
    raise Ended(status)


def a_trainer(**more: Any) -> Any:
    return SimpleNamespace(
        state=SimpleNamespace(epoch=412, start_clock=lambda: None), output=Path(RUN), watch=SimpleNamespace(save=lambda: None),
        job=SimpleNamespace(settings=SimpleNamespace(schedule=SimpleNamespace(epochs=1000)), images_per_rank=8), **more,
    )  # fmt: skip


@pytest.mark.parametrize("start", ["stopped by SIGTERM: 412 of", "stopped by the end of its launcher"])
def test_a_stop_that_is_saved(monkeypatch, start: str) -> None:
    reason = "SIGTERM"
    if "launcher" in start:
        monkeypatch.setattr(os, "getppid", lambda: 1)
        reason = parents.gone({4711: "deepspeed"})
    stop = Stopped(Request(reason, 0))
    with pytest.raises(Stopped), trainer_module.Trainer.saved_if_stopped(a_trainer()):
        raise stop
    assert example(start) == f"stopped by {stop}: {stop.kept}; the same command goes on"


def test_a_grace_that_is_over(job, monkeypatch, capsys) -> None:
    ranks.enter("update", 412)
    monkeypatch.setattr(stops, "_request", Request("SIGTERM", 0))
    monkeypatch.setattr(os, "_exit", ends)
    with pytest.raises(Ended):
        stops.end_now()
    assert capsys.readouterr().err == example("stopped by SIGTERM: phase update") + "\n"


def test_other_ranks_and_stages(job) -> None:
    one, other = (
        {"world_size": ranks, "deepspeed": {"zero_optimization": {"stage": stage}}} for ranks, stage in ((2, 2), (1, 3))
    )
    assert run_directory.spread_notes(one, other) == [example("continuing on")]
    told: list[str] = []
    going_on = a_trainer(
        checkpoints=SimpleNamespace(load=lambda load: Path("epoch-000400")), telemetry=SimpleNamespace(message=told.append),
        engine=SimpleNamespace(load=None, resharded="2 ranks at ZeRO stage 2"),
    )  # fmt: skip
    going_on.watch.weight_fault, going_on.state.epoch = (lambda: None), 400
    trainer_module.Trainer.resume(going_on)
    assert told == [example("continuing after")]


def test_a_directory_in_use(tmp_path: Path, monkeypatch) -> None:
    def taken(*_: object) -> None:
        raise OSError(errno.EWOULDBLOCK, "taken")

    monkeypatch.setattr("fcntl.flock", taken)
    (tmp_path / run_lock.LOCK).write_text(json.dumps({"host": "gpu-01", "pid": 4711, "since": "2026-03-02 16:00:01"}))
    with pytest.raises(UserError) as caught:
        run_lock.lock(tmp_path)
    assert f"error: {caught.value}".replace(str(tmp_path), RUN) == example("error: --output")


def test_a_rank_that_dies_or_fails(job, capsys) -> None:
    lost = {"rank": 5, "pid": 4716, "host": "gpu-01", "phase": "update", "epoch": 412}
    assert watchdog.lost_line(lost) == example("error: rank 5 of 8 (process")
    assert last_words.unexpected(KeyError("boom")) == 1
    assert capsys.readouterr().err.splitlines()[0] == example("error: rank 5 of 8 failed")


def test_memory_that_is_too_small() -> None:
    def attempt(size: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    going_on = a_trainer(telemetry=SimpleNamespace(message=lambda line: None))
    with pytest.raises(OneRankError) as caught:
        trainer_module.Trainer.in_batches(going_on, "rollout", 1, attempt)
    told: list[str] = []
    going_on.watch.stop = lambda reason: told.append(f"error: {reason}; 412 finished epochs are saved in {RUN}")
    going_on.job.settings.schedule = SimpleNamespace(on_failure="stop", max_repeats=3)

    def collect() -> None:
        raise AgreedError(f"{caught.value} (on rank 5)")

    trainer_module.Trainer.repeatable(going_on, "epoch 412", collect)
    assert told == [example("error: out of memory")]


def test_a_rank_that_waits(job, monkeypatch, capsys) -> None:
    other = {"rank": 5, "pid": 4716, "host": "gpu-01", "phase": "rollout", "epoch": 412, "since": "2026-03-02 16:00:01",
             "waiting": None, "job": "start", "left": None}  # fmt: skip
    ranks.join(job.run, "start", 0, 8)
    ranks._put(job.run / "ranks/rank-00005.json", other)
    ranks.enter("reward", 412)
    monkeypatch.setattr(ranks, "is_stopped", lambda pid: pid == 4716)
    monkeypatch.setattr(ranks, "vanished", lambda: None)
    monkeypatch.setattr(watchdog, "ANSWERS_S", 0.0)
    monkeypatch.setattr(watchdog.os, "_exit", ends)
    dog = watchdog.Watchdog()
    dog.launchers, dog.patience_s = {}, load_recipe("smoke").collective_timeout_s
    with ranks.waiting("all_gather_object"):
        ranks.here().waiting_since = time.monotonic() - 1801
        with pytest.raises(Ended) as ended:
            dog.look()
    assert ended.value.args == (watchdog.HUNG,)
    assert job.plain(capsys.readouterr().err) == example("error: rank 0 has waited") + "\n"
    assert (job.run / "ranks/stacks-00000.txt").exists() and "`stacks-00005.txt`" in PAGE


def test_a_port_that_is_taken(tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("prometheus_client")

    def taken(*_: object) -> None:
        raise OSError(errno.EADDRINUSE, "Address already in use")

    monkeypatch.setattr("prometheus_client.start_http_server", taken)
    told: list[str] = []
    one = feed.Feed(Prometheus(PrometheusSettings(), RunToTrack(tmp_path)), told.append)
    one._guarded(one.tracker.begin)
    assert told == [example("WARNING: tracking")]


def test_a_checkpoint_that_cannot_be_written_behind(monkeypatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=int(1.2 * 2**30)))
    checkpoints, told = SimpleNamespace(newest=Path(RUN) / "checkpoints" / checkpoint_files.name_of(400)), []
    final = Path(RUN) / "checkpoints" / checkpoint_files.name_of(450)
    unsaved = Checkpoints.given_up(
        checkpoints, SimpleNamespace(final=final, partial=Path(RUN) / "none"), "rank 3: No space left on device"
    )
    watching = SimpleNamespace(
        checkpoints=SimpleNamespace(settle=lambda wait: unsaved), telemetry=SimpleNamespace(message=told.append)
    )
    Watch.settle(watching)
    assert told == [example("WARNING: checkpoint")]


def test_every_line_that_the_page_shows_is_looked_at_here() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    starts = re.findall(r'example\("([^"]+)"\)', source) + ["stopped by SIGTERM: 412 of", "stopped by the end of its launcher"]
    assert [line for line in examples() if not any(line.startswith(start) for start in starts)] == []
