"""What launchers, shells and containers set, and what becomes of it before anything heavy is imported."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import pytest
from launching import ROOT

from prdp_fast import train
from prdp_fast.core import distributed, environment
from prdp_fast.core.errors import UserError

LAUNCHER = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
)  # fmt: skip
GROUP = LAUNCHER[:7]


@pytest.fixture
def prepared(monkeypatch):
    """prepare() in an environment with these variables and no other of a launcher. Returns: what is set for torch afterwards."""
    was = dict(os.environ)

    def run(**variables: str) -> dict[str, str]:
        for name in list(os.environ):
            if name in LAUNCHER or name.startswith(("SLURM_", "OMPI_", "PMI", "MPI_", "MV2_")):
                del os.environ[name]
        os.environ.update(variables)
        monkeypatch.setattr(environment, "_set_here", {})
        environment.prepare()
        return {name: os.environ[name] for name in GROUP if name in os.environ}

    yield run
    os.environ.clear()
    os.environ.update(was)
    environment._faults.clear()


SLURM = {
    "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "9", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "gpu[003-004],cpu1", "SLURM_STEP_TASKS_PER_NODE": "4(x2),1",
    "SLURM_STEP_NUM_NODES": "3", "SLURM_NTASKS": "16",
}  # fmt: skip


def test_srun(prepared):
    found = prepared(**SLURM)
    port = found.pop("MASTER_PORT")
    assert found == {"RANK": "5", "WORLD_SIZE": "9", "LOCAL_RANK": "1", "LOCAL_SIZE": "4", "MASTER_ADDR": "gpu003"}
    assert 20000 <= int(port) < 32000
    environment.check_launch()
    other_rank = SLURM | {"SLURM_PROCID": "8", "SLURM_LOCALID": "0", "SLURM_NODEID": "2"}
    assert prepared(**other_rank) | {"MASTER_PORT": port} == {
        "RANK": "8", "WORLD_SIZE": "9", "LOCAL_RANK": "0", "LOCAL_SIZE": "1", "MASTER_ADDR": "gpu003", "MASTER_PORT": port
    }  # fmt: skip
    assert prepared(**SLURM | {"SLURM_STEP_ID": "1"})["MASTER_PORT"] != port  # two steps of a job may run at once
    assert prepared(**SLURM, MASTER_ADDR="10.0.0.1", MASTER_PORT="4242")["MASTER_ADDR"] == "10.0.0.1"
    assert prepared(**SLURM | {"SLURM_STEP_NUM_NODES": "1"})["MASTER_ADDR"] == "127.0.0.1"
    assert prepared(**SLURM, CUDA_VISIBLE_DEVICES="3")["LOCAL_RANK"] == "0"  # --gpus-per-task shows each task its own


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("gpu[12,14-20]", "gpu12"),
        ("r[0-3]n[05-09],x", "r0n05"),
        ("a-b[007]-c", "a-b007-c"),
        ("", None),
    ],
)
def test_the_first_host_of_a_list(nodes, host):
    assert environment._first_host(nodes) == host


def test_the_threads_are_shared_by_the_ranks_of_a_machine(prepared, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    prepared(**SLURM)
    assert os.environ["OMP_NUM_THREADS"] == "16"


OMPI = {
    "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "PMIX_NAMESPACE": "prterun-host-77@1",
}  # fmt: skip


def test_mpirun(prepared):
    found = prepared(**OMPI)
    port = found.pop("MASTER_PORT")
    assert found == {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    assert prepared(**OMPI | {"OMPI_COMM_WORLD_RANK": "0"})["MASTER_PORT"] == port
    # Inside an allocation mpirun starts its daemons with srun, one a node.
    within = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_LOCALID": "0", "SLURM_NTASKS": "2"}
    assert prepared(**OMPI, **within)["RANK"] == "1"
    environment.check_launch()
    hydra = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "3", "MPI_LOCALNRANKS": "4"}
    assert prepared(**hydra)["RANK"] == "3"
    mvapich = {f"MV2_COMM_WORLD_{name}": "2" for name in ("SIZE", "LOCAL_SIZE")}
    assert prepared(**mvapich, MV2_COMM_WORLD_RANK="0", MV2_COMM_WORLD_LOCAL_RANK="0")["WORLD_SIZE"] == "2"


def test_over_several_machines_mpirun_needs_an_address(prepared):
    spread = OMPI | {"OMPI_COMM_WORLD_SIZE": "4"}
    assert prepared(**spread) == {}
    with pytest.raises(UserError, match=r"mpirun started this process as rank 1 of 4 and does not say MASTER_ADDR .*; set it"):
        environment.check_launch()
    assert prepared(**spread, MASTER_ADDR="node1")["MASTER_ADDR"] == "node1"
    environment.check_launch()


def test_one_task_is_no_group(prepared):
    for variables in (
        {}, {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "8"}, {"SLURM_NTASKS": "8"},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"},
        {"WORLD_SIZE": "1"},
    ):  # fmt: skip
        assert prepared(**variables).keys() <= {"WORLD_SIZE"}
        environment.check_launch()


def test_a_launchers_own_word_counts(prepared):
    given = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert prepared(**given, **SLURM, **OMPI) == given
    environment.check_launch()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"SLURM_PROCID": "0", "SLURM_NTASKS": "2"},
            "SLURM_NTASKS is 2, but srun did not start this process; start the job with srun",
        ),
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, "mpiexec started this process as rank 0 of 2 and does not say"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2 and RANK is not set"),
        ({"RANK": "1"}, "RANK is 1 and WORLD_SIZE is not set"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is '2' and WORLD_SIZE '2'; expected a rank from 0"),
        ({"RANK": "a", "WORLD_SIZE": "2"}, "RANK is 'a'"),
        ({"RANK": "0", "WORLD_SIZE": "-1"}, "WORLD_SIZE '-1'"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK is 'x'; expected a whole number from 0"),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "-1"}, "LOCAL_SIZE is '-1'"),
    ],
)
def test_several_jobs_of_one_rank_are_refused(prepared, variables, message):
    prepared(**variables)
    with pytest.raises(UserError, match=message):
        environment.check_launch()


@pytest.mark.parametrize("words", [["--dry-run"], []])
@pytest.mark.parametrize("variables", [{"RANK": "1"}, {"RANK": "x", "WORLD_SIZE": "2"}, {"WORLD_SIZE": "x"}, {"LOCAL_RANK": "x"}])
def test_a_rank_whose_numbers_are_wrong_says_so(prepared, capsys, variables, words):
    """Not silence, as of the ranks that leave it to rank 0 to speak."""
    prepared(**variables)
    assert train.main(["--recipe", "smoke", "--set", "model.pretrained=nowhere", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and next(iter(variables)) in line


def test_numbers_of_a_launcher_that_are_read_without_a_job(prepared):
    prepared(RANK="x", LOCAL_SIZE="x", WORLD_SIZE="")
    for read in (distributed.rank, distributed.is_main, distributed.local_ranks):
        with pytest.raises(UserError, match="is 'x'; expected a whole number"):
            read()
    assert distributed.world_size() == 1


@pytest.mark.parametrize(
    ("given", "threads", "says"),
    [("", None, ""), (" ", None, ""), ("4,2", "4", ""), (" 3 ", "3", ""), ("many", None, "'many'"), ("0", None, "'0'"),
     ("-2", None, "'-2'")],
)  # fmt: skip
def test_threads(prepared, capsys, given, threads, says):
    prepared(OMP_NUM_THREADS=given)
    assert os.environ["OMP_NUM_THREADS"] == threads or threads is None
    assert int(os.environ["OMP_NUM_THREADS"]) >= 1
    said = capsys.readouterr().err
    assert (says in said and said.count("\n") == 1) if says else said == ""


def test_no_home(prepared, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv("HOME")
    prepared()
    home = tmp_path / f"prdp_fast-{os.getuid()}"
    assert os.environ["HOME"] == str(home) and home.stat().st_mode & 0o777 == 0o700
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and str(home) in said and "PRDP_CACHE" in said
    environment.check_launch()
    del os.environ["HOME"]
    monkeypatch.setattr(os, "getuid", lambda: 4242)
    (tmp_path / "prdp_fast-4242").mkdir()  # somebody else was there first
    prepared()
    with pytest.raises(UserError, match="belongs to somebody else"):
        environment.check_launch()


def test_a_terminal_that_cannot_show_a_character(prepared, monkeypatch):
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", narrow)
    prepared()
    print("ein Bär \ud800", flush=True)
    assert narrow.buffer.getvalue() == b"ein B\\xe4r \\ud800\n"


@pytest.mark.parametrize(
    "variables", [{"PYTHONIOENCODING": "ascii"}, {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}]
)
def test_prompts_are_shown_on_any_terminal(tmp_path, variables):
    (tmp_path / "prompts.txt").write_text("ein Bär\n" * 3 + "大きな猫\n", encoding="utf-8")
    (tmp_path / "prompts.txt").rename(tmp_path / "Größe.txt")
    settings = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])} | variables
    command = [sys.executable, "-m", "prdp_fast.cli", "shards"]
    built = subprocess.run(
        [*command, "build", "--source", "txt", "--input", tmp_path / "Größe.txt", "--eval", "0", "--output", tmp_path / "Bär"],
        env=settings, capture_output=True, text=True,
    )  # fmt: skip
    assert built.returncode == 0 and "Traceback" not in built.stderr, built.stderr
    shown = subprocess.run([*command, "info", tmp_path / "Bär"], env=settings, capture_output=True, text=True)
    assert shown.returncode == 0 and "ein B\\xe4r" in shown.stdout, shown.stderr
