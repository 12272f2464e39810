"""What decides the gradient of a flow's schedule, on a small sample of the measurement in the documentation."""

from __future__ import annotations

from benchmarks.epoch.step_weight_variance import measure, table_of

SIZE = {"steps": 10, "shift": 3.0, "epochs": 6, "prompts": 8, "images": 6}


def test_the_last_noisy_step_of_cps_is_nearly_the_whole_gradient_unless_it_weighs_less() -> None:
    uniform, even, without = (measure("cps", kind, **SIZE) for kind in ("uniform", "inverse_kappa", "last left out"))
    assert uniform.last > 0.95
    assert even.last < 0.2
    assert -1 <= uniform.one < without.one - 0.1, "one epoch's gradient says less of the true one"
    assert "inverse_kappa" in table_of([uniform, even])
