from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from prdp_fast import cli, train
from prdp_fast.core import environment
from prdp_fast.core.errors import UserError

ROOT = Path(__file__).parents[2]


def prdp(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "prdp_fast.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, **options)


@pytest.mark.parametrize("name", cli.SUBCOMMANDS)
def test_every_subcommand_keeps_the_contract(name):
    module = import_module(cli.SUBCOMMANDS[name].module)
    module.add_arguments(argparse.ArgumentParser())
    assert callable(module.run) and module.__doc__


def test_every_command_is_offered():
    files = {path.stem for path in (ROOT / "prdp_fast" / "commands").glob("*.py")} - {"__init__"}
    assert {subcommand.module for subcommand in cli.SUBCOMMANDS.values()} == {"prdp_fast.train"} | {
        f"prdp_fast.commands.{name}" for name in files
    }


@pytest.mark.parametrize("arguments", [[], ["train"], ["doctor"]], ids=lambda words: " ".join(words) or "prdp")
def test_help_imports_nothing_heavy(arguments):
    code = (
        "import sys; from prdp_fast import cli\n"
        f"try: cli.main({[*arguments, '--help']})\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'diffusers', 'pyarrow', 'numpy', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    if not arguments:
        assert all(f"\n  {name} " in done.stdout and it.help in done.stdout for name, it in cli.SUBCOMMANDS.items())


def test_a_mistake_in_the_recipe_is_found_before_torch_is_imported():
    code = "import sys; from prdp_fast import cli; print(cli.main(['train', '--recipe', 'tinny']), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "2 False\n"
    assert done.stderr == "error: recipe 'tinny' is neither a file nor one of the shipped recipes; did you mean 'tiny'?\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "error: the following arguments are required: SUBCOMMAND"),
        (["reprot", "x"], "error: subcommand 'reprot' is unknown; expected one of train, doctor, "),
        (["trian"], "error: subcommand 'trian' is unknown; expected one of train, doctor, "),
        (["fly"], "error: subcommand 'fly' is unknown; expected one of train, doctor, "),
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
    nearest = {"reprot": "; did you mean 'report'?\n", "trian": "; did you mean 'train'?\n", "fly": ", watch\n"}
    assert streams.err.endswith(nearest.get(arguments[0] if arguments else "", ""))


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


# `prdp train` and the launcher


class Replaced(Exception):
    """Stands for the process that another program would take over."""


@pytest.fixture
def launched(monkeypatch):
    """Runs `prdp train` and returns the command and the environment of the launcher that it would start."""

    def become(command, environment):
        raise Replaced(command, environment)

    def launch(*arguments: str) -> tuple[list[str], dict[str, str]]:
        with pytest.raises(Replaced) as caught:
            cli.main(["train", *arguments])
        return caught.value.args

    monkeypatch.setattr(train.launcher, "run", become)
    monkeypatch.delenv("RANK", raising=False)
    return launch


ARGUMENTS = [
    [],
    ["--config", "zero3.json", "--recipe", "smoke", "--resume", "never", "--output", "a run", "--seed", "0", "--dry-run"],
    ["--set", "schedule.epochs=2", "--set", "rewards=[{name: jpeg_size}]"],
]


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=len)
def test_the_ranks_get_the_same_arguments(launched, arguments):
    command, _ = launched("--num_gpus", "2", *arguments)
    script = command.index(str(ROOT / "prdp_fast" / "train.py"))
    assert command[:5] == [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2"]
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    assert parser.parse_args(command[script + 1 :]) == parser.parse_args(arguments)


def test_the_ranks_share_the_cores(launched, monkeypatch):
    """A rank takes its share unless the user says otherwise. What this process chose for itself alone is not passed on."""
    for name in ("OMP_NUM_THREADS", "DIFFUSERS_VERBOSITY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(environment, "_set_here", {})
    environment.prepare()
    assert os.environ["OMP_NUM_THREADS"] == str(os.cpu_count())
    assert not {"OMP_NUM_THREADS", "DIFFUSERS_VERBOSITY"} & launched("--num_gpus", "2")[1].keys()
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert launched("--num_gpus", "2")[1]["OMP_NUM_THREADS"] == "3"


def test_a_port_is_chosen_and_may_be_given(launched, monkeypatch):
    monkeypatch.delenv("MASTER_PORT", raising=False)
    command, _ = launched("--num_gpus", "1")
    assert 20000 <= int(command[command.index("--master_port") + 1]) < 32000
    monkeypatch.setenv("MASTER_PORT", "4242")
    command, _ = launched("--num_gpus", "1")
    assert command[command.index("--master_port") + 1] == "4242"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num_gpus", "0"], "--num_gpus is 0; expected at least 1"),
        (["--num_gpus", "2", "--recipe", "tinny"], "recipe 'tinny' is neither a file nor one of the shipped recipes"),
        (["--num_gpus", "3", "--recipe", "smoke"], "prompts_per_epoch"),
    ],
)
def test_a_mistake_is_found_before_ranks_are_started(arguments, message, capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(train.launcher, "run", None)
    assert cli.main(["train", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_a_launcher_inside_a_launched_job(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    assert cli.main(["train", "--num_gpus", "2"]) == 2
    assert capsys.readouterr().err.startswith("error: --num_gpus 2 inside a launched job; ")
    monkeypatch.setenv("RANK", "1")  # says it too, if the launcher has not ended it by then
    monkeypatch.setattr(train, "ALONE_S", 0.0)
    assert cli.main(["train", "--num_gpus", "2"]) == 2
    assert capsys.readouterr().err.startswith("error: rank 1: --num_gpus 2 inside a launched job; ")


def test_a_missing_launcher(capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(train, "find_spec", lambda name: None)
    assert cli.main(["train", "--num_gpus", "2"]) == 2
    assert "deepspeed is not installed; pip install deepspeed" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--local_rank=1", "--local-rank=1"])
def test_both_spellings_of_the_local_rank(option):
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    assert parser.parse_args([option]).local_rank == 1
