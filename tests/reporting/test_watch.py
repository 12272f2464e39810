"""`prdp watch`: what it shows of a run in any state, in a terminal and in a pipe; how it waits, ends and is interrupted."""

from __future__ import annotations

import io
import json
import math
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from prdp_fast.cli import main
from prdp_fast.core.ranks import namespace, start_of
from prdp_fast.reporting import run_view, watch
from prdp_fast.reporting.liveness import has_ended
from prdp_fast.training.telemetry import Telemetry

ESCAPE = "\x1b[2J\x1b]0;owned\x07\u202e"


def row(epoch: int, **values: Any) -> dict[str, Any]:
    return {
        "epoch": epoch, "reward": 0.1 * epoch, "reward_std": 0.125, "images_per_s": 8.0, "clip_fraction": 0.25, "drift": 2e-6,
        "kl_to_reference": -3e-4, "first_ratio_error": 1e-7, "grad_norm": 0.5, "seconds/rollout": 1.0, "seconds/update": 3.0,
        "skipped_updates": 0.0,
    } | values  # fmt: skip


def heartbeat(run: Path, rank: int, **values: Any) -> None:
    """Of this process, which is there."""
    told = {
        "job": "1", "rank": rank, "host": socket.gethostname(), "pid": os.getpid(), "started": start_of(os.getpid()),
        "names": namespace(), "phase": "update", "epoch": 3, "since": "2026-03-02 16:00:01", "waiting": None, "left": None,
    }  # fmt: skip
    (run / "ranks").mkdir(exist_ok=True)
    (run / "ranks" / f"rank-{rank:05d}.json").write_text(json.dumps(told | values))


def a_run(run: Path, epochs: int = 3, total: int = 10, ranks: int = 2) -> Path:
    run.mkdir(exist_ok=True)
    (run / "run.json").write_text(json.dumps({"recipe": {"schedule": {"epochs": total}}}))
    (run / "metrics.jsonl").write_text("".join(json.dumps(row(epoch)) + "\n" for epoch in range(epochs)))
    for rank in range(ranks):
        heartbeat(run, rank)
    return run


def finish(run: Path) -> None:
    (run / "summary.json").write_text('{"epochs": 3}')
    for path in (run / "ranks").glob("rank-*.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"left": "finished"}))


def lines_of(run: Path, width: int = 100) -> list[str]:
    return run_view.view(run_view.look(run), width)


def test_a_run_that_goes_on(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run")
    (run / "messages.txt").write_text("2026-03-02 16:00:00 performance\n  attention sdpa\n2026-03-02 16:00:01 drift: look\n")
    (run / "metrics.jsonl").open("a").write(json.dumps(row(3, skipped_updates=2.0, dropped_images=1.0)) + '\n{"epoch": 4, "rew')
    assert lines_of(run) == [
        "run: epoch 4 of 10, 0:00:24 left",
        "reward      0.3000 (images differ by 0.125)",
        "            ▁▃▆█  0.000 to 0.300",
        "speed       8.0 images/s",
        "clipped     25.0%   first ratio off by 1.0e-07",
        "drift       2.0e-06 nats   KL -3.0e-04 nats   gradient 0.5",
        "lost        2 updates skipped, 1 images dropped",
        "time        update 75%, rollout 25%",
        f"rank 0      update of epoch 4 since 2026-03-02 16:00:01 on {socket.gethostname()}",
        f"rank 1      update of epoch 4 since 2026-03-02 16:00:01 on {socket.gethostname()}",
        "last messages",
        "  2026-03-02 16:00:00 performance",
        "  2026-03-02 16:00:01 drift: look",
    ]
    assert max(map(len, lines_of(run, 40))) <= 40


def test_many_ranks_are_counted(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", ranks=9)
    heartbeat(run, 4, phase="reward")
    assert lines_of(run)[-3:] == ["ranks", "  8 in update of epoch 4", "  1 in reward of epoch 4"]


def test_how_a_run_ended(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run")
    assert not has_ended(run)
    heartbeat(run, 0, left="stopped")
    assert not has_ended(run), "rank 1 is still there"
    heartbeat(run, 1, started=1)  # another process has its number now
    assert has_ended(run) and lines_of(run)[1].startswith("the run has ended before its last epoch: rank 1 ended without a word")
    (run / "ranks" / "stop.json").write_text('{"reason": "SIGTERM"}')
    assert lines_of(run)[1] == "the run has ended before its last epoch: stopped by SIGTERM; the same command goes on"
    finish(run)
    (run / "ranks" / "stop.json").unlink()
    assert lines_of(run)[1] == "the run has come to its time limit, and is evaluated and exported"
    (run / "run.json").write_text(json.dumps({"recipe": {"schedule": {"epochs": 3}}}))
    assert lines_of(run)[1] == "the run is finished"
    heartbeat(run, 0)
    assert not has_ended(run) and run_view.look(run).end is None, "it was given more epochs, and goes on"


def test_ranks_of_another_machine_are_taken_at_their_word(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", ranks=1)
    heartbeat(run, 0, host="elsewhere", started=1)
    assert not has_ended(run)


def test_files_do_not_command_the_terminal(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", ranks=1)
    heartbeat(run, 0, phase=ESCAPE, host=ESCAPE, since=ESCAPE)
    heartbeat(run, 1, left=ESCAPE)
    (run / "messages.txt").write_text(f"2026-03-02 16:00:00 {ESCAPE}\n")
    (run / "metrics.jsonl").write_text(json.dumps(row(0, **{f"seconds/{ESCAPE}": 1.0})) + "\n")
    (run / "ranks" / "stop.json").write_text(json.dumps({"reason": ESCAPE}))
    text = "\n".join(lines_of(run))
    assert "\x1b" not in text and "\u202e" not in text and "\x07" not in text and text.count("\\x1b[2J") >= 4


@pytest.mark.parametrize("rows", [
    [], [{"epoch": 0}], [row(0, reward=math.nan), row(1, reward=None), row(2, images_per_s="x")],
    [row(0, **{"seconds/rollout": 10**400, "reward": 1e308}), row(1, reward=-1e308)], [row(5), row(5), row(2)],
])  # fmt: skip
def test_numbers_that_are_none(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    run = a_run(tmp_path / "run")
    (run / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    snapshot = run_view.look(run)
    assert run_view.view(snapshot, 80) and all(run_view.epoch_line(one, snapshot) for one in snapshot.rows)


def test_damaged_files(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run")
    for path in (run / "run.json", run / "summary.json", run / "ranks" / "rank-00000.json"):
        path.write_text("{")
    (run / "ranks" / "rank-00001.json").write_text('{"rank": "x", "pid": []}')
    (run / "messages.txt").write_bytes(b"\xff\xfe\n")
    assert lines_of(run)[0] == "run: epoch 3, ? left"


def test_sparklines() -> None:
    assert run_view.sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█" and run_view.sparkline([], 8) == ""
    assert run_view.sparkline([3, 3], 8) == "▄▄" and run_view.sparkline([0, 0, 7, 7], 2, run_view.ASCII_BLOCKS) == "_@"
    assert watch.blocks_of("ascii") == run_view.ASCII_BLOCKS and watch.blocks_of("utf-8") == run_view.BLOCKS


# Following


def test_a_pipe_gets_a_line_an_epoch(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits for the run, sees it grow, be set back to a checkpoint, and end."""
    run = tmp_path / "run"
    (tmp_path / "messages.txt").write_text("")
    moments = [
        lambda: None,
        lambda: [a_run(run, epochs=0, total=3), (run / "messages.txt").write_text("2026-03-02 16:00:00 hello\n")],
        lambda: a_run(run, epochs=2, total=3),
        lambda: (run / "messages.txt").open("a").write(f"2026-03-02 16:00:05 {ESCAPE}\n"),
        lambda: a_run(run, epochs=1, total=3),
        lambda: a_run(run, epochs=3, total=3),
        lambda: finish(run),
    ]  # fmt: skip
    monkeypatch.setattr(watch.time, "sleep", lambda seconds: moments.pop(0)())
    assert main(["watch", str(run)]) == 0 and not moments
    figures = "8.0 images/s  clipped 25.0%  drift 2.0e-06  KL -3.0e-04"
    assert capsys.readouterr().out.splitlines() == [
        f"waiting for {run}: there is no run yet; Ctrl-C ends this",
        f"epoch 1/3  reward 0.0000  {figures}",
        f"epoch 2/3  reward 0.1000  {figures}  0:00:04 left",
        "2026-03-02 16:00:05 \\x1b[2J\\x1b]0;owned\\x07\\u202e",
        f"epoch 2/3  reward 0.1000  {figures}",
        f"epoch 3/3  reward 0.2000  {figures}  0:00:00 left",
        "the run is finished",
    ]


def test_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", str(tmp_path / "none"), "--once"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'none'} is no run directory")
    run = a_run(tmp_path / "run")
    assert main(["watch", str(run), "--once"]) == 0 and capsys.readouterr().out.startswith("run: epoch 3 of 10, 0:00:28 left\n")
    heartbeat(run, 0, left="fault")
    heartbeat(run, 1, left="fault")
    assert main(["watch", str(run), "--once"]) == main(["watch", str(run)]) == 1, "it ended, and did not finish"


def test_a_terminal_is_redrawn_and_keeps_the_last_view(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        encoding = "utf-8"

        def isatty(self) -> bool:
            return True

    run, screen = a_run(tmp_path / "run"), Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(watch.time, "sleep", lambda seconds: finish(run))
    assert watch.watch(run, 1.0) == 0
    first, *_, last = screen.getvalue().split("run: epoch 3 of 10")[1:]
    assert "left\n" in first.replace("\r", "") and "time limit" in last and last.rstrip().endswith("\x1b[?25h")


def test_ctrl_c_leaves_no_traceback(tmp_path: Path) -> None:
    import signal

    code = "import sys; from prdp_fast.cli import main; sys.exit(main(sys.argv[1:]))"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "watch", str(tmp_path / "none")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline().startswith("waiting for ")
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "interrupted\n")


def test_no_library_of_models_is_imported() -> None:
    code = "import sys; from prdp_fast.cli import main; main(['watch', 'none', '--once']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_a_run_keeps_what_it_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Telemetry(tmp_path, total_epochs=1) as telemetry:
        telemetry.message("one\nmore of it")
        telemetry.message("two")
        assert [line[20:] for line in run_view.last_messages(tmp_path / "messages.txt")] == ["one", "two"]
        (tmp_path / "messages.txt").unlink()
        (tmp_path / "messages.txt").mkdir()
        telemetry.message("three")  # which cannot be kept
    with Telemetry(None, total_epochs=1) as telemetry:
        telemetry.message("of another rank")
    assert "three" in capsys.readouterr().out and run_view.last_messages(tmp_path / "messages.txt") == []
