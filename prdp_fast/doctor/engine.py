"""Does the engine itself work? A kernel against its reference, a step of the embedded model, and the attention kernels."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prdp_fast.doctor import installation, machine
from prdp_fast.doctor.checks import Outcome, fault, note, ok

if TYPE_CHECKING:
    from prdp_fast.models.pipeline import Pipeline

KERNEL_TOLERANCE = 1e-4  # of values up to 20 in float32; two orders of summation differ by 1e-6


def run_python(code: str, timeout: float, **variables: str | None) -> None:
    """Run code in a process that imports from where this one does.

    Args: variables: of its environment; None takes one out.
    Raises: RuntimeError with the last line of what it said, if it fails, crashes or takes longer than `timeout` seconds.
    """
    environment = {name: value for name, value in os.environ.items() if name not in variables}
    environment |= {name: value for name, value in variables.items() if value is not None}
    environment["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, errors="replace", timeout=timeout
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"not done after {timeout:g} s") from None
    if done.returncode < 0:
        raise RuntimeError(f"its process was ended by {signal.Signals(-done.returncode).name}")
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1])


def check_kernel(runs: Path) -> Outcome:
    """A kernel against its reference, in a process of its own.

    A kernel that crashes ends its process. Triton chooses between GPU and interpreter when it is imported.
    """
    if installation.installed("triton") is None:
        return note("no Triton: operators run as plain torch")
    device = "cuda" if machine.has_gpu() else "cpu"
    where = "on the GPU" if device == "cuda" else "in Triton's interpreter"
    code = f"from prdp_fast.doctor.engine import compare_kernel; compare_kernel({device!r})"
    try:
        run_python(code, timeout=120, TRITON_INTERPRET=None if device == "cuda" else "1")
    except RuntimeError as error:
        return fault(f"denoise_step fails {where}: {error}", "set kernels to torch in the recipe, or mend triton")
    return ok(f"denoise_step equals its reference {where}")


def compare_kernel(device: str) -> None:
    """Raises: ValueError if the Triton kernel and the reference in plain torch disagree."""
    import torch

    from prdp_kernels import denoise_step

    generator = torch.Generator().manual_seed(0)
    output, sample = torch.randn(4, 4, 16, 16, generator=generator), torch.randn(2, 4, 16, 16, generator=generator)
    arguments = [tensor.to(device) for tensor in (output, sample, *torch.rand(3, 2, generator=generator) + 0.1)]
    seeds = torch.tensor([1, 2], device=device)
    fused, plain = (denoise_step(*arguments, seeds=seeds, guidance_scale=5.0, backend=backend) for backend in ("triton", "torch"))
    differences = [(own - other).abs().flatten() for own, other in zip(fused, plain, strict=True)]
    error = float(torch.cat(differences).max())  # NaN if one is
    if not error <= KERNEL_TOLERANCE:
        raise ValueError(f"off by {error:.1e}, expected at most {KERNEL_TOLERANCE:.0e}")


@cache
def embedded_model() -> Pipeline:
    import torch

    from prdp_fast.models.pipeline import Pipeline

    return Pipeline.load("tiny", torch.device("cuda" if machine.has_gpu() else "cpu"), torch.float32)


def check_embedded_model(runs: Path) -> Outcome:
    """Encodes a prompt, takes one guided step as a rollout does, and decodes what comes out."""
    import torch

    from prdp_fast.core.records import Prompt
    from prdp_fast.models.text import TextEncoder
    from prdp_fast.sampling.policy import Policy
    from prdp_fast.sampling.transitions import Transitions

    pipeline = embedded_model()
    device = pipeline.denoiser.device
    embeddings = TextEncoder(pipeline, torch.float32).encode([Prompt(0, "a large red circle", {})])
    policy = Policy(Transitions.from_scheduler(pipeline.scheduler, 10), guidance_scale=2.0, predict=pipeline.family.predict)
    latents = torch.randn(1, *pipeline.latent_shape, generator=torch.Generator().manual_seed(0)).to(device)
    start = time.perf_counter()
    with torch.no_grad():
        previous, log_prob = policy.sample_step(pipeline.denoiser, latents, 0, embeddings, torch.tensor([1], device=device))
    finite = bool(previous.isfinite().all() and log_prob.isfinite().all())
    milliseconds = (time.perf_counter() - start) * 1000
    if not finite:
        return fault(f"a U-Net step on {device} is not finite", "reinstall torch: its arithmetic is wrong on this machine")
    _, _, height, width = pipeline.decode(previous).shape
    return ok(f"a guided U-Net step on {device} took {milliseconds:.0f} ms, is finite and decodes to {height} x {width} pixels")


def check_attention(runs: Path) -> Outcome:
    """Every kernel that `performance.attention: auto` would try, forward and backward, against torch's own."""
    import torch

    from prdp_fast.acceleration.attention import candidates, set_attention, xformers_fault
    from prdp_fast.acceleration.probe import Probe, choose_variant

    pipeline = embedded_model()
    device = pipeline.denoiser.device
    half = torch.bfloat16 if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    dtype = half if device.type == "cuda" else torch.float32
    denoiser = pipeline.frozen_denoiser(dtype)
    names = candidates(device)
    variants: dict[str, Any] = {name: partial(set_attention, denoiser, name) for name in names}
    probe = Probe(denoiser, pipeline.family, rows=2, device=device, dtype=dtype, gradients=True)
    _, _, reasons = choose_variant(probe, variants, "sdpa")
    if "xformers" in reasons and (known := xformers_fault()):
        reasons["xformers"] = known
    out = "".join(f", no {name} ({reason})" for name, reason in reasons.items())
    return ok(f"{', '.join(name for name in names if name not in reasons)} work in {str(dtype).removeprefix('torch.')}{out}")
