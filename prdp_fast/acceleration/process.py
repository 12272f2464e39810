"""Settings of the process that make a denoiser cheaper: before anything is loaded or compiled."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
from pathlib import Path

import torch
from torch import nn

from prdp_fast.acceleration.probe import Decision, first_line
from prdp_fast.config.recipe import PerformanceSettings
from prdp_fast.core.cache import default_cache_dir
from prdp_fast.core.errors import UserError


def prepare_process(performance: PerformanceSettings, device: torch.device, dtype: torch.dtype) -> dict[str, Decision]:
    """What has to be set before anything is loaded or compiled.

    Args: dtype: of the policy's matrix products.
    Raises: UserError if a setting insists on what this machine lacks.
    """
    if performance.compile_cache is not None:
        set_compile_cache(Path(performance.compile_cache))
    elif device.type == "cuda" and performance.compile != "off" and "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        with contextlib.suppress(UserError):  # without one a restart compiles again
            set_compile_cache(default_compile_cache(device))
    decisions = {"tf32": set_tf32(performance.tf32, device, dtype)}
    if device.type == "cpu":
        decisions["heap"] = keep_heap()
    return decisions


def default_compile_cache(device: torch.device) -> Path:
    """Of this compiler and this kind of GPU, in the user's cache: what a preempted job compiled, its restart finds."""
    gpu = re.sub(r"[^A-Za-z0-9]+", "-", torch.cuda.get_device_name(device))
    return default_cache_dir() / "compiled" / f"torch-{torch.__version__}-{gpu}"


def set_compile_cache(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"performance.compile_cache {directory}: {error.strerror}; name one that can be written, or null for torch's own"
        ) from None
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(directory.resolve())
    os.environ["TRITON_CACHE_DIR"] = str((directory / "triton").resolve())
    # Both are on by default; a machine's environment may have turned them off.
    os.environ["TORCHINDUCTOR_FX_GRAPH_CACHE"] = os.environ["TORCHINDUCTOR_AUTOGRAD_CACHE"] = "1"


def set_tf32(switch: str, device: torch.device, dtype: torch.dtype) -> Decision:
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        if switch == "on":
            raise UserError(
                "performance.tf32 is on, but TF32 needs an NVIDIA GPU of compute capability 8.0 or more; set auto or off"
            )
        return Decision("off", "needs a GPU of compute capability 8.0")
    if switch == "auto":
        # A job in float32 asked for its 23 bits; in a 16-bit job float32 is the rewards and little else.
        switch, reason = (
            ("off", "a float32 job keeps its precision") if dtype == torch.float32 else ("on", "the policy is 16-bit")
        )
    else:
        reason = "as set"
    torch.set_float32_matmul_precision("high" if switch == "on" else "highest")
    torch.backends.cudnn.allow_tf32 = switch == "on"
    return Decision(switch, reason)


def keep_heap() -> Decision:
    """Let the C library keep freed memory: by default it gives a large tensor's pages back, and the next one faults them in.

    Measured on the embedded model at 64 rows: 9,000 page faults a forward become none, and a forward a seventh shorter.
    """
    M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
    largest = 32 << 20  # above this glibc maps and unmaps in any case
    try:
        mallopt = ctypes.CDLL(None).mallopt
        done = [mallopt(M_MMAP_THRESHOLD, largest), mallopt(M_TRIM_THRESHOLD, 2**31 - 1), mallopt(M_TOP_PAD, 2 * largest)]
    except (AttributeError, OSError, TypeError):
        done = [0]
    if all(done):
        return Decision("kept", "freed memory stays with the process, so its pages are not faulted in again")
    return Decision("default", "this C library has no mallopt")


def choose_fused_optimizer(switch: str, device: torch.device, offload: bool) -> Decision:
    """Whether AdamW runs in one kernel. offload: the optimizer state lies on the host of a GPU."""
    if offload and device.type == "cuda":
        return Decision("on", "DeepSpeed's CPU Adam, which is fused by itself")
    if switch == "off":
        return Decision("off", "as set")
    try:
        parameter = nn.Parameter(torch.zeros(8, device=device))
        parameter.grad = torch.ones_like(parameter)
        torch.optim.AdamW([parameter], fused=True).step()
    except RuntimeError as error:
        if switch == "on":
            raise UserError(
                f"performance.fused_optimizer is on, but AdamW(fused=True) fails here: {first_line(error)}; set auto or off"
            ) from None
        return Decision("off", first_line(error))
    return Decision("on", "one kernel for all of a parameter's arithmetic")
