"""An epoch of SD 1.x's shapes: seconds until it begins, the rate of every phase, and its share of the floor.

The floor of a phase is its floating-point operations (`prdp_fast/planning/cost.py`) at the rate of a large matrix product, which
is measured in the same process.
"""

from __future__ import annotations

import time
from typing import Any

SIZES = {"prompts": 2, "images": 8, "steps": 10, "batch": 16, "guidance": 5.0}
SMALL = {"prompts": 1, "images": 2, "steps": 2, "batch": 2, "guidance": 5.0}


def measure(emit: Any, options: dict[str, Any]) -> None:
    """A task: one path, in a process that has run nothing yet.

    Options: title; path ("eager" or "auto"); rounds; cache, the compiler's, which a second start finds filled.
    """
    import os

    if options.get("cache"):
        for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
            os.environ.pop(name, None)
    import torch

    from benchmarks.epoch import gpu_bench, truth
    from benchmarks.epoch.phases import phase_calls
    from benchmarks.epoch.workload import EAGER, TINY, Workload
    from benchmarks.lib.resident import can_measure, peak_during
    from benchmarks.lib.timing import peak_tflop_per_s, wall_clock
    from prdp_fast.core import distributed

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    rehearse, title = options["rehearse"], options["title"]
    size = SMALL if rehearse else SIZES
    overrides = [
        f"schedule.prompts_per_epoch={size['prompts']}", f"schedule.images_per_prompt={size['images']}",
        f"schedule.micro_batch={size['batch']}", f"sampler.rollout_batch={size['batch']}",
        f"sampler.num_inference_steps={size['steps']}", f"sampler.guidance_scale={size['guidance']}",
    ]  # fmt: skip
    overrides += [EAGER] if options["path"] == "eager" else []
    overrides += [EAGER if given == "EAGER" else given for given in options.get("overrides", [])]
    overrides += [f"performance.compile_cache={options['cache']}"] if options.get("cache") else []
    start = time.monotonic()
    workload = Workload.build(TINY if rehearse else "sd14", overrides)
    build = time.monotonic() - start
    choices = {name: str(decision) for name, decision in workload.trainer.acceleration.decisions.items()}
    emit(f"{title}, choices", "told", "; ".join(f"{name} {value}" for name, value in choices.items()))
    device = workload.device
    start = time.monotonic()
    trajectories = workload.rollout()
    if device.type == "cuda":
        torch.cuda.synchronize()
    first_rollout = time.monotonic() - start
    emit(
        f"{title}, start-up", imports_s=options["imports_s"], build_s=round(build, 2), first_rollout_s=round(first_rollout, 2),
        total_s=round(options["imports_s"] + build + first_rollout, 2),
    )  # fmt: skip
    if options.get("start_only"):
        distributed.shutdown()
        return
    agreement = truth.compare(workload, trajectories)
    fault = agreement.fault()
    emit(
        f"{title}, against float32", "wrong" if fault else "passed", fault or "", gradient_error=agreement.gradient,
        plain_gradient_error=agreement.plain_gradient, plain_output_error=agreement.plain_output,
        **{f"{name}_error": error for name, error in agreement.outputs.items()},
    )  # fmt: skip
    start = time.monotonic()
    calls = phase_calls(workload)
    for phase in gpu_bench.PHASES:
        calls[phase].run()
    emit(f"{title}, first epoch", "told", "", seconds=round(time.monotonic() - start, 2))
    watch, peak = wall_clock(device), peak_tflop_per_s(device, workload.dtype)
    times: dict[str, list[float]] = {phase: [] for phase in gpu_bench.PHASES}
    for _ in range(1 if rehearse else options["rounds"]):
        for phase in gpu_bench.PHASES:
            times[phase].append(watch(calls[phase].run))
    tflop = {phase: calls[phase].tflop for phase in gpu_bench.PHASES}
    held = {phase: peak_during(calls[phase].run, device) if can_measure(device) else 0 for phase in gpu_bench.PHASES}
    for phase, found in gpu_bench.results(times, tflop, workload.images, peak).items():
        emit(
            f"{title}, {phase}", "measured", "", ms=found.median_ms, images_per_s=found.images_per_s,
            tflop_per_s=found.tflop_per_s, share_of_floor=found.share_of_peak, times_the_floor=1 / found.share_of_peak,
            peak_gib=held.get(phase, max(held.values())) / 2**30,
        )  # fmt: skip
    emit(f"{title}, matrix product", "told", "", tflop_per_s=peak)
    distributed.shutdown()
