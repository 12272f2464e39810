"""A U-Net's ways of being called: time, rate, memory, and distance from a float32 truth of forward and gradient.

A task is one way (or several that need no compiling). Each makes its own truth: the model in float32, of the first few rows. Rows
do not see each other, so what is asked of them does not depend on how many there are.

Several tasks compile side by side; a lock that dies with its owner lets one at a time be timed.
"""

from __future__ import annotations

import contextlib
import fcntl
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.gpu_session.ways import Way

FEW = 4  # rows of the truth
ROUNDS = 7
# The same classes in a rehearsal, a thousandth of the size.
_TWO = {"sample_size": 8, "block_out_channels": [8, 16], "layers_per_block": 1, "cross_attention_dim": 16, "norm_num_groups": 4}
SMALL: dict[str, dict[str, Any]] = {
    "sd14": _TWO
    | {
        "attention_head_dim": 2, "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    },
    "sdxl": _TWO
    | {
        "attention_head_dim": [2, 2], "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"], "transformer_layers_per_block": [1, 1],
    },
}  # fmt: skip


class NotHere(RuntimeError):
    """A library or a device that a way of calling needs is not there."""


@contextlib.contextmanager
def turn(lock: str) -> Iterator[None]:
    """Alone on the device, as far as tasks of this part are concerned."""
    with Path(lock).open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Bench:
    """A model, its truth, and how far plain eager 16 bits are from it."""

    def __init__(self, options: dict[str, Any]) -> None:
        import torch

        from benchmarks.lib.published import write_configurations
        from benchmarks.lib.truth import without_tf32
        from prdp_fast.acceleration.probe import Probe
        from prdp_fast.models.families import read_family
        from prdp_fast.planning.cost import denoiser_flop

        self.rehearse = options["rehearse"]
        self.device = torch.device("cpu" if self.rehearse else "cuda")
        self.dtype = torch.bfloat16
        if self.rehearse:
            from prdp_fast.acceleration import compile as compiling

            compiling.BACKEND = "aot_eager"  # traced, and run as it was
        self.few = min(FEW, options["rows"])
        with tempfile.TemporaryDirectory() as folder:
            self.family = read_family(str(write_configurations(options["preset"], Path(folder))))
        if self.rehearse:
            self.family = replace(self.family, denoiser_config=self.family.denoiser_config | SMALL[options["preset"]])
        torch.manual_seed(0)
        with self.device:
            self.model = self.family.denoiser_class.from_config(self.family.denoiser_config)
        # The weights that 16 bits can hold are the model; what is measured is what computing in 16 bits costs.
        self.model.to(self.dtype).to(torch.float32).requires_grad_(True).train()
        self.tflop = 1e-12 * denoiser_flop(self.family)
        self.probe = Probe(self.model, self.family, options["rows"], self.device, self.dtype, True)
        with without_tf32():
            self.truth = self.results(self.model, self.inputs(self.few, torch.float32), self.few)
        self.model.to(self.dtype)
        self.plain = self.distances(self.results(self.model, self.inputs(self.few), self.few))
        torch.backends.cudnn.benchmark = False

    def inputs(self, rows: int, dtype: Any = None) -> dict[str, Any]:
        """Of so many rows, the first few of which are the same whatever their number. In 16 bits, or what they are in float32."""
        import torch

        found = self.family.denoiser_inputs(rows, self.device, self.dtype)

        def fill(value: Any, name: str) -> Any:
            if isinstance(value, dict):
                return {key: fill(inner, key) for key, inner in value.items()}
            if not isinstance(value, torch.Tensor) or value.ndim == 0:
                return value
            made = []
            for row in range(len(value)):
                generator = torch.Generator().manual_seed(1000 + row % 8)
                if value.is_floating_point():
                    made.append(torch.randn(value.shape[1:], generator=generator))
                else:
                    made.append(torch.randint(0, 1000, value.shape[1:], generator=generator))
            result = torch.stack(made).to(value)
            return result.to(dtype) if dtype is not None and value.is_floating_point() else result

        return {name: fill(value, name) for name, value in found.items()}

    def call(self, call: Callable[..., Any], inputs: dict[str, Any]) -> Any:
        return self.probe._call(call, inputs)

    def results(self, call: Callable[..., Any], inputs: dict[str, Any], few: int, gradients: bool = True) -> list[Any]:
        """Output of the first few rows, and the gradient by all weights of its sum of squares."""
        import torch

        if not gradients:
            with torch.no_grad():
                return [self.call(call, inputs)[:few].float()]
        weights = list(self.model.parameters())
        output = self.call(call, inputs)[:few].float()
        found = torch.autograd.grad(output.square().sum(), weights, allow_unused=True)
        return [output.detach(), *(None if one is None else one.float() for one in found)]

    def distances(self, results: list[Any]) -> tuple[float, float | None]:
        from benchmarks.lib.truth import relative_distance

        gradient = relative_distance(results[1:], self.truth[1:]) if len(results) > 1 else None
        return relative_distance(results[:1], self.truth[:1]), gradient

    @contextlib.contextmanager
    def prepared(self, way: Way) -> Iterator[dict[str, Callable[..., Any]]]:
        """What to call for the forward alone and with gradients; the model as it was afterwards."""
        import torch

        from prdp_fast.acceleration import channels_last
        from prdp_fast.acceleration import compile as compiling
        from prdp_fast.acceleration.attention import set_attention
        from prdp_fast.acceleration.cuda_graph import CudaGraphForward

        model, blocks = self.model, self.family.repeated_blocks
        try:
            set_attention(model, way.attention)
        except (RuntimeError, ImportError) as error:
            raise NotHere(str(error)) from error
        if way.channels_last:
            channels_last.enable(model)
        calls: dict[str, Callable[..., Any]] = {}
        if way.compile == "max-autotune":
            compiling.raise_recompile_limit()
            mode = {"backend": "aot_eager"} if self.rehearse else {"mode": "max-autotune-no-cudagraphs"}
            calls["forward"] = torch.compile(compiling.own_forward(model), dynamic=False, **mode)
            calls["forward and backward"] = calls["forward"]
        elif way.compile != "off":
            if way.gradients:
                compiling.compile_trained(model, way.compile, blocks, {way.rows})
            else:
                compiling.compile_frozen(model, way.compile, blocks, {way.rows})
        calls.setdefault("forward", model)
        calls.setdefault("forward and backward", model)
        if way.graph:
            calls["forward"] = CudaGraphForward(calls["forward"], [way.rows])
        kept = {"forward": calls["forward"]} if way.forward else {}
        try:
            yield kept | ({"forward and backward": calls["forward and backward"]} if way.gradients else {})
        finally:
            compiling.uncompile(model)
            set_attention(model, "sdpa")
            channels_last.disable(model)

    def measure(self, emit: Any, way: Way, lock: str) -> None:
        """A row for the forward and one for forward and backward. What does not fit the memory is no fault."""
        import torch

        if way.graph and self.device.type != "cuda":
            emit(way.title, "not available", "a CUDA graph needs a CUDA device")
            return
        try:
            with self.prepared(way) as calls:
                for what, call in calls.items():
                    self.measure_one(emit, way, what, call, lock)
        except NotHere as error:
            emit(way.title, "not available", " ".join(str(error).split())[:200])
        except torch.OutOfMemoryError as error:
            emit(way.title, "does not fit", f"{way.rows} rows: {' '.join(str(error).split())[:160]}")
        except Exception as error:
            emit(way.title, "error", " ".join(f"{type(error).__name__}: {error}".split())[:300])
        self.give_back()

    def give_back(self) -> None:
        """Memory that is kept for later is memory that the tasks beside this one lack."""
        import torch

        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def measure_one(self, emit: Any, way: Way, what: str, call: Callable[..., Any], lock: str) -> None:
        import torch

        from benchmarks.lib import truth
        from benchmarks.lib.resident import can_measure, peak_over_baseline
        from benchmarks.lib.timing import wall_clock

        both = what != "forward"
        inputs = self.inputs(way.rows)
        start = time.perf_counter()
        result = self.results(call, inputs, self.few, gradients=both)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        first_call = time.perf_counter() - start
        output, gradient = self.distances(result)
        del result
        self.give_back()
        found = [truth.fault("its output", output, self.plain[0])]
        if gradient is not None and self.plain[1] is not None:
            found.append(truth.fault("its gradient", gradient, self.plain[1]))
        fault = "; ".join(line for line in found if line)
        upstream = torch.randn(way.rows, *self.family.latent_shape, device=self.device, dtype=self.dtype)
        weights = list(self.model.parameters())

        def run() -> object:
            if not both:
                with torch.no_grad():
                    return self.call(call, inputs)
            return torch.autograd.grad(self.call(call, inputs), weights, upstream, allow_unused=True)

        with turn(lock):
            run()
            watch = wall_clock(self.device)
            times = sorted(watch(run) for _ in range(1 if self.rehearse else ROUNDS))
            peak = peak_over_baseline(run, self.device) if can_measure(self.device) else None
            self.give_back()
        median = statistics.median(times)
        emit(
            f"{way.title}, {what}", "wrong" if fault else "measured", fault, rows=way.rows, ms=median,
            spread_ms=times[-1] - times[0], tflop_per_s=self.tflop * way.rows * (3 if both else 1) / median * 1e3,
            peak_gib=None if peak is None else peak / 2**30, first_call_s=round(first_call, 2), output_error=output,
            gradient_error=gradient,
        )  # fmt: skip


def measure(emit: Any, options: dict[str, Any]) -> None:
    """A task: the ways that it was given, one after another."""
    bench = Bench(options)
    emit(
        "plain eager against float32", "told", "", output_error=bench.plain[0], gradient_error=bench.plain[1],
        truth_rows=bench.few,
    )  # fmt: skip
    for way in options["ways"]:
        bench.measure(emit, Way(**way), options["lock"])


MOST = 30  # kernels that are told of each way


def where_the_time_goes(emit: Any, options: dict[str, Any]) -> None:
    """A task: of forward and backward of each way, the host's time, the wall's, and the kernels that take most of it."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    bench = Bench(options)
    cuda = bench.device.type == "cuda"
    activity = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
    weights = list(bench.model.parameters())
    for given in options["ways"]:
        way = Way(**given)
        inputs = bench.inputs(way.rows)
        upstream = torch.randn(way.rows, *bench.family.latent_shape, device=bench.device, dtype=bench.dtype)
        with bench.prepared(way) as calls:
            call = calls["forward and backward"]

            def run(call: Callable[..., Any] = call, inputs: dict[str, Any] = inputs, upstream: Any = upstream) -> None:
                torch.autograd.grad(bench.call(call, inputs), weights, upstream, allow_unused=True)

            run()
            if cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            host = time.perf_counter() - start
            if cuda:
                torch.cuda.synchronize()
            wall = time.perf_counter() - start
            with profile(activities=[activity]) as found:
                run()
                if cuda:
                    torch.cuda.synchronize()
        kernels = [
            (event.self_device_time_total if cuda else event.self_cpu_time_total, event.count, event.key)
            for event in found.key_averages()
        ]
        kernels = sorted((one for one in kernels if one[0] > 0), reverse=True)
        emit(
            way.title, host_ms=1e3 * host, wall_ms=1e3 * wall, kernels_ms=sum(time_us for time_us, _, _ in kernels) / 1e3,
            kernel_launches=sum(count for _, count, _ in kernels),
        )  # fmt: skip
        for time_us, count, name in kernels[:MOST]:
            emit(f"{way.title}: {name[:120]}", "told", "", ms=time_us / 1e3, count=count)
