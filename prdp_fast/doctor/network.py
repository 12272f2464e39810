"""Do the ranks of a job reach each other, add up rightly, and how fast? Every rank runs this; rank 0 tells."""

from __future__ import annotations

import os
import socket
import statistics
import time
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from pathlib import Path

import torch
from torch import distributed as dist

from prdp_fast.core import distributed
from prdp_fast.doctor.checks import Finding, Outcome, fault, note, ok

PATIENCE_S = 60.0  # for a rank that does not come
SEEN_S = 90.0  # in which a file of rank 0 is seen by all: NFS may keep for a minute that there is none
SMALL, LARGE = 1, 16 * 2**20  # float32 elements: latency, and 64 MiB
ROUNDS = 5
SAME = ("torch", "deepspeed", "diffusers", "prdp-fast")  # what all ranks need in one version


def examine_ranks(runs: Path) -> Iterator[Finding]:
    """Findings in order, the same on every rank. Args: runs: the directory that runs go to, which all machines share.

    Raises: UserError if the ranks do not meet.
    """
    device = distributed.init(PATIENCE_S)
    hosts = distributed.gather_objects(socket.gethostname())
    counts = ", ".join(f"{hosts.count(host)} on {host}" for host in dict.fromkeys(hosts))
    yield Finding("ranks", *ok(f"{len(hosts)} ranks meet by {dist.get_backend()}: {counts}"))
    checks: dict[str, Callable[[], Outcome]] = {
        "versions": same_versions,
        "sums": partial(right_sums, device),
        "latency": partial(latency, device),
        "bandwidth": partial(bandwidth, device),
        "runs": partial(shared, runs),
    }
    for name, check in checks.items():
        yield Finding(name, *check())


def same_versions() -> Outcome:
    """Of the libraries that a job computes with."""
    found = distributed.gather_objects([version(name) for name in SAME])
    for number, name in enumerate(SAME):
        versions = [one[number] for one in found]
        if len(set(versions)) > 1:
            other = next(rank for rank, value in enumerate(versions) if value != versions[0])
            return fault(
                f"{name} is {versions[0]} on rank 0 and {versions[other]} on rank {other}", "install one version on all machines"
            )
    return ok(", ".join(f"{name} {value}" for name, value in zip(SAME, found[0], strict=True)) + " everywhere")


def version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def right_sums(device: torch.device) -> Outcome:
    """An all-reduce of numbers whose sum float32 holds exactly, and a gather of each rank's own part."""
    count, rank = distributed.world_size(), distributed.rank()
    values = torch.arange(LARGE, device=device, dtype=torch.float32).remainder_(1000).add_(rank)
    expected = torch.arange(LARGE, device=device, dtype=torch.float32).remainder_(1000).mul_(count).add_(count * (count - 1) / 2)
    dist.all_reduce(values)
    wrong = [float((values != expected).sum())]
    parts = [torch.empty(1000, device=device) for _ in range(count)]
    dist.all_gather(parts, torch.full((1000,), float(rank), device=device))
    wrong.append(float(sum((part != number).sum() for number, part in enumerate(parts))))
    worst = distributed.all_reduce(wrong, "max")
    if any(worst):
        return fault(
            f"{worst[0]:.0f} of {LARGE:,} elements of an all-reduce and {worst[1]:.0f} of a gather are wrong on a rank",
            "look for a broken card or cable: NCCL_DEBUG=INFO names the path that NCCL took",
        )
    return ok(f"an all-reduce of {LARGE:,} numbers and a gather are exact")


def seconds(size: int, device: torch.device) -> float:
    """Median over the rounds of an all-reduce of so many float32, of the slowest rank."""
    values = torch.ones(size, device=device)
    taken = []
    for _ in range(ROUNDS + 1):  # the first one connects
        distributed.barrier()
        start = time.perf_counter()
        dist.all_reduce(values, dist.ReduceOp.MAX)
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return distributed.all_reduce([statistics.median(taken[1:])], "max")[0]


def latency(device: torch.device) -> Outcome:
    return ok(f"an all-reduce of one number takes {seconds(SMALL, device) * 1e6:,.0f} us")


def bandwidth(device: torch.device) -> Outcome:
    """What a card sends and receives, as NCCL's tests count it: 2 (n - 1) / n times the bytes."""
    count, taken = distributed.world_size(), seconds(LARGE, device)
    sent = 2 * (count - 1) / count * 4 * LARGE / taken
    said = f"an all-reduce of {4 * LARGE / 2**20:.0f} MiB takes {taken * 1e3:,.1f} ms: {sent / 1e9:.2f} GB/s a rank"
    return ok(said) if count > 1 else note("one rank sends nothing", "start this with the launcher of the job")


def shared(runs: Path) -> Outcome:
    """Whether a file of rank 0 is seen by all."""
    problem, name = "", ""
    if distributed.is_main():
        path = runs / f".doctor-{uuid.uuid4().hex}"
        try:
            runs.mkdir(parents=True, exist_ok=True)
            path.touch()
        except OSError as error:
            problem = error.strerror or str(error)
        name = path.name
    problem, name = distributed.from_main((problem, name))
    if problem:
        return fault(f"{runs} cannot be written by rank 0 ({problem})", "name another directory with --runs")
    deadline = time.monotonic() + SEEN_S
    while not (seen := os.path.exists(runs / name)) and time.monotonic() < deadline:
        time.sleep(0.05)
    blind = [number for number, one in enumerate(distributed.gather_objects(seen)) if not one]
    if distributed.is_main():
        (runs / name).unlink(missing_ok=True)
    if blind:
        return fault(
            f"rank {blind[0]} does not see in {runs} what rank 0 writes there", "name a directory of a file system that all share"
        )
    return ok(f"{runs} is one directory for all ranks")
