"""Says at the end of a run what its numbers are, and are not."""

from __future__ import annotations

import pytest
import torch


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if torch.cuda.is_available():
        terminalreporter.write_line("bytes, bandwidth, compiled chains and the results file: make gpu-check")
    else:
        terminalreporter.write_line("no CUDA device: Triton kernels not measured; CPU references only")
