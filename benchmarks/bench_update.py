"""The passes over stored trajectories and the U-Net calls in them: `make bench`. `overhead` is the first over the second."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.mark.benchmark(group="update")
def test_update(measure_against_bare: Any) -> None:
    measure_against_bare("update")


@pytest.mark.benchmark(group="update")
def test_its_unet_calls(measure: Any, phase_calls: Any) -> None:
    measure(phase_calls["update"].bare, rows=phase_calls["update"].denoiser_rows)


@pytest.mark.benchmark(group="reference")
def test_reference(measure_against_bare: Any) -> None:
    measure_against_bare("reference")


@pytest.mark.benchmark(group="reference")
def test_its_unet_forwards(measure: Any, phase_calls: Any) -> None:
    measure(phase_calls["reference"].bare, rows=phase_calls["reference"].denoiser_rows)
