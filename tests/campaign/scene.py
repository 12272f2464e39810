"""One case: a run directory, the starts of its job, what was done to them, and what was seen."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import launching
from launching import ROOT, TRAIN

from campaign import facts
from campaign.settings import EPOCHS, Setting

SETTLE_S = 30.0  # from a job's end to that of its last process
START_S = 420.0  # that a whole start may take where nothing is done to it; the machine may be shared
PHASES = ("rollout", "reward", "update", "checkpoint", "evaluate")  # that can be waited for
_starting = threading.Lock()  # the server of ranks answers one at a time


@dataclass(frozen=True)
class Case:
    name: str
    setting: Setting
    play: Callable[[Scene], None]
    bound_s: float = 60.0  # documented, from the fault to the end of the job; see `Scene.bound_s`
    mendable: bool = True  # a traceback is one too many
    compare: str = "exact"  # the finished run with one that nothing was done to: "exact", "rounding" or "no"
    short: bool = False  # in the short form too


@dataclass
class Start:
    """One start of the job."""

    status: int | None  # None: it was killed here, for it had hung
    seconds: float
    text: str
    alive: int  # processes that outlived it by more than SETTLE_S

    @property
    def line(self) -> str:
        """What the user reads of its end."""
        lines = [line.strip() for line in self.text.splitlines() if line.strip()]
        found = [line for line in lines if re.match(r"(\w+: )?(error: |stopped by |WARNING: |checkpoint )", line)]
        return (found or lines or [""])[-1]


class ServerDied(Exception):
    """Somebody has ended the process that forks the ranks: what is seen of a case then says nothing."""


class Launched:
    """A job of the true command line, with the interface of a `launching.Job`."""

    def __init__(self, command: list[str], folder: Path) -> None:
        environment = os.environ | {
            "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu",
            "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
        }  # fmt: skip
        self.path = folder / f"log-{len(list(folder.glob('log-*')))}"
        with self.path.open("w") as log:
            self.process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, env=environment, start_new_session=True)
        self.pid = self.process.pid

    def poll(self) -> int | None:
        return self.process.poll()

    def output(self) -> str:
        return self.path.read_text(errors="replace")


class Scene:
    def __init__(self, case: Case, folder: Path, draw: random.Random, kit: Any) -> None:
        self.case, self.folder, self.draw, self.kit = case, folder, draw, kit
        self.run = folder / "run"
        self.run.parent.mkdir(parents=True, exist_ok=True)
        self.starts: list[Start] = []
        self.injected: list[str] = []
        self.lost: list[str] = []
        self.hung: list[str] = []
        self.unexpected: list[str] = []
        self.untold: list[str] = []
        self.told_by: dict[str, int] = {}  # what has to be named, by the start from which on it can be
        self.finished = False
        self._began = 0.0
        self._whole = 0  # epoch of the newest whole checkpoint before the start that runs
        self._seen = 0  # epoch of the newest checkpoint when something was done to it

    # Starts.

    def start(self, *more: str, env: dict[str, str] | None = None, setting: Setting | None = None, **values: object) -> Any:
        """The job's command. Args: values: recipe settings, with "__" for "."."""
        setting = setting or self.case.setting
        given = {name.replace("__", "."): value for name, value in values.items()}
        words = setting.words(self.kit.model, self.run, given)
        fault = {"CAMPAIGN_FAULT": setting.fault} if setting.fault else {}
        self._began, self._whole, self._seen = time.monotonic(), facts.newest_whole(self.run), 0
        with _starting:
            return launching.start(self.kit.script, *words, *more, ranks=setting.ranks, env=fault | (env or {}), cwd=self.folder)

    def launch(self, command: list[str]) -> Launched:
        """The job by a true launcher."""
        self._began, self._whole, self._seen = time.monotonic(), facts.newest_whole(self.run), 0
        return Launched(command, self.folder)

    def end(self, job: Any, statuses: Iterable[int] = (0,), says: str = "", within: float | None = None) -> Start:
        """Wait for the end of a start, and look at it.

        Args:
            statuses: those that are documented.
            says: a pattern that the output has to have.
            within: seconds from now on.
        """
        within = START_S if within is None else within
        deadline, processes = time.monotonic() + within, [one["pid"] for one in facts.rank_files(self.run)]
        while (status := job.poll()) is None and time.monotonic() < deadline:
            if isinstance(job, launching.Job) and launching.server_is_gone():
                raise ServerDied
            time.sleep(0.02)
        if status is None:
            self.hung.append(f"start {len(self.starts) + 1} did not end within {within:.0f} s")
            self.kill_all(job, processes)
        left = self.left(job, processes, time.monotonic() + SETTLE_S + (0 if status != -signal.SIGKILL else within))
        if left:
            self.hung.append(f"{left} processes of start {len(self.starts) + 1} live on")
            self.kill_all(job, processes)
        start = Start(status, round(time.monotonic() - self._began, 1), job.output(), left)
        self.starts.append(start)
        if isinstance(job, launching.Job):
            shutil.rmtree(job.folder, ignore_errors=True)
        if status is not None and status not in set(statuses):
            self.unexpected.append(f"start {len(self.starts)} has status {status}, expected {' or '.join(map(str, statuses))}")
        if says and not re.search(says, start.text):
            self.unexpected.append(f"start {len(self.starts)} does not say {says!r}")
        self.look_for_losses(start)
        return start

    def finish(self, *more: str, says: str = "", env: dict[str, str] | None = None, **values: object) -> Start:
        """Start the job, and let it come to its end."""
        start = self.end(self.start(*more, env=env, **values), says=says)
        self.finished = True
        return start

    def left(self, job: Any, processes: list[int], deadline: float) -> int:
        """How many processes of a job live at the deadline."""
        while alive := set(facts.group(job.pid)) | {pid for pid in processes if facts.is_alive(pid)}:
            if time.monotonic() > deadline:
                return len(alive)
            time.sleep(0.05)
        return 0

    def kill_all(self, job: Any, processes: list[int]) -> None:
        for pid in {*facts.group(job.pid), *processes}:
            facts.stop_process(pid, signal.SIGCONT)
            facts.stop_process(pid, signal.SIGKILL)
        deadline = time.monotonic() + 10
        while job.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)

    def look_for_losses(self, start: Start) -> None:
        """What a start went on from, and what it left, against what was there."""
        number, whole = len(self.starts), facts.newest_whole(self.run)
        before = max(self._whole, self._seen)
        if whole < before:
            self.lost.append(f"epoch {before} was saved, and after start {number} the newest whole checkpoint is of {whole}")
        went_on = re.search(r"continuing after epoch (\d+)", start.text)
        began_anew = went_on is None and re.search(r"^epoch 1/", start.text, re.MULTILINE)
        if (went_on and int(went_on[1]) < self._whole) or (began_anew and self._whole):
            self.lost.append(f"start {number} goes on from {went_on[1] if went_on else 0}, and epoch {self._whole} was whole")
        if (promised := re.search(r"stopped by .*?: (\d+) of \d+ epochs are saved", start.text)) and whole != int(promised[1]):
            self.lost.append(f"start {number} says that {promised[1]} epochs are saved, and it is {whole}")

    # What is done.

    def note(self, what: str) -> None:
        self.injected.append(what)
        self._seen = max(self._seen, facts.newest(self.run))

    def wait_for(self, job: Any, phase: str, epoch: int, rank: int = 0) -> dict[str, Any] | None:
        """Until a rank is in a phase of an epoch, or past it.

        Returns: what the rank says of itself; None if the job has ended.
        """
        deadline = time.monotonic() + START_S
        while job.poll() is None and time.monotonic() < deadline:
            if isinstance(job, launching.Job) and launching.server_is_gone():
                raise ServerDied
            found = next((one for one in facts.rank_files(self.run) if one["rank"] == rank), None)
            if found is not None:
                at = found["epoch"] if found["epoch"] is not None else -1
                if at > epoch or (at == epoch and (found["phase"] == phase or phase not in PHASES)):
                    return found
            time.sleep(0.003)
        return None

    def reach(self, job: Any, phase: str, *, rank: int = 0, epoch: int | None = None, longest_s: float = 0.2) -> bool:
        """Wait for a moment in a phase, drawn from the seed. Returns: whether there was one.

        Args: epoch: None draws it; that of a checkpoint or an evaluation is the number of epochs that are finished.
        """
        if epoch is None:
            epoch = self.draw.choice({"evaluate": (0, 2, EPOCHS), "checkpoint": (2, 3)}.get(phase, (1, 2, 3)))
        delay = self.draw.uniform(0, longest_s)
        found = self.wait_for(job, phase, epoch, rank)
        time.sleep(delay)
        if found is None or job.poll() is not None:
            self.unexpected.append(f"the job had ended before {phase} of epoch {epoch}: nothing was done to it")
            return False
        now = next((one for one in facts.rank_files(self.run) if one["rank"] == rank), found)
        self.note(f"{now['phase']} of epoch {now['epoch']}, {1000 * delay:.0f} ms after {phase} of {epoch} began")
        return True

    def send(self, job: Any, name: str, target: str) -> None:
        """A signal to "rank N", to all "ranks", to the "launcher" or to the process "group"."""
        number = signal.Signals[name]
        if target in ("launcher", "group"):
            with contextlib.suppress(ProcessLookupError):
                (os.killpg if target == "group" else os.kill)(job.pid, number)
            return
        for one in facts.rank_files(self.run):
            if target in ("ranks", f"rank {one['rank']}"):
                facts.stop_process(one["pid"], number)

    def crashed(self) -> None:
        """Make the run directory that of a job which lost its power in the last epoch but one."""
        _, snapshot = self.kit.reference(self.case.setting)
        shutil.copytree(snapshot, self.run)

    def must_name(self, what: str) -> None:
        """From the next start on, the output has to have this."""
        self.told_by[what] = len(self.starts)

    @property
    def bound_s(self) -> float:
        """From the fault to the end of the job: what is documented, and on a busy machine as long again as whole runs take."""
        return self.case.bound_s + 2 * self.kit.seconds[self.case.setting]

    def reference(self) -> Path:
        return self.kit.reference(self.case.setting)[0]


@dataclass
class Kit:
    """What the cases of a campaign share: the model, and an undisturbed run of every setting."""

    folder: Path
    script: Path = TRAIN  # what a start runs; a reference is always the engine as it is
    model: Path = field(init=False)
    seconds: dict[Setting, float] = field(default_factory=dict)
    _made: dict[Setting, tuple[Path, Path]] = field(default_factory=dict)
    _locks: dict[Setting, threading.Lock] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.model = self.folder / "model"
        launching.run(Path(__file__).with_name("make_model.py"), self.model, cwd=self.folder)

    def reference(self, setting: Setting) -> tuple[Path, Path]:
        """A run that nothing was done to; and its directory as it was after the last epoch but one, its processes halted for as
        long as the copy took: what a machine leaves that loses its power."""
        with self._lock:
            lock = self._locks.setdefault(setting, threading.Lock())
        with lock:
            if setting not in self._made:
                self._made[setting] = self._make(setting, self.folder / f"reference-{len(self._locks)}-{os.getpid()}")
            return self._made[setting]

    def _make(self, setting: Setting, folder: Path) -> tuple[Path, Path]:
        run, snapshot = folder / "run", folder / "snapshot"
        folder.mkdir()
        began = time.monotonic()
        with _starting:
            job = launching.start(
                TRAIN, *setting.words(self.model, run, {}), ranks=setting.ranks, cwd=folder,
                env={"CAMPAIGN_FAULT": setting.fault} if setting.fault else {},
            )  # fmt: skip
        while not (run / f"checkpoints/epoch-{EPOCHS - 1:06d}").exists():
            assert job.poll() is None and time.monotonic() - began < START_S, job.output()[-4000:]
            time.sleep(0.003)
        pids = facts.group(job.pid)
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        shutil.copytree(run, snapshot)
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        finished = job.wait(START_S)
        assert finished.returncode == 0, finished.text[-4000:]
        self.seconds[setting] = time.monotonic() - began
        assert facts.newest_whole(snapshot) == EPOCHS - 1 and facts.newest_whole(run) == EPOCHS
        summary = json.loads((run / "summary.json").read_text())
        assert summary["epochs"] == EPOCHS and len(facts.rows(run)) == EPOCHS
        return run, snapshot
