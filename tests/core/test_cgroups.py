"""Limits of memory that a container or a queue sets, in trees like those of the kernel."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from prdp_fast.core import cgroups
from prdp_fast.planning import memory

GB = 10**9


def group(folder: Path, version: int, limit: int | str, used: int, dropped: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = cgroups.FILES[version]
    for name, value in zip(names[:2], (limit, used), strict=True):
        (folder / name).write_text(f"{value}\n")
    (folder / "memory.stat").write_text(f"anon 7\n{names[2]} {dropped}\n")


def room(tmp_path: Path, own: str) -> int | None:
    (tmp_path / "own").write_text(own)
    return cgroups.memory_room(tmp_path / "fs", tmp_path / "own")


def test_the_least_of_a_job_s_group_and_of_those_above(tmp_path: Path) -> None:
    root = tmp_path / "fs"
    group(root / "system.slice/job/step", 2, "max", 3 * GB)
    group(root / "system.slice/job", 2, 16 * GB, 6 * GB, 2 * GB)  # two of the six are files that the kernel drops
    group(root / "system.slice", 2, 64 * GB, 6 * GB)
    (root / "cgroup.controllers").write_text("memory\n")
    own = "0::/system.slice/job/step\n"
    assert room(tmp_path, own) == 12 * GB
    group(root / "system.slice", 2, 10 * GB, 6 * GB)
    assert room(tmp_path, own) == 4 * GB
    group(root / "system.slice", 2, 5 * GB, 6 * GB)
    assert room(tmp_path, own) == 0, "what is too much already leaves nothing"


def test_the_first_version_and_a_container_that_is_told_its_name_outside(tmp_path: Path) -> None:
    group(tmp_path / "fs/memory", 1, 8 * GB, 5 * GB, GB)
    own = "12:cpu,cpuacct:/docker/1f\n4:memory:/docker/1f\n0::/\n"
    assert room(tmp_path, own) == 4 * GB
    group(tmp_path / "fs/memory", 1, 9223372036854771712, 5 * GB)
    assert (room(tmp_path, own) or 0) > 10**18, "no limit is a large number there"


@pytest.mark.parametrize("own", ["", "0::/\n", "4:memory:/x\n"])
def test_no_limit_and_no_groups(tmp_path: Path, own: str) -> None:
    assert room(tmp_path, own) is None
    assert cgroups.memory_room(tmp_path / "fs", tmp_path / "nowhere") is None
    group(tmp_path / "fs", 2, "no number", GB)
    (tmp_path / "fs/cgroup.controllers").touch()
    assert room(tmp_path, own) is None


def test_a_rank_plans_with_what_its_limit_leaves(monkeypatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(cgroups, "memory_room", lambda: None)
    assert memory.free_bytes(cpu) > 10_000_000
    monkeypatch.setattr(cgroups, "memory_room", lambda: 10_000_000)
    assert memory.free_bytes(cpu) == 10_000_000 and memory.free_bytes(cpu, local_ranks=4) == 2_500_000
    monkeypatch.setattr(cgroups, "memory_room", lambda: 2**62)
    assert memory.free_bytes(cpu) < 2**50, "what the machine has is a limit, too"
