"""Every operator once on small, odd shapes: what compute-sanitizer watches, and little else.

    compute-sanitizer --tool memcheck python benchmarks/sanitize_kernels.py

Inputs are made, and results compared, on the CPU, so that the kernels on the device are the operators' own.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):
    _root = Path(__file__).resolve().parent.parent
    sys.path[0] = str(_root)
    sys.path.insert(1, str(_root / "kernels"))

import torch

from benchmarks import checking, kernel_cases
from benchmarks.kernel_cases import LOSSES, TRANSITIONS, Case


def cases() -> list[Case]:
    """A row that ends in the middle of a vector, one that is a single element, and one longer than a block."""
    found = []
    for op, mode in TRANSITIONS:
        found += [
            Case(op, mode, "odd", (3, 3, 5, 7), torch.bfloat16, 5.0),
            Case(op, mode, "odd", (3, 3, 5, 7), torch.float16, 5.0, channels_last=True),
            Case(op, mode, "one", (1, 1, 1, 1), torch.float32),
            Case(op, mode, "long", (2, 4, 33, 65), torch.bfloat16, 5.0),
        ]
    found += [Case(op, mode, "odd", shape) for op, mode in LOSSES for shape in ((3, 5, 7), (2, 16, 130))]
    return found + [Case("philox_normal", "fwd", "odd", shape) for shape in ((3, 3, 5, 7), (1, 1, 1, 1), (2, 4, 33, 65))]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cpu: with --backend torch, or TRITON_INTERPRET=1 (which cuts bf16 off)")
    parser.add_argument("--backend", default="triton")
    args = parser.parse_args(arguments)
    ops, wrong = kernel_cases.operators(args.backend), 0
    for case in cases():
        built = kernel_cases.build(case, args.device, ops)
        answer = kernel_cases.build(case, "cpu", ops).answer()
        op = built.contestants[0]
        got = {name: value.cpu() for name, value in op.run().items()}
        fault = checking.first_fault(got, {name: answer[name] for name in op.expected}, built.dtypes)
        wrong += fault is not None
        if fault:
            print(f"WRONG {case.key}: {fault}")
    print(f"{len(cases())} calls, {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
