"""What this python lacks and how to bring it, and what the machine can do at most."""

from __future__ import annotations

import importlib
import shutil
from typing import Any

# Module, what it is for. The last three are of use, and nothing fails without them.
NEEDED = {
    "torch": "everything", "triton": "kernels", "numpy": "everything", "pytest": "kernel tests", "diffusers": "models",
    "transformers": "models", "peft": "LoRA", "deepspeed": "training", "pydantic": "recipes", "yaml": "recipes",
    "webdataset": "prompts", "PIL": "images", "safetensors": "weights", "huggingface_hub": "models", "rich": "tables",
    "tensorboard": "telemetry",
}  # fmt: skip
USEFUL = {"xformers": "an attention kernel", "hypothesis": "more cases in the kernel tests", "ninja": "DeepSpeed's CPU Adam"}
PACKAGES = {"yaml": "PyYAML", "PIL": "pillow"}  # where the name differs
HOW = (
    "on a machine with a network and the same python: pip wheel --no-deps {package} -w wheels; "
    "here: pip install --no-deps wheels/*"
)
DEEPSPEED = "on a machine with a network: DS_BUILD_OPS=0 pip wheel --no-deps --no-build-isolation deepspeed -w wheels"


def packages(emit: Any, options: dict[str, Any]) -> None:
    """Import them all, the useful ones too: what is found may still lack what it imports itself."""
    for module, purpose in (NEEDED | USEFUL).items():
        package = PACKAGES.get(module, module)
        try:
            found = importlib.import_module(module)
        except Exception as error:  # a library that is there, and cannot load
            lacks = getattr(error, "name", None) or module
            how = DEEPSPEED if lacks == "deepspeed" else HOW.format(package=PACKAGES.get(lacks, lacks))
            reason = f"{purpose}; {type(error).__name__}: {' '.join(str(error).split())[:160]}"
            emit(package, "missing" if module in NEEDED else "not available", f"{reason}; {how}")
        else:
            emit(package, "passed", "", version=str(getattr(found, "__version__", "unknown")))
    for tool, purpose in {"g++": "DeepSpeed's CPU Adam", "gcc": "Triton's launcher", "compute-sanitizer": "memcheck"}.items():
        place = shutil.which(tool)
        emit(tool, "passed" if place else "not available", "" if place else f"not on the PATH; it is for {purpose}")


def machine(emit: Any, options: dict[str, Any]) -> None:
    """Which GPU, and its rates: what all the rest is held against."""
    import torch

    from benchmarks.lib import provenance, timing

    device = torch.device("cpu" if options["rehearse"] else "cuda")
    head, dirty = provenance.commit()
    described: dict[str, Any] = {"date": provenance.now(), "commit": head, "dirty": dirty} | provenance.machine()
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(0)
        described |= {
            "gpu": properties.name, "sm_count": properties.multi_processor_count, "memory_gib": properties.total_memory / 2**30,
            "free_gib": torch.cuda.mem_get_info()[0] / 2**30, "capability": f"{properties.major}.{properties.minor}",
        }  # fmt: skip
    emit("machine", "told", "", machine=described)
    stopwatch = timing.stopwatch_for(device)
    size = {"size": 8 * 2**20, "rounds": 2} if options["rehearse"] else {}
    emit("copy bandwidth", value=timing.copy_bandwidth(stopwatch, **size), unit="GB/s")
    floor = timing.launch_floor(stopwatch)
    emit(
        "launch floor", "not available" if floor is None else "measured", value=None if floor is None else 1e3 * floor, unit="us"
    )
    dtype = torch.float32 if options["rehearse"] else torch.bfloat16
    rate = timing.peak_tflop_per_s(device, dtype, rounds=1 if options["rehearse"] else 20)
    emit(f"matrix product, {str(dtype).removeprefix('torch.')}", value=rate, unit="TFLOP/s")
