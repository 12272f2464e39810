"""The parts of a session, most valuable first, and what each runs.

`least` is what a part leaves to those after it: a part may take up to `most`, as long as the later ones keep their least.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.gpu_session.processes import Stage, Task
from benchmarks.gpu_session.ways import Way

HERE = "benchmarks.gpu_session"
TORCH, ENGINE = ("torch", "triton"), ("torch", "diffusers", "transformers", "deepspeed", "prdp_fast.training.trainer")
SIGNS = "every_path_makes or does_not_depend_on_the_layout"
ALONE = "tests/kernels/test_triton_gpu.py"  # what fills the device's memory
# Of an SD 1.x U-Net's task with gradients: weights and truth, and activations a row (33 GiB at 32 rows were seen).
UNET_GIB, ROW_GIB = 9.0, 1.1


@dataclass(frozen=True)
class Part:
    name: str
    title: str
    least: float  # seconds
    most: float
    stages: tuple[Stage, ...]


@dataclass(frozen=True)
class Situation:
    """What a plan depends on."""

    folder: Path
    rehearse: bool
    cores: int
    memory_gib: float

    def options(self, **more: Any) -> dict[str, Any]:
        return {"rehearse": self.rehearse, "folder": str(self.folder / "work")} | more

    def width(self, cores_each: int = 2, most: int = 8) -> int:
        return 1 if self.rehearse else max(1, min(most, self.cores // cores_each))


def situation(folder: Path, rehearse: bool) -> Situation:
    return Situation(folder, rehearse, os.cpu_count() or 1, gpu_memory_gib())


def gpu_memory_gib() -> float:
    """Of the first GPU, as the driver tells it; 0 if it does not."""
    if shutil.which("nvidia-smi") is None:
        return 0.0
    words = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits", "--id=0"]
    try:
        return float(subprocess.run(words, capture_output=True, text=True, timeout=20, check=True).stdout) / 1024
    except (OSError, ValueError, subprocess.SubprocessError):
        return 0.0


def plan(at: Situation) -> list[Part]:
    return [make(at) for make in PARTS.values()]


def preflight(at: Situation) -> Part:
    target, environment = f"{HERE}.preflight", {"PRDP_CPU": "1"} if at.rehearse else {}
    tasks = (
        Task("machine", f"{target}:machine", at.options(), TORCH, env=environment, seconds=60),
        Task("packages", f"{target}:packages", at.options(), seconds=90),
    )
    return Part("preflight", "what this python lacks, and what the machine can do", 0, 90, (Stage(tasks, 2),))


def kernels(at: Situation) -> Part:
    device = {"PRDP_TEST_DEVICE": "cpu" if at.rehearse else "cuda", "OMP_NUM_THREADS": "1"}
    direct = device | {"PRDP_KERNELS_DIRECT": "1"}
    if at.rehearse:
        few = direct | {"PRDP_TEST_SHARE": "0/8"}
        tasks = [Task("share-0", tests=("tests/kernels/test_triton_philox.py",), env=few, seconds=120)]
        return Part("kernels", "kernel tests", 30, 120, (Stage(tuple(tasks)),))
    shares = at.width(cores_each=1, most=12)
    every = ("tests/kernels", f"--ignore={ALONE}")
    signs = Task("signs", tests=("tests/kernels", "-k", SIGNS), env=direct, seconds=90)
    indirect = device | {"PRDP_KERNELS_DIRECT": "0", "PRDP_TEST_SHARE": "5/16"}
    tasks = [
        signs,
        *(
            Task(f"share-{number}", tests=every, env=direct | {"PRDP_TEST_SHARE": f"{number}/{shares}"}, seconds=150)
            for number in range(shares)
        ),
        Task("triton-launcher", tests=every, env=indirect, seconds=60),
    ]
    alone = Task("alone", tests=(ALONE,), env=direct, seconds=60)
    return Part("kernels", "kernel tests", 60, 180, (Stage(tuple(tasks), shares + 2), Stage((alone,))))


def table(at: Situation) -> Part:
    target, ahead = f"{HERE}.kernels", at.width(cores_each=1, most=12)
    if at.rehearse:
        task = Task("table", f"{target}:table", at.options(), TORCH, seconds=60)
        small = Task("spread-2", f"{target}:table", at.options(every=8), TORCH, env={"PRDP_KERNELS_SPREAD": "2"})
        compiled = Task("ahead-0", f"{target}:compile_chains", at.options(), TORCH, seconds=60)
        return Part("table", "kernel table", 30, 120, (Stage((compiled,)), Stage((task,)), Stage((small,))))
    compiled = tuple(
        Task(f"ahead-{n}", f"{target}:compile_chains", at.options(share=n, shares=ahead), TORCH, seconds=35) for n in range(ahead)
    )
    whole = Task("table", f"{target}:table", at.options(), TORCH, seconds=85)
    default = Task("default", f"{target}:table", at.options(small=True), TORCH, seconds=15)
    other = {"PRDP_KERNELS_SPREAD": "2"}
    small = Task("spread-2", f"{target}:table", at.options(small=True), TORCH, env=other, seconds=20)
    return Part("table", "kernel table", 60, 150, (Stage(compiled, ahead), Stage((whole,)), *alone(default, small)))


def engine(at: Situation) -> Part:
    target = f"{HERE}.engine"
    compiled = ["performance.compile=blocks", *([] if at.rehearse else ["performance.cuda_graphs=on"])]
    fast = {"compile trained": "blocks"} | ({} if at.rehearse else {"cuda_graphs": "on"})
    jobs: list[dict[str, Any]] = [
        {"title": "ZeRO 3, offload", "config": "zero3_offload"},  # builds DeepSpeed's CPU Adam, so it comes first
        {"title": "ZeRO 2, blocks compiled, graphs", "config": "zero2", "overrides": compiled, "wanted": fast},
        {"title": "ZeRO 0", "config": "zero0"},
        {"title": "ZeRO 1, channels-last", "config": "zero1", "overrides": ["performance.channels_last=on"],
         "wanted": {"channels_last": "on"}},
        {"title": "ZeRO 2", "config": "zero2"},
        {"title": "ZeRO 3", "config": "zero3"},
        {"title": "ZeRO 2, fp16", "config": "zero2", "precision": "float16"},
        {"title": "ZeRO 2, LoRA", "config": "zero2", "overrides": ["model.lora={rank: 4}"]},
        {"title": "ZeRO 0, blocks compiled, graphs", "config": "zero0", "overrides": compiled, "wanted": fast},
    ]  # fmt: skip
    if at.rehearse:  # one; the suite tests the stages on a CPU
        jobs = [job | {"overrides": [*compiled, "model.lora={rank: 4}"]} for job in jobs if job["config"] == "zero2"][:1]
    env = {"OMP_NUM_THREADS": "1" if at.rehearse else "2", "TORCHINDUCTOR_COMPILE_THREADS": "4"}

    def work(name: str) -> str:
        return str(at.folder / "work" / name / "run")

    smokes = [
        Task(slug(job["title"]), f"{target}:smoke", at.options(**job) | {"folder": work(slug(job["title"]))}, ENGINE, env=env,
             seconds=150)
        for job in jobs
    ]  # fmt: skip
    sides = {"folder": str(at.folder / "work" / "float32"), "threads": max(1, at.cores // 4), "wait": 60.0}
    no_gpu = env | {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    cpu = Task("float32-cpu", f"{target}:float32_cpu", at.options(**sides), ENGINE, env=no_gpu, seconds=90)
    cuda = Task("float32-cuda", f"{target}:float32_cuda", at.options(**sides), ENGINE, env=env, seconds=110)
    repeatable = env | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    stopped = at.options(config="zero2") | {"folder": str(at.folder / "work" / "resume")}
    resume = Task("resume", f"{target}:resume", stopped, ENGINE, env=repeatable, seconds=100)
    # What compiles takes longest. All begin at once where there are cores: nothing here is timed.
    smokes.sort(key=lambda task: "compiled" not in task.name and "offload" not in task.name)
    tasks = (*smokes[:4], cpu, cuda, resume, *smokes[4:])
    return Part(
        "engine", "the engine, job by job", 60, 400 if at.rehearse else 160, (Stage(tasks, at.width(cores_each=1, most=13)),)
    )


def alone(*tasks: Task) -> tuple[Stage, ...]:
    """One after another. Stages of their own, so that each imports while the one before it runs."""
    return tuple(Stage((task,)) for task in tasks)


def slug(title: str) -> str:
    return title.lower().replace(",", "").replace(" ", "-")


def rows_and_width(at: Situation) -> tuple[int, int]:
    """(denoiser rows of a call, tasks that fit beside each other): compiling takes most of the time of those that compile, so a
    card that cannot hold three tasks of 32 rows gets three of 16."""

    def side_by_side(rows: int) -> int:
        return max(1, min(3, int(at.memory_gib // (UNET_GIB + rows * ROW_GIB)), at.cores // 4))

    if at.rehearse:
        return 2, 1
    return (32, 3) if side_by_side(32) == 3 else (16, side_by_side(16))


def of_unet(at: Situation, name: str, rows: int, *ways: Way, width: int = 1, target: str = "measure") -> Task:
    """Ways of calling the U-Net of SD 1.x, in a process of their own."""
    threads = {"TORCHINDUCTOR_COMPILE_THREADS": str(max(1, at.cores // width))}
    env = threads | {"TORCHINDUCTOR_CACHE_DIR": str(at.folder / "work" / f"unet-{name}")}
    given = [asdict(way) | {"rows": max(2, rows * way.rows // 32)} for way in ways]
    for one, way in zip(given, ways, strict=True):
        one["title"] += f", {one['rows']} rows" if way.rows != 32 else ""
    options = at.options(preset="sd14", rows=rows, ways=given, lock=str(at.folder / "work" / "unet.lock"))
    return Task(name, f"{HERE}.unet:{target}", options, (*TORCH, "diffusers"), env=env, seconds=200)


BACKWARD, FORWARD = {"forward": False}, {"gradients": False}


def unet(at: Situation) -> Part:
    rows = 2 if at.rehearse else 32
    tasks = (
        of_unet(
            at, "eager", rows, Way("channels-last", channels_last=True), Way("eager"),
            Way("channels-last, CUDA graph", channels_last=True, graph=True, gradients=False),
        ),
        of_unet(
            at, "where-the-time-goes", rows, Way("channels-last", channels_last=True), Way("eager"), target="where_the_time_goes"
        ),
        of_unet(at, "rows", rows, *(Way("channels-last", channels_last=True, rows=count, **BACKWARD) for count in (16, 64))),
    )  # fmt: skip
    return Part("unet", "the U-Net of SD 1.x", 45, 120, alone(*tasks))


def compiled(at: Situation) -> Part:
    rows, width = rows_and_width(at)

    def task(name: str, *ways: Way) -> Task:
        return of_unet(at, name, rows, *ways, width=width)

    tasks = (
        task(
            "full-forward",
            Way("compiled full", "full", **FORWARD),
            Way("compiled full, CUDA graph", "full", graph=True, **FORWARD),
        ),
        task("full-forward-channels-last", Way("compiled full, channels-last", "full", channels_last=True, **FORWARD)),
        task("blocks", Way("compiled blocks", "blocks", **BACKWARD)),
        task("full", Way("compiled full", "full", **BACKWARD)),
        task("blocks-channels-last", Way("compiled blocks, channels-last", "blocks", channels_last=True, **BACKWARD)),
        task("blocks-cudnn", Way("compiled blocks, cudnn", "blocks", "cudnn", **BACKWARD)),
        task("max-autotune", Way("max-autotune without graphs", "max-autotune", **FORWARD)),
    )
    if at.rehearse:  # one process, whose imports are paid once
        ways = [Way(**way) for one in (tasks[0], tasks[2], tasks[6]) for way in one.options["ways"]]
        tasks = (task("all", *(replace(way, rows=32) for way in ways)),)
    return Part("compiled", "the U-Net of SD 1.x, compiled", 90, 260, (Stage(tasks, width),))


def epoch(at: Situation) -> Part:
    target = f"{HERE}.epoch:measure"

    def task(name: str, title: str, seconds: float, **more: Any) -> Task:
        options = at.options(title=title, rounds=3, **more)
        return Task(name, target, options, ENGINE, env={"OMP_NUM_THREADS": "1" if at.rehearse else "8"}, seconds=seconds)

    tasks = (
        task("auto-uncompiled", "auto without compiling", 80, path="auto", overrides=["performance.compile=off"]),
        task("eager", "eager", 80, path="eager"),
    )
    return Part("epoch", "an epoch of SD 1.x's shapes", 70, 150, alone(*tasks))


def start(at: Situation) -> Part:
    """Of a job that never ends, so that `auto` compiles what is faster, whatever it costs: cold, and from the cache."""
    target, cache = f"{HERE}.epoch:measure", str(at.folder / "work" / "epoch-cache")
    env = {"OMP_NUM_THREADS": "1" if at.rehearse else "8"}
    tasks = [
        Task(name, target, at.options(title=title, rounds=3, path="auto", cache=cache, **more), ENGINE, env=env, seconds=seconds)
        for name, title, seconds, more in (
            ("auto-cold", "auto, cold", 240, {}), ("auto-warm", "auto, warm", 60, {"start_only": True}),
        )
    ]  # fmt: skip
    return Part("start", "a compiled epoch, cold and warm", 0, 300, alone(*tasks))


def sdxl(at: Situation) -> Part:
    rows = 2 if at.rehearse else 8
    ways = [Way("channels-last", channels_last=True, rows=rows), Way("eager", rows=rows)]
    options = at.options(preset="sdxl", rows=rows, ways=[asdict(way) for way in ways], lock=str(at.folder / "work" / "unet.lock"))
    task = Task("sdxl", f"{HERE}.unet:measure", options, (*TORCH, "diffusers"), seconds=90)
    return Part("sdxl", "the U-Net of SDXL", 30, 90, (Stage((task,)),))


def sanitizer(at: Situation) -> Part:
    tools = ("memcheck",) if at.rehearse else ("memcheck", "racecheck")
    tasks = alone(
        *(Task(tool, f"{HERE}.kernels:sanitize", at.options(tool=tool, seconds=50.0), TORCH, seconds=60) for tool in tools)
    )
    return Part("sanitizer", "compute-sanitizer over every kernel", 0, 120, tasks)


PARTS: dict[str, Callable[[Situation], Part]] = {
    "preflight": preflight, "kernels": kernels, "unet": unet, "epoch": epoch, "table": table, "engine": engine, "sdxl": sdxl,
    "compiled": compiled, "sanitizer": sanitizer, "start": start,
}  # fmt: skip
