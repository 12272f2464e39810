"""The kernel table's workers, and compute-sanitizer. The kernel tests need no function: they are pytest."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

COMPARED = ("SDXL 8x", "SDXL 64x")


def chosen_cases(options: dict[str, Any]) -> list[Any]:
    """The cases of a task: all, or the few of bf16 for which a setting of the kernels is compared with another."""
    from benchmarks.kernels.cases import cpu_cases, gpu_cases

    if options["rehearse"]:
        return cpu_cases()[:: options.get("every", 4)]
    cases = gpu_cases()
    if options.get("small"):
        cases = [case for case in cases if case.label.startswith(COMPARED) and "cfg" in case.label and "bf16" in case.label]
    return cases[options.get("share", 0) :: options.get("shares", 1)]


def compile_chains(emit: Any, options: dict[str, Any]) -> None:
    """Compile a share of the chains into the compiler's cache, and the kernels into Triton's: the table then finds them."""
    import torch

    from benchmarks.kernels import measure
    from benchmarks.kernels.cases import build, operators

    device = "cpu" if options["rehearse"] else "cuda"
    for case in chosen_cases(options):
        torch.compiler.reset()
        built = build(case, device, operators("torch" if options["rehearse"] else "triton"), compiled=not options["rehearse"])
        for contestant in built.contestants:
            try:
                contestant.run()
            except Exception as error:
                emit(f"{case.key} {contestant.name}", "told", f"not compiled ahead: {measure.one_line(error)}")
    emit("compiled ahead", "told")


def table(emit: Any, options: dict[str, Any]) -> None:
    """Every case checked against float64 and timed."""
    from benchmarks.kernels import measure
    from benchmarks.kernels.cases import operators
    from benchmarks.lib import timing

    rehearse = options["rehearse"]
    stopwatch = timing.stopwatch_for("cpu" if rehearse else "cuda")
    copy = timing.copy_bandwidth(stopwatch, **({"size": 8 * 2**20, "rounds": 1} if rehearse else {}))
    for case in chosen_cases(options):
        try:
            row = measure.measure(
                case, stopwatch, operators("torch" if rehearse else "triton"), rounds=1 if rehearse else measure.ROUNDS,
                copy_gb_per_s=copy, compiled=not rehearse and not options.get("small"),
            )  # fmt: skip
        except Exception as error:
            row = measure.Row.of(case, "error", measure.one_line(error))
        wrong = [result.name for result in row.results if result.status == "wrong"]
        status = "wrong" if wrong and row.status == "measured" else row.status
        emit(row.key, status, row.note or ", ".join(f"{name} is wrong" for name in wrong), row=asdict(row))
        stopwatch.synchronize()  # raises where the device is lost: nothing after it could be believed


def sanitize(emit: Any, options: dict[str, Any]) -> None:
    """compute-sanitizer over every operator once. tool: memcheck or racecheck."""
    from benchmarks.kernels import gpu_check

    tool = options["tool"]
    if options["rehearse"]:
        from benchmarks.kernels import sanitize as calls

        status = calls.main(["--device", "cpu", "--backend", "torch"])
        emit(tool, "failed" if status else "not available", "rehearsed without the sanitizer: its calls ran on the CPU")
        return
    step = gpu_check.run_sanitizer(tool, options["seconds"])
    emit(tool, step.status, step.detail, seconds=step.seconds)
