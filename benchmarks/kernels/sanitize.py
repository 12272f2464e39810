"""Every operator once on small, odd shapes, for compute-sanitizer to watch.

    compute-sanitizer --tool memcheck python -m benchmarks.kernels.sanitize

Inputs are made, and results compared, on the CPU, so that the kernels on the device are the operators' own.
"""

from __future__ import annotations

import sys

import torch

from benchmarks.kernels import checking
from benchmarks.kernels.cases import LOSSES, TRANSITIONS, Case, build, operators
from benchmarks.lib import command


def odd_cases() -> list[Case]:
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
    for mode in ("fwd", "fwd+bwd"):
        for shape in ((3, 96, 5, 7), (1, 64, 33, 33)):
            found.append(Case("group_norm", mode, "odd", shape, torch.bfloat16, channels_last=True))
        found += [Case("geglu", mode, "odd", shape, torch.bfloat16) for shape in ((3, 5, 26), (1, 1, 2))]
    return found + [Case("philox_normal", "fwd", "odd", shape) for shape in ((3, 3, 5, 7), (1, 1, 1, 1), (2, 4, 33, 65))]


def main(arguments: list[str] | None = None) -> int:
    parser = command.parser_of(__doc__)
    parser.add_argument("--device", default="cuda", help="cpu: with --backend torch, or TRITON_INTERPRET=1 (which cuts bf16 off)")
    parser.add_argument("--backend", default="triton")
    args = parser.parse_args(arguments)
    ops, wrong = operators(args.backend), 0
    for case in odd_cases():
        built = build(case, args.device, ops)
        answer = build(case, "cpu", ops).answer()
        op = built.contestants[0]
        got = {name: value.cpu() for name, value in op.run().items()}
        fault = checking.first_fault(got, {name: answer[name] for name in op.expected}, built.dtypes)
        wrong += fault is not None
        if fault:
            print(f"WRONG {case.key}: {fault}")
    print(f"{len(odd_cases())} calls, {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
