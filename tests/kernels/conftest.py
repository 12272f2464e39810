"""One thread; and where the kernels run: PRDP_TEST_DEVICE, by default Triton's interpreter on the CPU.

These tests need torch, triton, numpy and pytest alone: whatever else a test module wants, it asks for with `importorskip`.
"""

import os

DEVICE = os.environ.get("PRDP_TEST_DEVICE", "cpu")
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Of the Triton tests."""
    return torch.device(DEVICE)
