"""A job on two machines, which are two network namespaces joined by one cable: rendezvous and gradients over TCP.

It takes root, and a system that gives out namespaces. The run directory is one that both see, as on a cluster.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import launching
import pytest
from launching import ROOT, TRAIN, settings

TIMEOUT_S = 15  # of collectives
ENDS_S = 150  # both hosts, after the cable is cut for good: the timeout, a minute for the watchdog to speak first, torchrun
ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu",
}  # fmt: skip


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def can_make_hosts() -> bool:
    if os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("unshare"):
        return False
    name = f"prdp-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode == 0
    return made and subprocess.run(["ip", "netns", "del", name], capture_output=True).returncode == 0


pytestmark = [
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.skipif(not can_make_hosts(), reason="needs root, iproute2 and network namespaces"),
]


class Hosts:
    """host-0 at 10.77.0.1 and host-1 at 10.77.0.2."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names = [f"prdp-{os.getpid()}-{number}" for number in range(2)]
        self.jobs: list[subprocess.Popen] = []

    def __enter__(self) -> Hosts:
        for name in self.names:
            ip("netns", "add", name)
        ip("link", "add", "cable", "netns", self.names[0], "type", "veth", "peer", "name", "cable", "netns", self.names[1])
        for number, name in enumerate(self.names):
            ip("-n", name, "addr", "add", f"10.77.0.{number + 1}/24", "dev", "cable")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", "cable", "up")
        return self

    def __exit__(self, *_: object) -> None:
        for job in self.jobs:
            if job.poll() is None:
                os.killpg(job.pid, signal.SIGKILL)
            job.wait()
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)

    def cable(self, state: str) -> None:
        """Args: state: up or down."""
        ip("-n", self.names[1], "link", "set", "cable", state)

    def start(self, *words: str | Path) -> None:
        """torchrun with one rank on each host."""
        torchrun = Path(sys.executable).with_name("torchrun")
        for number, name in enumerate(self.names):
            command = [
                str(torchrun), "--nnodes", "2", "--node-rank", str(number), "--nproc-per-node", "1", "--master-addr", "10.77.0.1",
                "--master-port", "29511", str(TRAIN), *map(str, words),
            ]  # fmt: skip
            shell = f'hostname host-{number} && exec "$@"'
            with (self.folder / f"host-{number}.log").open("w") as log:
                self.jobs.append(
                    subprocess.Popen(
                        ["ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", shell, "sh", *command],
                        stdout=log, stderr=log, env=os.environ | ENVIRONMENT | {"GLOO_SOCKET_IFNAME": "cable"},
                        start_new_session=True,
                    )
                )  # fmt: skip

    def end(self, within_s: float) -> list[int]:
        """The statuses of both. Raises: AssertionError with what they said."""
        deadline = time.monotonic() + within_s
        while any(job.poll() is None for job in self.jobs):
            assert time.monotonic() < deadline, f"a host does not end:\n{self.said()}"
            time.sleep(0.1)
        return [job.returncode for job in self.jobs]

    def said(self) -> str:
        return "\n".join(path.read_text(errors="replace")[-4000:] for path in sorted(self.folder.glob("host-*.log")))


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    with Hosts(tmp_path) as found:
        yield found


def words(run: Path, epochs: int) -> list[str | Path]:
    values = {
        "schedule.epochs": epochs, "checkpoint.every": 1, "evaluation.prompts": 0, "schedule.reward_timeout_s": 5,
        "schedule.collective_timeout_minutes": TIMEOUT_S / 60, "performance.attention": "sdpa", "performance.fuse_qkv": "off",
    }  # fmt: skip
    return ["--recipe", "smoke", "--config", "zero2.json", "--output", run, *settings(values)]


def rows(run: Path) -> list[dict]:
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def results(run: Path) -> list[tuple]:
    return [(row["epoch"], row["reward"], row["loss"], row["grad_norm"]) for row in rows(run)]


def wait_for_epochs(hosts: Hosts, run: Path, count: int) -> None:
    deadline = time.monotonic() + 200
    while len(rows(run)) < count:
        assert time.monotonic() < deadline and all(job.poll() is None for job in hosts.jobs), hosts.said()
        time.sleep(0.05)


def test_two_hosts_compute_what_one_does_and_outlast_a_short_cut(hosts: Hosts, tmp_path: Path) -> None:
    hosts.start(*words(tmp_path / "two", 12))
    wait_for_epochs(hosts, tmp_path / "two", 2)
    hosts.cable("down")
    time.sleep(3)
    hosts.cable("up")
    assert hosts.end(200) == [0, 0], hosts.said()
    found = [json.loads((tmp_path / f"two/ranks/rank-{rank:05d}.json").read_text())["host"] for rank in range(2)]
    assert found == ["host-0", "host-1"]
    launching.run(TRAIN, *words(tmp_path / "one", 12), ranks=2)
    assert len(results(tmp_path / "two")) == 12 and results(tmp_path / "two") == results(tmp_path / "one"), "bit for bit"


def test_a_cable_that_is_cut_for_good_ends_the_job_and_one_host_goes_on(hosts: Hosts, tmp_path: Path) -> None:
    run = tmp_path / "run"
    hosts.start(*words(run, 10_000))
    wait_for_epochs(hosts, run, 3)
    hosts.cable("down")
    assert all(status != 0 for status in hosts.end(ENDS_S)), hosts.said()
    reached = len(rows(run))
    assert "error: rank " in hosts.said(), hosts.said()
    done = launching.run(TRAIN, *words(run, reached + 1), "--resume", "auto", ranks=1)
    assert "continuing on 1 rank instead of 2" in done.text and "continuing after epoch" in done.text
    assert [row["epoch"] for row in rows(run)] == list(range(reached + 1))
