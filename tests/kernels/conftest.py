"""One thread; and where the kernels run: PRDP_TEST_DEVICE, by default Triton's interpreter on the CPU.

These tests need torch, triton, numpy and pytest alone: whatever else a test module wants, it asks for with `importorskip`.
"""

import os

DEVICE = os.environ.get("PRDP_TEST_DEVICE", "cpu")
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """PRDP_TEST_SHARE=2/8 runs the tests number 2, 10, 18, ...: the GPU check runs all shares side by side."""
    number, _, shares = os.environ.get("PRDP_TEST_SHARE", "0/1").partition("/")
    items[:] = items[int(number) :: int(shares)]


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
