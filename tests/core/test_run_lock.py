"""One job a run directory: held by the kernel for as long as the process lives, and no longer."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from launching import ROOT

from prdp_fast.core import run_lock
from prdp_fast.core.errors import UserError
from prdp_fast.core.files import partial_path
from prdp_fast.core.run_directory import RUN, claim
from prdp_fast.core.run_lock import LOCK, holder

JOB = {"recipe": {"schedule": {"epochs": 3}}}
HOLDER = f"""
import json, sys, time
from pathlib import Path
from prdp_fast.core.run_directory import claim
claim(Path(sys.argv[1]), {JOB!r}, "auto")
print("held", flush=True)
time.sleep(120)
"""


@pytest.fixture
def other(tmp_path):
    """Another process that has claimed tmp_path / "run"."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])},
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_job_is_refused_and_touches_nothing(tmp_path, other):
    run = tmp_path / "run"
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    with pytest.raises(
        UserError, match=rf"is in use by a job on \S+, process {other.pid}, since 20.*; wait for its end"
    ) as caught:
        claim(run, JOB, "auto")
    assert "\n" not in str(caught.value)
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    other.send_signal(signal.SIGKILL)  # nothing of it is left to clean up
    other.wait()
    claim(run, JOB, "auto")
    assert json.loads((run / LOCK).read_text())["pid"] == os.getpid()


def test_the_same_process_may_claim_again(tmp_path):
    for _ in range(2):
        claim(tmp_path / "run", JOB, "auto")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [LOCK, RUN]


def test_a_directory_with_nothing_but_a_lock_is_free(tmp_path):
    (tmp_path / LOCK).touch()  # a job that ended before it wrote anything
    claim(tmp_path, JOB, "never")


FORKS = f"""
import os, sys, time
from pathlib import Path
from prdp_fast.core.run_directory import claim
claim(Path(sys.argv[1]), {JOB!r}, "auto")
child = os.fork()
if child:
    print(child, flush=True)
time.sleep(120)
"""


def test_what_a_job_has_forked_does_not_hold_the_directory_after_it(tmp_path):
    """A worker of a reward outlives a job that is killed; the job's lock is there as long as the job."""
    process = subprocess.Popen(
        [sys.executable, "-c", FORKS, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])},
    )  # fmt: skip
    assert process.stdout is not None
    child = int(process.stdout.readline())
    try:
        with pytest.raises(UserError, match=rf"is in use by a job on \S+, process {process.pid}"):
            claim(tmp_path / "run", JOB, "auto")
        process.kill()
        process.wait()
        os.kill(child, 0)  # it lives
        claim(tmp_path / "run", JOB, "auto")
    finally:
        process.kill()
        os.kill(child, signal.SIGKILL)
        process.communicate()


def test_a_job_that_is_only_beginning_is_named_as_the_one_that_has_the_directory(tmp_path, other):
    run = tmp_path / "run"
    (run / RUN).rename(partial_path(run / RUN))  # as it is between the lock and the record
    with pytest.raises(UserError, match=rf"is in use by a job on \S+, process {other.pid}"):
        claim(run, JOB, "auto")


def test_a_job_killed_while_it_wrote_its_record_leaves_a_free_directory(tmp_path):
    (tmp_path / LOCK).touch()
    partial_path(tmp_path / RUN).write_text('{"recipe"')
    claim(tmp_path, JOB, "never")
    assert sorted(path.name for path in tmp_path.iterdir()) == [LOCK, RUN]


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"host": "a"}'])
def test_a_lock_file_without_a_name(text):
    assert holder(text) == "that has just started"


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_without_locks_says_so_and_goes_on(tmp_path, monkeypatch, capsys, number):
    def refuses(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuses)
    claim(tmp_path / "run", JOB, "auto")
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "its file system has no locks" in said
    assert (tmp_path / "run" / RUN).is_file() and Path(tmp_path / "run").resolve() not in run_lock._held
