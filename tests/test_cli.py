from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from prdp_fast import cli
from prdp_fast.core.errors import UserError

ROOT = Path(__file__).parents[1]


def prdp(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "prdp_fast.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, **options)


def test_what_is_offered_is_there():
    """Every offered name leads to a module that keeps the contract; what is not there is not offered."""
    offered = cli.offered()
    assert "report" in offered
    for subcommand in offered.values():
        module = import_module(subcommand.module)
        parser = argparse.ArgumentParser()
        module.add_arguments(parser)
        assert callable(module.run) and module.__doc__


def test_a_subcommand_without_its_module_is_not_offered(monkeypatch, capsys):
    monkeypatch.setitem(cli.SUBCOMMANDS, "fly", cli.Subcommand("prdp_fast.rewards.wings", "fly"))
    assert "fly" not in cli.offered()
    assert cli.main(["fly"]) == 2
    assert "'fly' is unknown" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert "fly" not in capsys.readouterr().out


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from prdp_fast import cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'diffusers', 'pyarrow', 'numpy', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    assert "report" in done.stdout and "deepspeed prdp_fast/train.py" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "error: the following arguments are required: SUBCOMMAND"),
        (["reprot", "x"], "error: subcommand 'reprot' is unknown; expected one of"),
        (["report"], "error: the following arguments are required: RUN; see 'prdp report --help'"),
        (["report", "nowhere"], "error: nowhere is no run directory"),
        (["report", "nowhere", "--colour"], "error: unrecognized arguments: --colour"),
    ],
)
def test_mistakes_are_one_line_and_status_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        status = cli.main(arguments)
    except SystemExit as exit:
        status = exit.code
    streams = capsys.readouterr()
    assert status == 2 and streams.out == ""
    assert streams.err.startswith(message) and streams.err.count("\n") == 1 and "Traceback" not in streams.err
    if arguments[:1] == ["reprot"]:
        assert "did you mean 'report'?" in streams.err


def test_the_status_of_the_subcommand_is_the_status(monkeypatch):
    def run(args):
        if args.status < 0:
            raise UserError("below\nzero")
        return args.status

    module = argparse.Namespace(
        __doc__="A test.", add_arguments=lambda parser: parser.add_argument("--status", type=int, required=True), run=run
    )
    monkeypatch.setitem(cli.SUBCOMMANDS, "status", cli.Subcommand("prdp_fast.core.errors", "test"))
    monkeypatch.setattr(cli, "import_module", lambda name: module)
    assert [cli.main(["status", "--status", str(n)]) for n in (0, 1, 3, -1)] == [0, 1, 3, 2]


def test_a_bug_keeps_its_traceback(monkeypatch):
    module = argparse.Namespace(__doc__="", add_arguments=lambda parser: None, run=lambda args: 1 // 0)
    monkeypatch.setattr(cli, "import_module", lambda name: module)
    with pytest.raises(ZeroDivisionError):
        cli.main(["report"])


def a_run(directory: Path) -> Path:
    directory.mkdir()
    (directory / "run.json").write_text("{}")
    rows = [{"epoch": epoch, "reward": 0.1 * epoch, "loss": 1.0} for epoch in range(3)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def test_report_of_a_run(tmp_path, capsys):
    directory = a_run(tmp_path / "run")
    assert cli.main(["report", str(directory)]) == 0
    out = capsys.readouterr().out
    assert "not finished" in out and out.splitlines()[-1] == str(directory / "curves.png")
    assert (directory / "curves.png").read_bytes().startswith(b"\x89PNG")

    part = {"before": {"mean": 0.5, "n": 8}, "after": {"mean": 0.71, "n": 8}, "difference": {"mean": 0.21, "stderr": 0.02}}
    (directory / "summary.json").write_text(json.dumps({"epochs": 3, "evaluation": {"unseen": part}}))
    assert cli.main(["report", str(directory)]) == 0
    out = capsys.readouterr().out
    assert "unseen" in out and "+0.210" in out and "not finished" not in out

    (directory / "summary.json").write_text("{")
    assert cli.main(["report", str(directory)]) == 2
    assert "summary.json cannot be read" in capsys.readouterr().err


def test_report_of_a_run_without_an_epoch(tmp_path, capsys):
    directory = a_run(tmp_path / "run")
    (directory / "metrics.jsonl").write_text("")
    assert cli.main(["report", str(directory)]) == 2
    assert "no curves" in capsys.readouterr().err


def test_a_closed_pipe_is_no_error(tmp_path):
    directory = a_run(tmp_path / "run")
    command = f"{sys.executable} -m prdp_fast.cli report {directory} | true; exit ${{PIPESTATUS[0]}}"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and done.stderr == ""


def test_as_a_program():
    done = prdp("report", "nowhere")
    assert done.returncode == 2 and done.stderr.startswith("error: nowhere") and done.stderr.count("\n") == 1
