"""Saving and choosing checkpoints on several ranks, without a model; run by test_checkpoints.py in one process per rank.

    deepspeed --num_gpus N tests/drive_checkpoints.py FOLDER

FOLDER gets results.json: by case, what each rank has got, and what was told to the user.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")]

from damage import KINDS, damage  # noqa: E402

FILES = ("weights.pt", "rank-0.pt", "state.json")


def main() -> None:
    from prdp_fast.core import distributed, environment
    from prdp_fast.core.errors import UserError
    from prdp_fast.training.checkpoint import Checkpoints
    from prdp_fast.training.state import TrainState

    distributed.init()
    rank, folder, told = distributed.rank(), Path(sys.argv[-1]), []
    environment.say = told.append

    def write(directory: Path) -> list[Path]:
        """Two files on rank 0, one on the others."""
        names = [f"rank-{rank}.pt", *(["weights.pt"] if rank == 0 else [])]
        for name in names:
            (directory / name).write_bytes(os.urandom(50_000))
        return [directory / name for name in names]

    def broken_on(number: int) -> Any:
        def write_or_fail(directory: Path) -> list[Path]:
            written = write(directory)
            if rank == number:
                raise OSError(28, "No space left on device")
            return written

        return write_or_fail

    def names(run: Path) -> list[str]:
        return sorted(path.name for path in (run / "checkpoints").iterdir())

    def case(name: str, faults: list[tuple[str, str, str]]) -> dict[str, Any]:
        run = folder / name
        first = Checkpoints(run, keep=3)
        for epoch in (1, 2, 3):
            first.save(TrainState(epoch=epoch), write)
        if rank == 0:
            for checkpoint, file, kind in faults:
                damage(run / "checkpoints" / checkpoint, file, kind)
        distributed.barrier()
        told.clear()
        checkpoints, refused = Checkpoints(run, keep=3), None
        state = TrainState()
        try:
            state = checkpoints.choose()
        except UserError as error:
            refused = str(error)
        got = (state.epoch, checkpoints.newest and checkpoints.newest.name, refused)
        result: dict[str, Any] = {"got": distributed.gather_objects(got), "told": list(told), "names": names(run)}
        distributed.barrier()
        if refused is None:  # the run goes on, and saves the same epochs again
            for epoch in range(state.epoch + 1, 4):
                assert checkpoints.save(TrainState(epoch=epoch), write) is None
            again = Checkpoints(run, keep=3).choose()
            result |= {"later": names(run), "again": distributed.gather_objects(again.epoch)}
        return result

    def full_disk(number: int) -> dict[str, Any]:
        run = folder / f"full-{number}"
        checkpoints = Checkpoints(run, keep=1)
        assert checkpoints.save(TrainState(epoch=1), write) is None
        fault = checkpoints.save(TrainState(epoch=2), broken_on(number))
        distributed.barrier()
        result = {"faults": distributed.gather_objects(fault), "names": names(run)}
        distributed.barrier()
        result["next"] = checkpoints.save(TrainState(epoch=3), write)
        result["later"] = names(run)
        distributed.barrier()
        return result

    def behind(number: int, error: Exception | None) -> dict[str, Any]:
        """Written while the ranks' main threads are in collectives of their own; one rank is slow, and may fail."""
        run = folder / f"behind-{number}-{error is not None}"
        checkpoints, go_on = Checkpoints(run, keep=1), threading.Event()
        assert checkpoints.save(TrainState(epoch=1), write) is None

        def copy(directory: Path) -> Any:
            def write_later() -> list[Path]:
                if rank == number:
                    go_on.wait()
                    if error is not None:
                        raise error
                return write(directory)

            return write_later

        begun = checkpoints.save_behind(TrainState(epoch=2), copy)
        sums = [distributed.all_reduce([float(step)])[0] for step in range(200)]
        early, newest = checkpoints.settle(wait=False), checkpoints.newest
        distributed.barrier()
        meanwhile = names(run)
        distributed.barrier()
        go_on.set()
        fault = checkpoints.settle(wait=True)
        result = {
            "begun": distributed.gather_objects(begun), "early": distributed.gather_objects([early, newest and newest.name]),
            "sums": sums == [float(step * distributed.world_size()) for step in range(200)], "meanwhile": meanwhile,
            "faults": distributed.gather_objects(fault), "names": names(run),
            "newest": distributed.gather_objects(checkpoints.newest and checkpoints.newest.name),
        }  # fmt: skip
        distributed.barrier()
        again = Checkpoints(run, keep=1).choose()
        result["again"] = distributed.gather_objects(again.epoch)
        return result

    results = {"none": case("none", [])}
    for file in FILES:
        for kind in KINDS:
            results[f"{kind} {file}"] = case(f"{kind}-{file}", [("epoch-000003", file, kind)])
    results["two"] = case("two", [("epoch-000003", "weights.pt", "bit"), ("epoch-000002", "state.json", "missing")])
    results["all"] = case("all", [(f"epoch-00000{number}", "weights.pt", "cut") for number in (1, 2, 3)])
    for number in range(distributed.world_size()):
        results[f"full {number}"] = full_disk(number)
        results[f"behind {number}"] = behind(number, None)
        results[f"behind full {number}"] = behind(number, OSError(28, "No space left on device"))
    if rank == 0:
        (folder / "results.json").write_text(json.dumps(results))
    distributed.shutdown()


if __name__ == "__main__":
    main()
