"""The operators and their plain torch chains under pytest-benchmark: `make bench`.

With a CUDA device the Triton operators at the sizes of the GPU check, each call waited for; without one the torch references at
small sizes on the CPU. A result is compared with the float64 answer before it is timed, and a wrong one fails.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.kernels import checking
from benchmarks.kernels.cases import Case, build, cpu_cases, gpu_cases, operators

CUDA = torch.cuda.is_available()
DEVICE, OURS = ("cuda", "triton") if CUDA else ("cpu", "torch")
CASES = [case for case in gpu_cases() if case.size in ("SD", "loss")] if CUDA else cpu_cases()


@pytest.mark.parametrize("contestant", [OURS, "eager"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.key.replace(" ", "-"))
def test_operator(benchmark, case: Case, contestant: str):
    benchmark.group = f"{case.key} on {DEVICE}"
    built = build(case, DEVICE, operators(OURS), name=OURS)
    chosen = next(c for c in built.contestants if c.name == contestant)
    answer = built.answer()
    expected = {name: answer[name] for name in chosen.expected}
    fault = checking.first_fault(chosen.checked(), expected, built.dtypes, slack=1.0 if contestant == OURS else 10.0)
    assert fault is None, f"not timed, the result is wrong: {fault}"

    def call() -> None:
        chosen.run()
        if CUDA:
            torch.cuda.synchronize()

    benchmark(call)
