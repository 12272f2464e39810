"""Compile every kernel to machine code without a GPU, exactly as a launch would, and print what the compiler made of it.

    PYTHONPATH=kernels python tests/kernels/offline.py [sm ...]        # default 80 90 100; one JSON object a line

The launch functions run on CPU tensors with the launch itself replaced by a compilation: specialisation, alignment and constants
are those of the real call. Needs Triton's own ptxas and cuobjdump, no driver. Not for TRITON_INTERPRET=1.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from prdp_kernels.denoise_step import kernel as denoise_step
from prdp_kernels.gaussian_log_prob import kernel as gaussian_log_prob
from prdp_kernels.philox import kernel as philox
from prdp_kernels.prdp_loss import kernel as prdp_loss

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def compile_for(target: GPUTarget, fn: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What `JITFunction.run` compiles for these arguments, for a GPU that need not be there."""
    backend = make_backend(target)
    binder = create_function_from_signature(fn.signature, fn.params, backend)
    kwargs = kwargs | {"debug": False}
    bound, specialization, options = binder(*args, **kwargs)
    options, signature, constants, attributes = fn._pack_args(backend, kwargs, bound, specialization, options)
    return triton.compile(ASTSource(fn, signature, constants, attributes), target=target, options=options.__dict__)


def resources(cubin: bytes) -> dict[str, int]:
    """Registers, stack and shared bytes of the kernel, from its machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([CUOBJDUMP, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    found = dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text))
    return {
        "registers": int(found["REG"]),
        "stack": int(found["STACK"]),
        "shared": int(found["SHARED"]),
        "local": int(found["LOCAL"]),
    }


def accesses(ptx: str) -> dict[str, list[Any]]:
    """Bits of the global loads and stores of every loop, in the order of the code, and of all of them; no others.

    Numbers that a program reads or writes once (coefficients, results) are plain 32- or 64-bit accesses outside loops. Of the
    rest, partial sums of other programs are known by their cache modifier, .cg, and listed apart: a thread reads one or none.
    """
    labels = {m.group(1): m.start() for m in re.finditer(r"^(\$L__BB\d+_\d+):", ptx, re.M)}
    ends: dict[int, int] = {}  # of the loop that begins there: its last branch back
    for branch in re.finditer(r"bra(?:\.uni)?\s+(\$L__BB\d+_\d+);", ptx):
        begin = labels.get(branch.group(1), len(ptx))
        if begin < branch.start():
            ends[begin] = branch.start()
    found: dict[str, list[Any]] = {"loads": [], "stores": [], "partials": [], "loops": []}
    for start, end in sorted(ends.items()) or [(0, len(ptx))]:
        loop: dict[str, list[int]] = {"loads": [], "stores": []}
        for kind, modifiers in re.findall(r"\b(ld|st)\.global([.\w:]*)", ptx[start:end]):
            vector = re.search(r"\.v(\d)", modifiers)
            bits = int(re.search(r"\.[bfsu](\d+)", modifiers).group(1))  # type: ignore[union-attr]
            bits *= int(vector.group(1)) if vector else 1
            if ".cg" in modifiers:
                found["partials"].append(bits)
            else:
                loop["loads" if kind == "ld" else "stores"].append(bits)
        found["loops"].append(loop)
        for name, widths in loop.items():
            found[name] += widths
    return found


def summation(ttgir: str) -> str | None:
    """How the elements of a tile lie in the threads that add them up, which decides the order of the sum; None without one."""
    for operand in re.findall(r'"tt\.reduce"\((%\w+)\)', ttgir):
        source = re.search(rf"{operand} = tt\.reshape .* : tensor<([^,>]*), (#\w+)>", ttgir)
        if source:
            layout = re.search(rf"^{source.group(2)} = (#.*)$", ttgir, re.M)
            return f"{source.group(1)} {layout.group(1)}" if layout else None
    return None


def cases() -> Iterator[tuple[str, Any, Callable[[], Any]]]:
    """(name, the module that launches, the call). Sizes decide tiles and alignment; values do not matter."""

    def transition(
        n: int, shape: tuple[int, ...], dtype: torch.dtype, guided: bool, latents: torch.dtype = torch.float32
    ) -> list[Any]:
        rows = [torch.ones(n, dtype=latents) for _ in range(3)]
        return [torch.zeros(2 * n if guided else n, *shape, dtype=dtype), torch.zeros(n, *shape, dtype=latents), *rows]

    def log_prob(args: list[Any], guidance_scale: float | None, **kwargs: Any) -> Callable[[], Any]:
        m, x, *rows = args
        return lambda: gaussian_log_prob.launch(m, x, x.clone(), *rows, guidance_scale, "mean", **kwargs)

    def step(args: list[Any], guidance_scale: float | None, noise: bool) -> Callable[[], Any]:
        m, x, *rows = args
        given = (x.clone(), None) if noise else (None, torch.zeros(len(x), dtype=torch.int64))
        return lambda: denoise_step.launch(m, x, *rows, *given, None, 3, guidance_scale, "mean")

    sd, weights = (4, 64, 64), {"weights": torch.ones(4)}
    for short, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)):
        guided, plain = transition(4, sd, dtype, True), transition(4, sd, dtype, False)
        yield f"log_prob {short} guided", gaussian_log_prob, log_prob(guided, 5.0)
        yield f"log_prob+grad {short} guided", gaussian_log_prob, log_prob(guided, 5.0, **weights)
        yield f"step philox {short} guided", denoise_step, step(guided, 5.0, False)
        if short == "bf16":
            yield f"grad {short} guided", gaussian_log_prob, log_prob(guided, 5.0, **weights, want_log_prob=False)
            yield f"log_prob {short}", gaussian_log_prob, log_prob(plain, None)
            yield f"log_prob+grad {short}", gaussian_log_prob, log_prob(plain, None, **weights)
            yield f"step noise {short} guided", denoise_step, step(guided, 5.0, True)
            yield f"step philox {short}", denoise_step, step(plain, None, False)
    small = transition(3, (4, 8, 8), torch.bfloat16, True)
    yield "log_prob bf16 guided 4x8x8", gaussian_log_prob, log_prob(small, 5.0)
    yield "step philox bf16 guided 4x8x8", denoise_step, step(small, 5.0, False)
    odd = transition(3, (3, 33, 35), torch.bfloat16, True)
    yield "log_prob+grad bf16 guided odd", gaussian_log_prob, log_prob(odd, 5.0, weights=torch.ones(3))
    mixed = transition(4, sd, torch.bfloat16, True)
    mixed[0] = mixed[0].to(memory_format=torch.channels_last)
    yield "log_prob+grad bf16 guided planes", gaussian_log_prob, log_prob(mixed, 5.0, **weights)
    yield "step philox bf16 guided planes", denoise_step, step(mixed, 5.0, False)
    odd[0] = odd[0].to(memory_format=torch.channels_last)
    yield "step philox bf16 guided odd planes", denoise_step, step(odd, 5.0, False)
    wide = transition(4, sd, torch.float64, True, torch.float64)
    yield "log_prob+grad fp64 guided", gaussian_log_prob, log_prob(wide, 5.0, **weights)
    yield "philox", philox, lambda: philox.launch(torch.zeros(4, dtype=torch.int64), list(sd), None, 3)
    for groups, images, steps in ((64, 8, 50), (32, 16, 50), (16, 64, 1000), (4, 128, 50)):
        lp, rewards = torch.zeros(groups, images, steps), torch.zeros(groups, images)
        call = lambda lp=lp, rewards=rewards: prdp_loss.launch(lp, lp.clone(), lp.clone(), rewards, 1e-4, 1e-5)  # noqa: E731
        yield f"loss {groups}x{images}x{steps}", prdp_loss, call


def report(capabilities: list[int]) -> Iterator[dict[str, Any]]:
    for name, module, call in cases():
        ((kernel_name, fn),) = ((k, v) for k, v in vars(module).items() if isinstance(v, JITFunction) and k.endswith("_kernel"))
        launches: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        setattr(module, kernel_name, _Recorder(launches))
        try:
            call()
        finally:
            setattr(module, kernel_name, fn)
        ((args, kwargs),) = launches
        for capability in capabilities:
            compiled = compile_for(GPUTarget("cuda", capability, 32), fn, args, kwargs)
            row = {"case": name, "kernel": kernel_name, "sm": capability, "warps": kwargs["num_warps"]}
            yield (
                row | resources(compiled.asm["cubin"]) | accesses(compiled.asm["ptx"]) | {"sum": summation(compiled.asm["ttgir"])}
            )


class _Recorder:
    """Stands for a kernel: keeps what it is launched with."""

    def __init__(self, launches: list[tuple[tuple[Any, ...], dict[str, Any]]]) -> None:
        self.launches = launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **kwargs: self.launches.append((args, kwargs))


if __name__ == "__main__":
    for row in report([int(sm) for sm in sys.argv[1:]] or [80, 90, 100]):
        print(json.dumps(row), flush=True)
