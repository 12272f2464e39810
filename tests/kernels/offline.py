"""Compile every kernel to machine code without a GPU, exactly as a launch would, and print what the compiler made of it.

    PYTHONPATH=kernels python tests/kernels/offline.py [sm ...]        # default 80 90 100; one JSON object a line

The launch functions run on CPU tensors with a launcher that keeps what it is to launch, and that is compiled: specialisation,
alignment and constants are those of the real call. Needs Triton's own ptxas and cuobjdump, no driver. Not for TRITON_INTERPRET=1.
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
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from prdp_kernels import launch as launching
from prdp_kernels.denoise_step import kernel as denoise_step
from prdp_kernels.gaussian_log_prob import kernel as gaussian_log_prob
from prdp_kernels.geglu import kernel as geglu
from prdp_kernels.group_norm import kernel as group_norm
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


def machine_code(cubin: bytes) -> list[tuple[int, str]]:
    """(address, instruction) of the kernel's machine code, without what only fills space."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([CUOBJDUMP, "-sass", file.name], check=True, capture_output=True, text=True).stdout
    found = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", text, re.M)
    return [(int(address, 16), instruction) for address, instruction in found if not instruction.startswith("NOP")]


def largest_loop(code: list[tuple[int, str]]) -> int:
    """Instructions of the largest loop, counted from the target of its branch back; 0 without one."""
    largest = 0
    for address, instruction in code:
        branch = re.search(r"\bBRA\b.*\b0x([0-9a-f]+)$", instruction)
        if branch and int(branch.group(1), 16) < address:
            largest = max(largest, sum(int(branch.group(1), 16) <= at <= address for at, _ in code))
    return largest


def selected_negations(llir: str, ptx: str, code: list[tuple[int, str]]) -> list[str]:
    """Selects between a number and its negation, in LLVM IR, in PTX, and the predicated negation in place they become."""
    found = []
    number = r"(?:half|bfloat|float|double|<\d+ x (?:half|bfloat|float|double)>)"
    negative = dict(
        re.findall(rf"(%[\w.]+) = fneg (?:[a-z]+ )*{number} (%[\w.]+)", llir)
        + re.findall(rf"(%[\w.]+) = fsub (?:[a-z]+ )*{number} (?:-?0\.0+e\+00|zeroinitializer), (%[\w.]+)", llir)
        + re.findall(rf"(%[\w.]+) = fmul (?:[a-z]+ )*{number} (%[\w.]+), -1\.0+e\+00", llir)
    )
    for one, other in re.findall(rf"= select [^,]+, {number} (%[\w.]+), {number} (%[\w.]+)", llir):
        if negative.get(one) == other or negative.get(other) == one:
            found.append(f"LLVM IR: select between {one} and {other}")
    zero = {"0f00000000", "0f80000000"} | set(re.findall(r"\bmov\.[bf]\d+\s+(%\w+), 0[fd][08]0+;", ptx))
    registers = [
        re.findall(r"\bneg(?:\.ftz)?\.f(?:32|64)\s+(%\w+), (%\w+);", ptx),
        [
            (new, old)
            for new, first, old in re.findall(r"\bsub(?:\.rn|\.ftz)*\.f(?:32|64)\s+(%\w+), (%?\w+), (%\w+);", ptx)
            if first in zero
        ],
        re.findall(r"\bmul(?:\.rn|\.ftz)*\.f(?:32|64)\s+(%\w+), (%\w+), 0f[B]F800000;", ptx),
    ]
    negative = {new: old for pairs in registers for new, old in pairs}
    for one, other in re.findall(r"\bselp\.[bf](?:32|64)\s+%\w+, (%\w+), (%\w+), %p\d+;", ptx):
        if negative.get(one) == other or negative.get(other) == one:
            found.append(f"PTX: selp between {one} and {other}")
    for _, instruction in code:
        predicated = re.search(r"^@!?U?P\d \w*(?:FADD|DADD)\S* (R\d+), (.*)", instruction)
        if predicated and re.fullmatch(rf"-?RZ, -{predicated.group(1)}|-{predicated.group(1)}, -?RZ", predicated.group(2)):
            found.append(f"machine code: {instruction}")
        selected = re.search(r"\bFSEL R\d+, (-?)(R\d+)(?:\.reuse)?, (-?)(R\d+)", instruction)
        if selected and selected.group(2) == selected.group(4) and selected.group(1) != selected.group(3):
            found.append(f"machine code: {instruction}")
    return found


@triton.jit
def select_of_negations(x_ptr, y_ptr, out_ptr, SIZE: tl.constexpr):
    """How Box-Muller once ended: what `selected_negations` has to see. No kernel of the package."""
    at = tl.arange(0, SIZE)
    n, value = tl.load(x_ptr + at), tl.load(y_ptr + at)
    swapped = tl.where((n & 1) == 1, value * value, value)
    tl.store(out_ptr + at, tl.where((n & 2) == 2, -swapped, swapped) * value)


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


def cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    """(name, the call). Sizes decide tiles and alignment; values do not matter."""

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
        yield f"log_prob {short} guided", log_prob(guided, 5.0)
        yield f"log_prob+grad {short} guided", log_prob(guided, 5.0, **weights)
        yield f"step philox {short} guided", step(guided, 5.0, False)
        if short == "bf16":
            yield f"grad {short} guided", log_prob(guided, 5.0, **weights, want_log_prob=False)
            yield f"log_prob {short}", log_prob(plain, None)
            yield f"log_prob+grad {short}", log_prob(plain, None, **weights)
            yield f"step noise {short} guided", step(guided, 5.0, True)
            yield f"step philox {short}", step(plain, None, False)
    sdxl = transition(4, (4, 128, 128), torch.bfloat16, True)  # several programs a row
    yield "log_prob bf16 guided SDXL", log_prob(sdxl, 5.0)
    yield "log_prob+grad bf16 guided SDXL", log_prob(sdxl, 5.0, **weights)
    yield "step philox bf16 guided SDXL", step(sdxl, 5.0, False)
    small = transition(3, (4, 8, 8), torch.bfloat16, True)
    yield "log_prob bf16 guided 4x8x8", log_prob(small, 5.0)
    yield "step philox bf16 guided 4x8x8", step(small, 5.0, False)
    odd = transition(3, (3, 33, 35), torch.bfloat16, True)
    yield "log_prob+grad bf16 guided odd", log_prob(odd, 5.0, weights=torch.ones(3))
    mixed = transition(4, sd, torch.bfloat16, True)
    mixed[0] = mixed[0].to(memory_format=torch.channels_last)
    yield "log_prob+grad bf16 guided planes", log_prob(mixed, 5.0, **weights)
    yield "step philox bf16 guided planes", step(mixed, 5.0, False)
    odd[0] = odd[0].to(memory_format=torch.channels_last)
    yield "step philox bf16 guided odd planes", step(odd, 5.0, False)
    for shape in ((3, 3, 5), (5, 8, 8), (16, 7, 9)):
        planes = transition(3, shape, torch.bfloat16, True)
        planes[0] = planes[0].to(memory_format=torch.channels_last)
        kind = "planes" if shape[1] * shape[2] % 4 == 0 else "odd planes"
        yield f"step philox bf16 guided {kind} {'x'.join(map(str, shape))}", step(planes, 5.0, False)
    wide = transition(4, sd, torch.float64, True, torch.float64)
    yield "log_prob+grad fp64 guided", log_prob(wide, 5.0, **weights)
    yield "philox", lambda: philox.launch(torch.zeros(4, dtype=torch.int64), list(sd), None, 3)
    for groups, images, steps in ((64, 8, 50), (32, 16, 50), (32, 32, 50), (16, 64, 50), (16, 64, 1000), (4, 128, 50)):
        lp, rewards = torch.zeros(groups, images, steps), torch.zeros(groups, images)
        args = (lp, lp.clone(), lp.clone(), rewards, 1e-4, 1e-5)
        yield f"loss {groups}x{images}x{steps}", lambda args=args: prdp_loss.launch(*args, want="loss")
        yield f"loss+grad {groups}x{images}x{steps}", lambda args=args: prdp_loss.launch(*args)
    slopes, upstream = torch.zeros(16, 64, 2), torch.ones(())
    lp = torch.zeros(16, 64, 1000)
    yield "loss backward 16x64x1000", lambda: prdp_loss.launch_grad(lp, lp.clone(), slopes, upstream, 1e-4)
    for short, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)):
        for channels, side in ((320, 64), (1920, 16)) if short == "bf16" else ((640, 32),):
            x = torch.zeros(2, channels, side, side, dtype=dtype).to(memory_format=torch.channels_last)
            of_channels, shift = torch.zeros(channels, dtype=dtype), torch.zeros(2, channels, dtype=dtype)
            of_groups, means = torch.zeros(2, 32), torch.zeros(2, channels)
            yield (
                f"group_norm {short} {channels}x{side}x{side}",
                lambda x=x, w=of_channels, s=shift: group_norm.forward(x, w, w.clone(), s, 32, 1e-5, True),
            )
            yield (
                f"group_norm backward {short} {channels}x{side}x{side}",
                lambda x=x, w=of_channels, s=shift, m=of_groups, c=means: group_norm.backward(
                    x.clone(), x, w, w.clone(), s, m, m.clone(), c, 32, True
                ),
            )
    for width in (1280, 5120):
        x, dy = torch.zeros(64, 2 * width, dtype=torch.bfloat16), torch.zeros(64, width, dtype=torch.bfloat16)
        yield f"geglu bf16 {width}", lambda x=x: geglu.forward(x)
        yield f"geglu backward bf16 {width}", lambda x=x, dy=dy: geglu.backward(dy, x)


def report(capabilities: list[int]) -> Iterator[dict[str, Any]]:
    recorder = launching.LAUNCHER = Recorder()
    for name, call in cases():
        recorder.launches.clear()
        call()
        for prepared, tensors, scalars in list(recorder.launches):
            fn = prepared.kernel
            args, kwargs = (*tensors, *scalars, *prepared.numbers), prepared.constants | prepared.options
            for capability in capabilities:
                compiled = compile_for(GPUTarget("cuda", capability, 32), fn, args, kwargs)
                row = {"case": name, "kernel": fn.__name__, "sm": capability, "warps": kwargs["num_warps"]}
                yield row | resources(compiled.asm["cubin"]) | accesses(compiled.asm["ptx"]) | of_code(compiled.asm, kwargs)
    for capability in capabilities:
        numbers, values = torch.zeros(256, dtype=torch.int32), torch.zeros(256)
        asm = compile_for(
            GPUTarget("cuda", capability, 32), select_of_negations, (numbers, values, values, 256), {"num_warps": 4}
        ).asm
        negations = selected_negations(asm["llir"], asm["ptx"], machine_code(asm["cubin"]))
        yield {"case": "a select of negations", "kernel": None, "sm": capability, "selected_negations": negations}


def of_code(asm: dict[str, Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """How a row is summed, the instructions of a turn of the largest loop and their number an element, selects of negations."""
    code = machine_code(asm["cubin"])
    elements = kwargs.get("P_BLOCK", 0) * kwargs.get("C_BLOCK", 1) / (32 * kwargs["num_warps"])  # of a tile, a thread
    loop = largest_loop(code)
    return {
        "sum": summation(asm["ttgir"]),
        "instructions": len(code),
        "loop_instructions": loop,
        "instructions_an_element": round(loop / elements, 1) if elements else None,
        "selected_negations": selected_negations(asm["llir"], asm["ptx"], code),
    }


class Recorder(launching.Launcher):
    """Keeps what would be launched."""

    def __init__(self) -> None:
        self.launches: list[tuple[launching.Prepared, Any, Any]] = []

    def launch(self, prepared: launching.Prepared, tensors: Any, scalars: Any) -> None:
        self.launches.append((prepared, tensors, scalars))


if __name__ == "__main__":
    for row in report([int(sm) for sm in sys.argv[1:]] or [80, 90, 100]):
        print(json.dumps(row), flush=True)
