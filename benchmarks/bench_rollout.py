"""The rollout and the U-Net calls in it: `make bench`. `overhead` is the first over the second."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.mark.benchmark(group="rollout")
def test_rollout(measure_against_bare: Any) -> None:
    measure_against_bare("rollout")


@pytest.mark.benchmark(group="rollout")
def test_its_unet_calls(measure: Any, phase_calls: Any) -> None:
    measure(phase_calls["rollout"].bare, rows=phase_calls["rollout"].denoiser_rows)
