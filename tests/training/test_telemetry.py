"""Telemetry: what is written is strict, complete and, after a resume, there once."""

from __future__ import annotations

import contextlib
import io
import json
import math
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from prdp_fast.core.metric_names import SCHEMA
from prdp_fast.core.run_directory import METRICS, TENSORBOARD
from prdp_fast.training import telemetry as module
from prdp_fast.training.telemetry import Telemetry, clock_time


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def rows(directory: Path) -> list[dict]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in (directory / METRICS).read_text().splitlines()]


def scalars(directory: Path) -> dict[str, dict[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory / TENSORBOARD))
    events.Reload()
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def all_events(directory: Path) -> list:
    """Every event of a scalar that TensorBoard shows."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory / TENSORBOARD))
    events.Reload()
    return [
        SimpleNamespace(tag=tag, step=event.step) for tag in events.Tags()["scalars"] for event in events.Scalars(tag)
    ]  # fmt: skip


def run_epochs(directory: Path, first: int, last: int, total: int, value: float = 0.0) -> None:
    with Telemetry(directory, total_epochs=total, first_epoch=first) as telemetry:
        for epoch in range(first, last):
            with telemetry.phase("rollout"):
                pass
            telemetry.log_epoch(epoch, {"reward": value + epoch}, 8)


def test_phases_accumulate_within_an_epoch_and_over_the_run(tmp_path, clock):
    with Telemetry(tmp_path, total_epochs=2, clock=clock) as telemetry:
        for epoch in range(2):
            for seconds in (2.0, 3.0):
                with telemetry.phase("rollout"):
                    clock.now += seconds
            with telemetry.phase("update"):
                clock.now += 5.0
            telemetry.log_epoch(epoch, {"reward": 0.5}, 40)
        assert telemetry.phase_seconds == {"rollout": 10.0, "update": 10.0}
    assert rows(tmp_path) == [
        {
            "schema": SCHEMA,
            "epoch": epoch,
            "reward": 0.5,
            "seconds/rollout": 5.0,
            "seconds/update": 5.0,
            "images_per_s": 4.0,
        }
        for epoch in range(2)
    ]


def test_throughput_counts_gaps_but_neither_set_up_nor_evaluation(tmp_path, clock):
    with Telemetry(tmp_path, total_epochs=1, clock=clock) as telemetry:
        clock.now += 100.0  # loading
        with telemetry.phase("evaluation", throughput=False):
            clock.now += 50.0
        with telemetry.phase("rollout"):
            clock.now += 6.0
        clock.now += 2.0  # a gap between phases is the epoch's
        with telemetry.phase("evaluation", throughput=False):
            clock.now += 70.0
        telemetry.log_epoch(0, {}, 16)
    (row,) = rows(tmp_path)
    assert row["images_per_s"] == 2.0
    assert row["seconds/evaluation"] == 120.0


def test_a_phase_that_raises_is_counted_and_closed(tmp_path, clock):
    with Telemetry(None, total_epochs=1, clock=clock) as telemetry:
        with contextlib.suppress(KeyError), telemetry.phase("rollout"):
            clock.now += 1.0
            raise KeyError
        with telemetry.phase("update"):
            clock.now += 1.0
        assert telemetry.phase_seconds == {"rollout": 1.0, "update": 1.0}


def test_phases_do_not_nest():
    with Telemetry(None, total_epochs=1) as telemetry, telemetry.phase("rollout"):
        with pytest.raises(RuntimeError, match="'decode' was opened inside phase 'rollout'"), telemetry.phase("decode"):
            pass


def test_rows_are_strict_json_with_plain_numbers(tmp_path):
    metrics = {"reward": torch.tensor(0.25), "loss": float("nan"), "drift": float("inf"), "count": 3}
    with Telemetry(tmp_path, total_epochs=1) as telemetry:
        telemetry.log_epoch(0, metrics, 4)
        assert len(rows(tmp_path)) == 1, "a row is on disk as soon as it is logged"
    (row,) = rows(tmp_path)
    assert row == {"schema": SCHEMA, "epoch": 0, "reward": 0.25, "loss": None, "drift": None, "count": 3, "images_per_s": None}
    written = scalars(tmp_path)
    assert written["reward"] == {0: 0.25} and math.isnan(written["loss"][0])


def test_a_rank_without_a_directory_is_silent(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Telemetry(None, total_epochs=1) as telemetry:
        with telemetry.phase("rollout"):
            pass
        telemetry.log_epoch(0, {"reward": 1.0}, 4)
        telemetry.log_scalars(0, {"a": 1.0})
        telemetry.log_image("picture", tmp_path / "missing.png", 0)
        telemetry.message("hello")
    telemetry.close()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_resume_leaves_every_epoch_once(tmp_path):
    run_epochs(tmp_path, 0, 5, 8)
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"epoch": 5, "rew')  # killed in the middle of a line
    run_epochs(tmp_path, 3, 8, 8, value=100.0)
    assert [row["epoch"] for row in rows(tmp_path)] == list(range(8))
    assert [row["reward"] for row in rows(tmp_path)] == [0.0, 1.0, 2.0, 103.0, 104.0, 105.0, 106.0, 107.0]
    assert scalars(tmp_path)["reward"] == {row["epoch"]: row["reward"] for row in rows(tmp_path)}
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_torn_line_of_a_kept_epoch_does_not_join_the_next(tmp_path, capsys):
    """And that its row is lost is said."""
    (tmp_path / METRICS).write_text('{"epoch": 0, "reward": 1.0}\n{"epoch": 1, "rew')
    run_epochs(tmp_path, 2, 3, 3)
    assert [row["epoch"] for row in rows(tmp_path)] == [0, 2]
    assert (
        "metrics.jsonl was damaged: the row(s) of 1 of 2 finished epochs are lost, the first of epoch 1"
        in capsys.readouterr().out
    )
    run_epochs(tmp_path, 0, 1, 3)
    assert "damaged" not in capsys.readouterr().out


def test_a_restart_before_the_first_checkpoint_starts_over(tmp_path):
    run_epochs(tmp_path, 0, 2, 4)
    run_epochs(tmp_path, 0, 1, 4, value=7.0)
    assert [(row["epoch"], row["reward"]) for row in rows(tmp_path)] == [(0, 7.0)]
    assert scalars(tmp_path)["reward"] == {0: 7.0}


def test_a_crash_while_truncating_leaves_the_old_file(tmp_path, monkeypatch):
    run_epochs(tmp_path, 0, 3, 3)
    before = (tmp_path / METRICS).read_bytes()

    def crash(*_: object) -> None:
        raise OSError("no")

    monkeypatch.setattr(module.os, "replace", crash)
    with pytest.raises(OSError, match="no"):
        Telemetry(tmp_path, total_epochs=3, first_epoch=1)
    assert (tmp_path / METRICS).read_bytes() == before


class Full:
    """A file on a disk that has room for so many bytes."""

    def __init__(self, file, room: int) -> None:
        self.file, self.room, self.closed = file, room, False

    def write(self, data: bytes) -> int:
        if not self.room:
            raise OSError(28, "No space left on device")
        count = self.file.write(data[: self.room])
        self.room -= count
        return count

    def close(self) -> None:
        self.closed = True
        self.file.close()


def test_a_full_disk_keeps_rows_waiting(tmp_path, capsys):
    """The first row has half its room; what is left of it, and the next one, are written when there is some."""
    with Telemetry(tmp_path, total_epochs=4) as telemetry:
        disk = telemetry._metrics_file = Full(telemetry._metrics_file, 20)
        for epoch in range(2):
            telemetry.log_epoch(epoch, {"reward": float(epoch)}, 1)
        printed = capsys.readouterr().out
        assert (
            "metrics.jsonl cannot be written (No space left on device)" in printed
            and "2 row(s) are written as soon as" in printed
        )
        disk.room = 10_000
        telemetry.log_epoch(2, {"reward": 2.0}, 1)
        assert [row["reward"] for row in rows(tmp_path)] == [0.0, 1.0, 2.0]
        disk.room = 0
        telemetry.log_epoch(3, {"reward": 3.0}, 1)
        disk.room = 10_000
    assert [row["epoch"] for row in rows(tmp_path)] == [0, 1, 2, 3], "the last one when the run ends"


def test_tensorboard_without_room_ends_nothing(tmp_path, capsys, monkeypatch):
    """Its row waits for the next one, and a new file holds both."""
    from torch.utils.tensorboard import SummaryWriter

    add, full = SummaryWriter.add_scalar, threading.Event()

    def add_scalar(self, name, value, step):
        if step == 1 and not full.is_set():
            if name != "reward":  # after one that went through
                full.set()
                raise OSError(28, "No space left on device")
        add(self, name, value, step)

    monkeypatch.setattr(SummaryWriter, "add_scalar", add_scalar)
    with Telemetry(tmp_path, total_epochs=3) as telemetry:
        telemetry.log_epoch(0, {"reward": 0.5}, 1)
        telemetry.log_epoch(1, {"reward": 1.5}, 1)
        assert full.wait(20)
        telemetry.log_epoch(2, {"reward": 2.5}, 1)
    told = [line for line in capsys.readouterr().out.splitlines() if "WARNING" in line]
    assert len(told) == 1 and "tensorboard cannot be written (No space left on device); make room; training goes on" in told[0]
    assert [row["epoch"] for row in rows(tmp_path)] == [0, 1, 2]
    assert scalars(tmp_path)["reward"] == {0: 0.5, 1: 1.5, 2: 2.5}, "what was written before is still shown, and each once"
    events = [event.step for event in all_events(tmp_path) if event.tag == "reward"]
    assert events == [0, 1, 2], "none is there twice"


def test_a_thread_of_tensorboard_shows_no_traceback_of_a_disk_and_every_other_one_does(capsys, monkeypatch):
    from prdp_fast.training.trackers import tensorboard

    class Writer(threading.Thread):
        __module__ = "tensorboard.summary.writer.event_file_writer"

    monkeypatch.setattr(tensorboard, "_hook_before", None)
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)
    tensorboard.quiet_writers()
    tensorboard.quiet_writers()
    for error, thread, shown in (
        (OSError(30, "Read-only file system"), Writer, False), (KeyError("boom"), Writer, True),
        (OSError(30, "Read-only file system"), threading.Thread, True),
    ):  # fmt: skip
        threading.excepthook(threading.ExceptHookArgs((type(error), error, None, thread())))
        assert bool(capsys.readouterr().err) == shown, (error, thread)


def test_scalars_and_images_reach_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    Image.new("RGB", (6, 4), (10, 200, 30)).save(tmp_path / "grid.png")
    with Telemetry(tmp_path, total_epochs=1) as telemetry:
        telemetry.log_scalars(7, {"evaluation/seen": 0.5})
        telemetry.log_image("samples/before", tmp_path / "grid.png", 7)
    assert scalars(tmp_path)["evaluation/seen"] == {7: 0.5}
    assert rows(tmp_path) == []
    events = EventAccumulator(str(tmp_path / TENSORBOARD))
    events.Reload()
    (event,) = events.Images("samples/before")
    picture = Image.open(io.BytesIO(event.encoded_image_string))
    assert (event.step, picture.size, picture.convert("RGB").getpixel((3, 2))) == (7, (6, 4), (10, 200, 30))


def test_close_twice_and_message_after(tmp_path, capsys):
    telemetry = Telemetry(tmp_path, total_epochs=1)
    telemetry.log_epoch(0, {}, 1)
    telemetry.close()
    telemetry.close()
    telemetry.message("done")
    assert capsys.readouterr().out.endswith("done\n")


def test_lines_come_first_last_and_every_ten_seconds(tmp_path, clock, capsys):
    with Telemetry(tmp_path, total_epochs=30, clock=clock) as telemetry:
        for epoch in range(30):
            with telemetry.phase("rollout"):
                clock.now += 1.0
            telemetry.log_epoch(epoch, {"reward": epoch / 10}, 8)
        telemetry.message("[a] plain message")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[:-1]] == ["1/30", "11/30", "21/30", "30/30"]
    assert lines[0] == "epoch 1/30  reward 0.0000  8.0 images/s  ETA 0:00:29  (rollout)"
    assert lines[2] == "epoch 21/30  reward 2.0000  8.0 images/s  ETA 0:00:09"
    assert lines[-1] == "[a] plain message"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar_with_phase_reward_rate_and_eta(tmp_path, clock, monkeypatch):
    screen = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys, "stderr", screen)
    with Telemetry(tmp_path, total_epochs=12, first_epoch=2, clock=clock) as telemetry:
        for epoch in (2, 3):
            with telemetry.phase("rollout"):
                clock.now += 4.0
            telemetry.log_epoch(epoch, {"reward": 0.625}, 10)
        telemetry.message("a [message] above")
    text = screen.getvalue()
    for expected in ("4/12", "rollout", "reward 0.6250", "2.5 images/s", "ETA 0:00:32", "a [message] above"):
        assert expected in text


def test_a_dumb_terminal_gets_lines(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(sys, "stderr", Terminal())
    run_epochs(tmp_path, 0, 1, 1)
    assert capsys.readouterr().out.startswith("epoch 1/1")


def test_tensorboard_is_imported_only_where_it_is_written():
    code = (
        "import sys; from prdp_fast.training.telemetry import Telemetry\n"
        "with Telemetry(None, total_epochs=1) as t:\n    t.log_epoch(0, {'reward': 1.0}, 1)\n"
        "assert 'tensorboard' not in sys.modules and 'torch' not in sys.modules and 'rich' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00:00"), (59.6, "0:01:00"), (3725, "1:02:05"), (-3, "0:00:00")])
def test_clock_time(seconds, text):
    assert clock_time(seconds) == text
