"""Whether the engine is right on this device: every ZeRO stage, precision, adapter and fast path; resume; CUDA against the CPU.

Every function is one task. The jobs are the recipe `smoke`, smaller still in a rehearsal.
"""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

SMALLER = [
    "sampler.num_inference_steps=3", "schedule.epochs=2", "schedule.updates_per_epoch=1", "schedule.prompts_per_epoch=2",
    "schedule.images_per_prompt=2", "schedule.micro_batch=4", "evaluation.prompts=0",
]  # fmt: skip
PLAIN = ["performance.compile=off", "performance.cuda_graphs=off", "performance.attention=sdpa"]
# No kernel whose order of summation depends on timing.
REPEATABLE = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}


def prepare(options: dict[str, Any]) -> None:
    """Before the first tensor. In a rehearsal what is compiled is traced, and run as it was."""
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if options["rehearse"]:
        from prdp_fast.acceleration import compile as compiling

        compiling.BACKEND = "aot_eager"
    if options.get("repeatable"):
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False


def config_file(name: str, folder: Path, precision: str | None) -> str:
    """A shipped DeepSpeed file, with a precision of its own if one is wanted: bfloat16, float16 or float32."""
    from prdp_fast.config.deepspeed import find_config

    config = json.loads(find_config(name).read_text())
    if precision is not None:
        config["bf16"], config["fp16"] = {"enabled": precision == "bfloat16"}, {"enabled": precision == "float16"}
    path = folder / f"{name}-{precision or 'auto'}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(config))
    return str(path)


def train_once(options: dict[str, Any], folder: Path, overrides: list[str], epochs: int | None = None) -> tuple[Any, Any]:
    """A job from `smoke` into `folder`, or what is left of it. Returns: (the trainer after it, its summary)."""
    import torch

    from prdp_fast.config.load import load_recipe
    from prdp_fast.core import distributed
    from prdp_fast.core.run_directory import claim
    from prdp_fast.planning.job import Job
    from prdp_fast.training.trainer import Trainer

    device = distributed.init()
    chosen = [*PLAIN, *(SMALLER if options["rehearse"] else []), *overrides]
    chosen += [] if epochs is None else [f"schedule.epochs={epochs}"]
    config = config_file(options["config"], folder.parent, options.get("precision"))
    job = Job.prepare(load_recipe("smoke", chosen), config, world_size=1, cuda=device.type == "cuda")
    claim(folder, job.record(), "auto")
    trainer = Trainer.build(job, device, folder)
    summary = trainer.train()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return trainer, summary


def smoke(emit: Any, options: dict[str, Any]) -> None:
    """One job from start to export. Its gradients must be finite and its exported weights must have moved."""
    prepare(options)
    from prdp_fast.core import distributed

    start, folder = time.monotonic(), Path(options["folder"])
    trainer, _ = train_once(options, folder, options.get("overrides", []))
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    chosen = {name: decision.value for name, decision in trainer.acceleration.decisions.items()}
    wanted = options.get("wanted", {})
    missed = {name: chosen.get(name) for name, value in wanted.items() if chosen.get(name) != value}
    norms = [value for line in metrics for key, value in line.items() if key.endswith("grad_norm")]
    finite = [norm for norm in norms if norm is not None and math.isfinite(norm)]
    exported = (folder / "model").is_dir()
    faults = [
        fault
        for fault, there in {
            f"no finite gradient in {len(norms)} epochs": not finite,
            "nothing was exported": not exported,
            f"asked for {wanted}, chosen {missed}": bool(missed),
        }.items()
        if there
    ]
    emit(
        options["title"], "failed" if faults else "passed", "; ".join(faults), seconds=round(time.monotonic() - start, 1),
        epochs=len(metrics), finite_norms=f"{len(finite)} of {len(norms)}", dtype=str(trainer.job.config.dtype).split(".")[-1],
        detail=chosen,
    )  # fmt: skip
    distributed.shutdown()


def resume(emit: Any, options: dict[str, Any]) -> None:
    """A run of three epochs, the same again, and one that stops after two and goes on: all must end with the same bits."""
    prepare(options | {"repeatable": True})
    import torch

    from prdp_fast.core import distributed

    folder = Path(options["folder"])

    def weights(name: str, *epochs: int) -> dict[str, torch.Tensor]:
        for count in epochs:
            trainer, _ = train_once(options, folder / name, ["checkpoint.every=1"], count)
        return trainer.engine.full_state_dict()

    whole, again = weights("whole", 3), weights("again", 3)
    stopped = weights("stopped", 2, 3)
    for title, other in (("two equal runs", again), ("stopped and resumed", stopped)):
        worst = max(float((whole[name] - other[name]).abs().max()) for name in whole)
        same = all(torch.equal(whole[name], other[name]) for name in whole)
        emit(title, "passed" if same else "wrong", "" if same else "not the same bits", largest_difference=worst)
    distributed.shutdown()


# CUDA against the CPU.
#
# Float32, no TF32, the same trajectories and rewards. With u = 2**-24, a sum of n products taken in any order is off by about
# u sqrt(n) of its size (random signs of the roundings); Winograd's convolutions are off by some ten roundings, which is less for
# every n here. L layers forward and L backward add up as a random walk, sqrt(2 L), and guidance of scale s multiplies the error
# of its two halves by up to s + (s - 1). So a gradient may be off by
#
#     rho = (2 s - 1) sqrt(2 L) u sqrt(n)
#
# of its norm. TF32 has u = 2**-11 in its products, and is off by more.
# Weights: Adam's step is lr m / (sqrt(v) + eps), whose slope is at most lr / eps; two updates with clipped gradients of norm at
# most c differ by at most 2 lr / eps rho c, and storing the weights rounds by u |w| each time, 2 u |w| in all, on both sides.

LEARNING_RATE, EPS, NORM = 1e-4, 1e-3, 1.0
UNIT = 2.0**-24


def float32_job(options: dict[str, Any]) -> Any:
    """The same for both devices; a `Workload` of the embedded model."""
    from benchmarks.epoch.workload import EAGER, TINY, Workload

    sizes = ["prompts_per_epoch=2", "images_per_prompt=4", "micro_batch=8", "updates_per_epoch=1"]
    overrides = [f"schedule.{size}" for size in sizes] + [
        EAGER, "sampler.num_inference_steps=3", "sampler.guidance_scale=2.0", "sampler.rollout_batch=8", f"optimizer.eps={EPS}",
        f"optimizer.learning_rate={LEARNING_RATE}", "optimizer.warmup_updates=0", f"optimizer.max_grad_norm={NORM}",
        "optimizer.weight_decay=0", "objective.kl_weight=3e-5",
    ]  # fmt: skip
    return Workload.build(TINY, overrides, config=config_file("zero0", Path(options["folder"]), "float32"))


def two_updates(workload: Any, trajectories: Any) -> tuple[list[Any], dict[str, Any]]:
    """(the gradient of the first micro-batch, the trained weights after two updates)."""
    from benchmarks.epoch.gpu_bench import gradients

    gradient = gradients(workload, trajectories)
    for _ in range(2):
        workload.update(trajectories, workload.made_up_scores(), None)
    return gradient, workload.trainer.engine.full_state_dict()


def float32_cpu(emit: Any, options: dict[str, Any]) -> None:
    """The CPU's side, into a file."""
    prepare(options)
    import torch

    from prdp_fast.core import distributed

    torch.set_num_threads(options.get("threads", 1))
    workload = float32_job(options)
    before = workload.trainer.engine.full_state_dict()
    trajectories = workload.rollout()
    gradient, weights = two_updates(workload, trajectories)
    path = Path(options["folder"]) / "cpu.pt"
    partial = path.with_suffix(".partial")
    torch.save(
        {"before": before, "weights": weights, "gradient": gradient, "latents": trajectories.latents,
         "log_probs": trajectories.log_probs},
        partial,
    )  # fmt: skip
    partial.rename(path)
    emit("CPU side", "told")
    distributed.shutdown()


def float32_cuda(emit: Any, options: dict[str, Any]) -> None:
    """The same on the device, from the CPU's trajectories, and the comparison."""
    prepare(options)
    import torch
    from torch import nn

    from benchmarks.lib.truth import relative_distance, without_tf32
    from prdp_fast.core import distributed

    path = Path(options["folder"]) / "cpu.pt"
    deadline = time.monotonic() + options["wait"]
    with without_tf32():
        workload = float32_job(options)
        trajectories = workload.rollout()
        while not path.exists():
            if time.monotonic() > deadline:
                raise TimeoutError(f"the CPU's side left nothing within {options['wait']:.0f} s; see its log")
            time.sleep(0.2)
        cpu = torch.load(path, map_location=workload.device, weights_only=True)
        rollout = relative_distance([trajectories.latents], [cpu["latents"]])
        trajectories.latents, trajectories.log_probs = cpu["latents"], cpu["log_probs"]
        if options["rehearse"]:  # another order of summation, as another device would have
            workload.trainer.engine.engine.module.to(memory_format=torch.channels_last)
        gradient, weights = two_updates(workload, trajectories)

    module = workload.trainer.engine.engine.module
    layers = [layer for layer in module.modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
    longest = max(layer.weight[0].numel() for layer in layers)
    scale = workload.policy.guidance_scale
    rho = (2 * scale - 1) * math.sqrt(2 * len(layers)) * UNIT * math.sqrt(longest)
    names = list(cpu["before"])
    moved = [(cpu["weights"][name] - cpu["before"][name]).double().to(workload.device) for name in names]
    own = [(weights[name].to(workload.device) - cpu["before"][name]).double() for name in names]
    norm = math.sqrt(sum(float(value.square().sum()) for value in moved))
    size = math.sqrt(sum(float(value.double().square().sum()) for value in cpu["before"].values()))
    bound = (2 * LEARNING_RATE / EPS * rho * NORM + 4 * UNIT * size) / norm
    # The rollout's latents are what the denoiser's rounding adds up to over its steps, in each of which it counts less than once.
    steps = len(workload.policy.transitions)
    for title, error, most in (
        ("latents of the rollout", rollout, rho * math.sqrt(steps)),
        ("gradient of a micro-batch", relative_distance(gradient, cpu["gradient"]), rho),
        ("movement of the weights in two updates", relative_distance(own, moved), bound),
    ):
        emit(title, "passed" if error <= most else "wrong", "", relative_error=error, at_most=most)
    distributed.shutdown()
