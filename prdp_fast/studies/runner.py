"""The runs of a study, one after the other, each a training job: what is finished is left alone, what is not goes on."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from prdp_fast.config.recipe import Settings
from prdp_fast.core.files import read_json, write_json
from prdp_fast.core.run_directory import RUN, SUMMARY, read_record
from prdp_fast.studies.declaration import Run, Study

STOPPED = (130, 143)  # by Ctrl-C, or a signal; 0 without a summary is a stop too


def is_finished(directory: Path) -> bool:
    return (directory / SUMMARY).is_file()


def command(study: Study, run: Run, directory: Path, config: str, num_gpus: int | None) -> list[str]:
    """The training command of one run."""
    words = [sys.executable, "-m", "prdp_fast.train", "--config", config, "--recipe", study.recipe, "--seed", str(run.seed)]
    words += ["--output", str(directory), *(f"--set={override}" for override in run.overrides)]
    return words + (["--num_gpus", str(num_gpus)] if num_gpus else [])


def run_all(
    study: Study,
    runs: list[Run],
    settings: dict[str, Settings],
    output: Path,
    *,
    config: str,
    num_gpus: int | None,
    say: Callable[[str], None] = print,
) -> int:
    """Run what is not finished. A run that fails is noted, and the others follow.

    Args: settings: of each arm, as `declaration.check` returns them.
    Returns: 0, or the status of the run that was stopped: the same command goes on.
    """
    for number, run in enumerate(runs, start=1):
        directory = output / run.name
        if is_finished(directory):
            say(f"{number} of {len(runs)}: {run.name} is finished")
            continue
        output.mkdir(parents=True, exist_ok=True)
        if not directory.exists() and (twin := find_twin(settings[run.arm], run.seed, config, output)):
            directory.symlink_to(os.path.relpath(twin, output.resolve()), target_is_directory=True)
            say(f"{number} of {len(runs)}: {run.name} is {twin.parent.name}/{twin.name}, which is finished")
            continue
        say(f"{number} of {len(runs)}: {run.name}")
        failure_file(output, run).unlink(missing_ok=True)
        words = command(study, run, directory, config, num_gpus)
        write_json(start_file(directory), {"config": config, "command": words})
        log = output / f"{run.name}.log"
        with log.open("a", encoding="utf-8") as file:
            try:
                status = subprocess.run(words, stdout=file, stderr=file).returncode
            except KeyboardInterrupt:  # the run has the signal too, and saves itself
                return 130
        if is_finished(directory):
            continue
        if status in (0, *STOPPED) or status < 0:
            say(f"{run.name} was stopped (status {status}); the same command goes on")
            return status if status > 0 else 130
        say(f"{run.name} failed with status {status}: {last_line(log)}")
        write_json(failure_file(output, run), {"status": status, "reason": last_line(log)})
    return 0


def find_twin(settings: Settings, seed: int, config: str, output: Path) -> Path | None:
    """A finished run of the same recipe, seed and DeepSpeed file in a study beside this one: studies of one recipe share runs."""
    wanted = settings.model_copy(update={"seed": seed}).model_dump(mode="json")
    for record in sorted(output.resolve().parent.glob(f"*/*/{RUN}")):
        directory = record.parent
        if directory.is_symlink() or not is_finished(directory) or not start_file(directory).is_file():
            continue
        found, _ = read_record(record)
        if found is not None and found["recipe"] == wanted and read_json(start_file(directory))["config"] == config:
            return directory
    return None


def start_file(directory: Path) -> Path:
    """How the run in `directory` was last started."""
    return directory.with_name(f"{directory.name}.start.json")


def last_line(path: Path) -> str:
    """What a run said last that is about an error, else its last line."""
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "error:" in line), lines[-1] if lines else "it said nothing")[:300]


def failure_file(output: Path, run: Run) -> Path:
    """Of a run that ended with an error. An arm may be unstable, and that is a finding."""
    return output / f"{run.name}.failure.json"


def failure_of(output: Path, run: Run) -> dict[str, object] | None:
    """Of a run that failed and was not finished since."""
    path = failure_file(output, run)
    if is_finished(output / run.name) or not path.is_file():
        return None
    return dict(read_json(path))
