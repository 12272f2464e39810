"""What has to be in place before anything heavy is imported. The entry points call `prepare` first."""

from __future__ import annotations

import hashlib
import os
import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from prdp_fast.core.errors import OneRankError, UserError
from prdp_fast.core.visible import visible

_set_here: dict[str, str] = {}
_faults: list[str] = []  # found by `prepare`, told by `check_launch`

FIRST_PORT, PORTS = 20000, 12000  # where ranks meet if nothing says so: below what outgoing connections take


def prepare() -> None:
    """Set the variables that libraries read when they are imported, and let a clone find its `prdp_kernels`."""
    _faults.clear()
    _show_everything()
    _find_home()
    _adopt_ranks()
    local_ranks = _count(os.environ.get("LOCAL_SIZE")) or _count(os.environ.get("LOCAL_WORLD_SIZE")) or 1
    _settle_threads(max(1, (os.cpu_count() or 1) // local_ranks))
    # transformers and diffusers log while they are imported.
    _set_default("TRANSFORMERS_VERBOSITY", "error")
    _set_default("DIFFUSERS_VERBOSITY", "error")
    _find_kernels()


def before_prepare() -> dict[str, str]:
    """The environment without what `prepare` set, for a launcher whose ranks call `prepare` themselves.

    This process may use every core. If the ranks inherited its OMP_NUM_THREADS, each of them would do so too.
    """
    return {name: value for name, value in os.environ.items() if _set_here.get(name) != value}


def check_launch(*, starts: bool = True) -> None:
    """Refuse what would start several jobs of one rank in place of one job.

    Args: starts: False if nothing is going to run, so that what a launcher leaves out does not matter.
    Raises: UserError; OneRankError about the numbers of this process, which need not be wrong on rank 0.
    """
    if starts and _faults:
        raise UserError(_faults[0])
    for name in ("LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE"):
        launched(name, 1)
    found = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE") if os.environ.get(name)}
    if not found:
        return
    if len(found) < 2 and found.get("WORLD_SIZE") != "1" and found.get("RANK") != "0":
        (name, value), missing = next(iter(found.items())), ({"RANK", "WORLD_SIZE"} - found.keys()).pop()
        raise OneRankError(
            f"{name} is {value} and {missing} is not set; a launcher sets both: start the job with one, or unset {name}"
        )
    rank, size = (_whole(found.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    if rank is None or size is None or not 0 <= rank < size:
        raise OneRankError(
            f"RANK is {found.get('RANK')!r} and WORLD_SIZE {found.get('WORLD_SIZE')!r}; expected a rank from 0 that is below the "
            "number of ranks: start the job with a launcher, or unset both"
        )


def launched(name: str, default: int) -> int:
    """A number that a launcher sets, such as RANK; `default` without it. Raises: OneRankError."""
    given = os.environ.get(name, "")
    number = _whole(given) if given.strip() else default
    if number is None or number < 0:
        raise OneRankError(
            f"{name} is {given!r}; expected a whole number from 0, which a launcher sets: start the job with one, or unset {name}"
        )
    return number


def say(text: str) -> None:
    """A line for the user, of the one rank that speaks."""
    if os.environ.get("RANK", "0") == "0":
        print(visible(text), file=sys.stderr, flush=True)


def _set_default(name: str, value: str) -> None:
    if name not in os.environ:
        _set(name, value)


def _set(name: str, value: str) -> None:
    os.environ[name] = _set_here[name] = value


def _whole(text: str | None) -> int | None:
    return int(text) if text is not None and re.fullmatch(r"\s*-?[0-9]{1,9}\s*", text) else None


def _count(text: str | None) -> int | None:
    """A number from 1. None for anything else."""
    number = _whole(text)
    return number if number is not None and number > 0 else None


def _settle_threads(default: int) -> None:
    """OMP_NUM_THREADS as one number. OpenMP also takes a list, a number for each level of nesting, of which the first counts."""
    given = os.environ.get("OMP_NUM_THREADS")
    threads = None if given is None else _count(given.partition(",")[0])
    if given is not None and threads is None:
        if given.strip():
            say(f"OMP_NUM_THREADS is {given!r}, which is no number of threads; taking {default}")
    if threads is None:
        _set("OMP_NUM_THREADS", str(default))
    elif given != str(threads):
        os.environ["OMP_NUM_THREADS"] = str(threads)


def _show_everything() -> None:
    """A terminal that cannot show a character shows its number, and printing never fails."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None and getattr(stream, "errors", None) in ("strict", "surrogateescape"):
            reconfigure(errors="backslashreplace")


def _find_home() -> None:
    """A home for the caches of libraries where the user has none, as in containers that run under an unknown number."""
    if os.path.expanduser("~") != "~":
        return
    home = Path(tempfile.gettempdir()) / f"prdp_fast-{os.getuid()}"
    try:
        home.mkdir(mode=0o700, exist_ok=True)
        owner = home.stat().st_uid
    except OSError as error:
        _faults.append(
            f"there is no home directory, and {home} cannot be made ({error.strerror}); set HOME to one that can be written"
        )
        return
    if owner != os.getuid():
        _faults.append(f"there is no home directory, and {home} belongs to somebody else; set HOME to one that can be written")
        return
    _set("HOME", str(home))
    _set_default("USER", f"uid{os.getuid()}")  # who asks for a name finds one
    say(f"there is no home directory: caches go to {home}; set HOME or PRDP_CACHE to keep them")


# ------------------------------------------------------------------------------------------------------- ranks of other launchers
class _Task(NamedTuple):
    """What a launcher says of a process that it started."""

    launcher: str
    rank: int
    size: int
    local_rank: int | None
    local_size: int | None
    host: str | None  # of rank 0
    name: str  # of the job: the same on all ranks


def _adopt_ranks() -> None:
    """Read what srun and mpirun say, and set what torch and DeepSpeed read. One rank is no group, and needs nothing."""
    if "RANK" in os.environ or "WORLD_SIZE" in os.environ:
        return
    # mpirun starts its daemons with srun, and srun sets some of MPI's variables: who says more is who started this process.
    task = _mpi_task(os.environ)
    if task is None or task.local_rank is None:
        task = _slurm_task(os.environ) or task
    if task is None or task.size == 1:
        return
    host = os.environ.get("MASTER_ADDR") or task.host
    if task.local_rank is None or host is None:
        missing = "MASTER_ADDR (the host of rank 0)" if host is None else "LOCAL_RANK"
        _faults.append(
            f"{task.launcher} started this process as rank {task.rank} of {task.size} and does not say {missing}; set it, "
            "or start the job with deepspeed or torchrun"
        )
        return
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    # A task that is given one GPU of several sees it as number 0.
    local_rank = task.local_rank % len(visible) if visible else task.local_rank
    port = FIRST_PORT + int.from_bytes(hashlib.blake2b(task.name.encode(), digest_size=4).digest(), "little") % PORTS
    _set("RANK", str(task.rank))
    _set("WORLD_SIZE", str(task.size))
    _set("LOCAL_RANK", str(local_rank))
    _set_default("LOCAL_SIZE", str(task.local_size or 1))
    _set_default("MASTER_ADDR", host)
    _set_default("MASTER_PORT", str(port))


def _slurm_task(environment: Mapping[str, str]) -> _Task | None:
    rank, size = _whole(environment.get("SLURM_PROCID")), _count(environment.get("SLURM_STEP_NUM_TASKS"))
    if rank is None:
        return None
    if size is None:
        # A batch script, which runs once whatever the number of tasks is; srun would say the number of its own.
        tasks = _count(environment.get("SLURM_NTASKS")) or 1
        if tasks > 1:
            _faults.append(
                f"SLURM_NTASKS is {tasks}, but srun did not start this process; start the job with srun, with deepspeed or with "
                "--num_gpus N, or unset SLURM_NTASKS for a job of one rank"
            )
        return None
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST") or environment.get("SLURM_NODELIST")
    host = "127.0.0.1" if environment.get("SLURM_STEP_NUM_NODES") == "1" else _first_host(nodes or "")
    name = f"slurm {environment.get('SLURM_JOB_ID')} {environment.get('SLURM_STEP_ID')}"
    local_size = _tasks_of_node(environment.get("SLURM_STEP_TASKS_PER_NODE", ""), _whole(environment.get("SLURM_NODEID")) or 0)
    return _Task("srun", rank, size, _whole(environment.get("SLURM_LOCALID")), local_size, host, name)


def _first_host(nodes: str) -> str | None:
    """Of SLURM's short form: "gpu[003-007,012],cpu1" -> "gpu003"."""
    host = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", host[0]) if host else None


def _tasks_of_node(counts: str, node: int) -> int | None:
    """Of SLURM's short form: "4(x2),1" is 4, 4 and 1."""
    spread: list[int] = []
    for count, times in re.findall(r"([0-9]+)(?:\(x([0-9]+)\))?", counts):
        spread += [int(count)] * min(int(times or 1), 100_000)
    return spread[node] if node < len(spread) else None


# Launcher, rank, number of ranks, rank on this machine, ranks on this machine, name of the job.
_MPI = (
    ("mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE",
     "PMIX_NAMESPACE"),
    ("mpirun", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE",
     "PMI_JOBID"),
    ("mpiexec", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS", "PMI_JOBID"),
)  # fmt: skip


def _mpi_task(environment: Mapping[str, str]) -> _Task | None:
    for launcher, *names, job in _MPI:
        rank, size, local_rank, local_size = (_whole(environment.get(name)) for name in names)
        if rank is not None and size is not None:
            host = "127.0.0.1" if local_size == size else None
            return _Task(launcher, rank, size, local_rank, local_size, host, f"mpi {environment.get(job)}")
    return None


def _find_kernels() -> None:
    """Put a clone's `kernels/` on the path: without an installation nothing else does.

    It comes before installed packages, so that the two packages of a clone are used together.
    """
    folder = Path(__file__).resolve().parents[2] / "kernels"
    if (folder / "prdp_kernels").is_dir() and str(folder) not in sys.path:
        sys.path.insert(1, str(folder))
