"""The examples in configs/launch/, as far as they can be tried without a cluster."""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from prdp_fast import train
from prdp_fast.config.load import CONFIGS, load_recipe

LAUNCH = CONFIGS / "launch"


def words_of(name: str) -> list[str]:
    """The command line of an example, launcher included."""
    text = (LAUNCH / name).read_text()
    if name.endswith(".yaml"):
        (job,) = yaml.safe_load(text)["spec"]["replicatedJobs"]
        (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
        return container["command"]
    if name == "hostfile":
        text = text.replace("#", "")
    (line,) = [line for line in text.replace("\\\n", " ").splitlines() if "prdp_fast/train.py" in line]
    return shlex.split(line)


def training(name: str) -> argparse.Namespace:
    """What the training command of an example says. Raises: SystemExit if it cannot be parsed."""
    words = words_of(name)
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    return parser.parse_args(words[words.index("prdp_fast/train.py") + 1 :])


EXAMPLES = sorted(path.name for path in LAUNCH.iterdir())


def test_there_is_one_for_each_launcher():
    assert EXAMPLES == ["hostfile", "jobset.yaml", "slurm.sbatch", "torchrun.sh"]


@pytest.mark.parametrize("name", EXAMPLES)
def test_its_command_parses_and_its_recipe_and_config_are_there(name):
    args = training(name)
    assert load_recipe(args.recipe, args.overrides) and (CONFIGS / args.config).is_file()
    assert args.resume == "auto" and args.output is not None, "a restarted job finds its run again"


def test_a_command_of_an_example_runs_dry(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = words_of("slurm.sbatch")
    words = words[words.index("prdp_fast/train.py") + 1 :]
    words[words.index("--recipe") + 1] = "smoke"  # the embedded model is on every machine
    assert train.main([*words, "--dry-run"]) == 0
    assert str(tmp_path / "runs/sd14") in capsys.readouterr().out


@pytest.mark.parametrize("name", ["slurm.sbatch", "torchrun.sh"])
def test_a_shell_reads_it(name):
    subprocess.run(["bash", "-n", str(LAUNCH / name)], check=True)


def test_the_grace_fits_into_what_the_launcher_gives():
    text = (LAUNCH / "slurm.sbatch").read_text()
    assert training("slurm.sbatch").grace < int(re.search(r"--signal=USR1@([0-9]+)", text)[1])
    assert training("torchrun.sh").grace < 30 and training("jobset.yaml").grace < 30
    pod = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())["spec"]["replicatedJobs"][0]["template"]["spec"]["template"][
        "spec"
    ]
    assert training("jobset.yaml").grace < pod["terminationGracePeriodSeconds"]


def test_slurm_s_options_are_before_the_first_command():
    """sbatch reads no further."""
    lines = Path(LAUNCH / "slurm.sbatch").read_text().splitlines()
    first = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in lines[first:]) and "#SBATCH --requeue" in lines[:first]


def test_torchrun_knows_its_options():
    from torch.distributed.run import get_args_parser

    for name in ("torchrun.sh", "jobset.yaml"):
        words = [re.sub(r"\$\{\w+:-(\w+)\}", r"\1", word) for word in words_of(name)]
        args = get_args_parser().parse_args(words[words.index("torchrun") + 1 :])
        assert args.training_script == "prdp_fast/train.py" and args.rdzv_backend == "c10d"


def test_the_hostfile_is_one():
    for line in (LAUNCH / "hostfile").read_text().splitlines():
        assert line.startswith("#") or re.fullmatch(r"\S+ slots=[0-9]+", line), line
