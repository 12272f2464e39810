"""Measurements of this repository. Nothing here is imported by what it measures.

`kernels/` measures the operators, `epoch/` an epoch of training; `lib/` has what both use. Every script is a module, run from the
top of the repository: `python -m benchmarks.epoch.profile`.
"""
