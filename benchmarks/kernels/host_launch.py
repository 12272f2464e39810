"""Host time of one call of each operator, without a GPU: everything is done but the driver's launch.

    python -m benchmarks.kernels.host_launch [--baseline KERNELS_OF_ANOTHER_CHECKOUT] [--calls N] [--json FILE]

Three roads, each measured in a process of its own that answers in turns, so that all see the same machine:

- plans: the operators as they are;
- triton: the operators as they are, with no plan kept ready for the front door and every launch by Triton's own launcher;
- baseline, if asked for: the operators of another checkout (its folder `kernels`), in the same way.

The tensors lie in the CPU's memory, where the allocator takes a microsecond or so, as CUDA's caching one does. Left out on every
road are Triton's C function (it reads the arguments and calls the driver), switching devices, and asking for the stream.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from types import SimpleNamespace
from typing import Any

from benchmarks.lib import command
from benchmarks.lib.command import ROOT

BLOCK = 20  # calls timed at once
LIMIT_US = 60  # a call should take no more


def operators() -> dict[str, Callable[[], Any]]:
    """A call of each, by the sizes of eight rows of 4 x 16 x 16: what a call does on the host does not depend on the size."""
    import torch

    import prdp_kernels as k

    n, shape = 8, (4, 16, 16)
    m, x, prev = torch.zeros(2 * n, *shape, dtype=torch.bfloat16), torch.zeros(n, *shape), torch.zeros(n, *shape)
    a, b, std, w = (torch.ones(n) for _ in range(4))
    seeds, lp, rewards = torch.arange(n), torch.zeros(4, 8, 50), torch.zeros(4, 8)
    leaf, lp_leaf = m.clone().requires_grad_(), lp.clone().requires_grad_()
    t: dict[str, Any] = {"guidance_scale": 5.0, "backend": "triton"}
    loss: dict[str, Any] = {"clip_range": 1e-4, "kl_weight": 1e-5, "backend": "triton"}

    norm, of_channels = torch.zeros(n, 64, 16, 16).to(memory_format=torch.channels_last), torch.zeros(64)
    norm_options: dict[str, Any] = {"shift": torch.zeros(n, 64), "silu": True, "backend": "triton"}

    def backward(leaf: torch.Tensor, run: Callable[[], torch.Tensor], upstream: torch.Tensor) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(run(), leaf, upstream)

    return {
        "philox_normal": lambda: k.philox_normal(seeds, shape, step=3, backend="triton"),
        "denoise_step": lambda: k.denoise_step(m, x, a, b, std, seeds=seeds, step=3, **t),
        "gaussian_log_prob": lambda: k.gaussian_log_prob(m, x, prev, a, b, std, **t),
        "gaussian_log_prob_and_grad": lambda: k.gaussian_log_prob_and_grad(m, x, prev, a, b, std, w, **t),
        "gaussian_log_prob, backward": backward(leaf, lambda: k.gaussian_log_prob(leaf, x, prev, a, b, std, **t), w),
        "prdp_loss": lambda: k.prdp_loss(lp, lp, lp, rewards, **loss),
        "prdp_loss_and_grad": lambda: k.prdp_loss_and_grad(lp, lp, lp, rewards, **loss),
        "prdp_loss, backward": backward(
            lp_leaf, lambda: k.prdp_loss(lp_leaf, lp, lp, rewards, **loss), torch.ones(())
        ),
        "group_norm": lambda: k.group_norm(norm, of_channels, of_channels, 32, **norm_options),
        "geglu": lambda: k.geglu(m, backend="triton"),
    }  # fmt: skip


class Compiled:
    """Stands for a compiled kernel: does in Python what Triton's does, and ends where its C function begins."""

    function, packed_metadata, global_scratch_size, profile_scratch_size = 1, (4, 1, 0, 1, 1, 1), 0, 0

    def launch_metadata(self, grid: Any, stream: int, *args: Any) -> Any:
        from triton.compiler.compiler import LazyDict

        return LazyDict({"name": "kernel", "function": self.function, "stream": stream})

    def run(self, x: int, y: int, z: int, stream: int, function: int, *args: Any) -> None:
        def scratch(size: int) -> None:
            assert size == 0

        scratch(self.global_scratch_size), scratch(self.profile_scratch_size)
        _enter(x, y, z, stream, function, False, False, None, None, *args)


def _enter(*args: Any) -> None:
    """The C function's place."""


def without_a_gpu() -> None:
    """Triton's launcher for a GPU that is not there, and operators that take CPU tensors to lie on it."""
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    import prdp_kernels.denoise_step.kernel
    import prdp_kernels.gaussian_log_prob.kernel
    import prdp_kernels.philox.kernel
    import prdp_kernels.prdp_loss.kernel  # noqa: F401
    from prdp_kernels import checks, workspace

    os.environ["TRITON_INTERPRET"] = "1"  # from here on: the kernels are compiled ones, the operators take CPU tensors for them
    target = GPUTarget("cuda", 90, 32)
    triton.runtime.driver.set_active(
        SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: 0, get_current_target=lambda: target)  # type: ignore[arg-type]
    )

    def compile_(self: Any, key: Any, signature: Any, device: int, *args: Any, **kwargs: Any) -> Compiled:
        return self.device_caches[device][0].setdefault(key, Compiled())

    JITFunction._do_compile = compile_  # type: ignore[method-assign]
    checks.can_read_values = lambda t: False  # type: ignore[assignment]
    zeros = torch.zeros(4096, dtype=torch.int32)
    for name in ("arrivals", "semaphores"):  # kept, as on a GPU
        if hasattr(workspace, name):
            setattr(workspace, name, lambda count, device: zeros)


def serve(road: str) -> None:
    """One line in, the name of an operator; one line out, nanoseconds a call."""
    without_a_gpu()
    if road != "baseline":
        from prdp_kernels import launch as launching

        class Dry(launching.Launcher):
            def drives(self, t: Any) -> bool:
                return road == "plans"

            def current_device(self) -> Any:
                return None  # as the index of a CPU tensor

            def launch(self, prepared: Any, tensors: Any, scalars: Any) -> None:
                if road == "plans":
                    self.launch_here(prepared, tensors, scalars)
                else:
                    prepared.through_triton(tensors, scalars)

            def run(self, handle: Any, prepared: Any, pointers: Any, scalars: Any) -> None:
                handle.run(
                    prepared.grid, 1, 1, 0, handle.function, handle.packed_metadata, None, None, None,
                    *pointers, *scalars, *prepared.numbers, *prepared.values,
                )  # fmt: skip

        launching.LAUNCHER = Dry()
    import prdp_kernels

    calls = operators()
    for call in calls.values():
        for _ in range(50):
            call()
    print(json.dumps({"package": prdp_kernels.__file__, "operators": list(calls)}), flush=True)
    for line in sys.stdin:
        call = calls[line.strip()]
        begin = time.perf_counter_ns()
        for _ in range(BLOCK):
            call()
        print((time.perf_counter_ns() - begin) / BLOCK, flush=True)


def start(road: str, kernels: Path) -> tuple[subprocess.Popen[str], list[str]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join([str(kernels), str(ROOT)]), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.kernels.host_launch", "--serve", road],
        cwd=ROOT, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"host_launch: the process for {road} ended before it was ready")
    said = json.loads(line)
    if not Path(said["package"]).resolve().is_relative_to(kernels.resolve()):
        raise SystemExit(f"host_launch: {road} would measure {said['package']}, expected {kernels}")
    return process, said["operators"]


def main() -> int:
    parser = command.parser_of(__doc__)
    parser.add_argument("--baseline", type=Path, help="the folder `kernels` of another checkout")
    parser.add_argument("--calls", type=int, default=2000, help="of each operator on each road")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", choices=("plans", "triton", "baseline"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve)
        return 0
    roads = {"plans": ROOT / "kernels", "triton": ROOT / "kernels"} | ({"baseline": args.baseline} if args.baseline else {})
    processes = {road: start(road, kernels) for road, kernels in roads.items()}
    names = processes["plans"][1]
    times: dict[str, dict[str, list[float]]] = {name: {road: [] for road in roads} for name in names}
    for _ in range(max(4, args.calls // BLOCK)):
        for name in names:
            for road, (process, _) in processes.items():
                assert process.stdin and process.stdout
                process.stdin.write(name + "\n")
                process.stdin.flush()
                times[name][road].append(float(process.stdout.readline()) / 1000)
    for process, _ in processes.values():
        process.communicate()
    result = {
        name: {
            road: dict(zip(("p25", "median", "p75"), (q[0], median(of), q[2])))
            for road, of in roads_.items()
            for q in (quantiles(of, n=4),)
        }
        for name, roads_ in times.items()
    }
    print(
        f"microseconds a call, median [quartiles], {args.calls} calls; {platform.machine()}, Python {platform.python_version()}"
    )
    for name, of in result.items():
        row = "   ".join(f"{road} {v['median']:6.1f} [{v['p25']:.1f}, {v['p75']:.1f}]" for road, v in of.items())
        print(f"{name:<28} {row}{'   above the limit' if of['plans']['median'] > LIMIT_US else ''}")
    if args.json:
        args.json.write_text(json.dumps({"calls": args.calls, "us": result}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
