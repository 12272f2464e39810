"""`prdp doctor --ranks`: what the ranks of a job find of each other before it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from launching import ROOT, free_port
from torch import distributed as dist

from prdp_fast.core import distributed
from prdp_fast.doctor import network


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A job of one rank, on the CPU, with small messages."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(network, "LARGE", 2000)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    yield
    distributed.shutdown()


def findings(runs: Path) -> dict[str, network.Finding]:
    return {finding.check: finding for finding in network.examine_ranks(runs)}


def test_one_rank(alone: None, tmp_path: Path) -> None:
    found = findings(tmp_path / "runs")
    assert list(found) == ["ranks", "versions", "sums", "latency", "bandwidth", "runs"]
    assert {name: finding.status for name, finding in found.items() if finding.status != "ok"} == {"bandwidth": "note"}
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_wrong_sum(alone: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = dist.all_reduce

    def wrong(values: torch.Tensor, *words: object, **options: object) -> None:
        right(values, *words, **options)
        if values.numel() == 2000:
            values[1234] += 1

    monkeypatch.setattr(dist, "all_reduce", wrong)
    assert findings(tmp_path)["sums"].found == "1 of 2,000 elements of an all-reduce and 0 of a gather are wrong on a rank"


def test_other_versions_and_a_directory_of_one_s_own(alone: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gathered = {list: lambda value: [value, ["0.1", *value[1:]]], bool: lambda value: [value, False]}
    monkeypatch.setattr(distributed, "gather_objects", lambda value: gathered.get(type(value), lambda one: [one])(value))
    monkeypatch.setattr(network, "SEEN_S", 0.0)
    found = findings(tmp_path)
    assert found["versions"].found == f"torch is {torch.__version__} on rank 0 and 0.1 on rank 1"
    assert found["runs"].found == f"rank 1 does not see in {tmp_path} what rank 0 writes there"


def test_a_directory_that_cannot_be_written(alone: None, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert findings(tmp_path / "file" / "runs")["runs"].status == "fault"


@pytest.mark.distributed
def test_two_ranks(tmp_path: Path) -> None:
    torchrun = [str(Path(sys.executable).with_name("torchrun")), "--nproc-per-node", "2", "--master-port", str(free_port())]
    paths = {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [*torchrun, "-m", "prdp_fast.cli", "doctor", "--ranks", "--json", "--runs", str(tmp_path)], cwd=ROOT,
        env=os.environ | paths, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout)
    assert [check["status"] for check in told["checks"]] == ["ok"] * 6 and told["faults"] == []
    assert told["checks"][0]["found"].startswith("2 ranks meet by gloo: 2 on ")
    assert "GB/s a rank" in told["checks"][4]["found"] and list(tmp_path.iterdir()) == []
