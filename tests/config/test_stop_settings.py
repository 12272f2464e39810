"""The recipe's times: when a run stops, and how long its ranks wait for each other."""

from __future__ import annotations

import pytest

from prdp_fast.config.load import load_recipe
from prdp_fast.core.errors import UserError


@pytest.mark.parametrize(
    ("given", "value"), [("90", 90), ("0.5", 0.5), ("06:30", "06:30"), ("16:30", "16:30"), ("'16:30'", "16:30"), ("null", None)]
)
def test_minutes_or_a_time_of_day(given, value):
    """YAML 1.1 would make 990 of 16:30."""
    assert load_recipe("smoke", [f"schedule.stop_after={given}"]).schedule.stop_after == value


@pytest.mark.parametrize("given", ["0", "-3", "24:00", "7:60", "soon", "true"])
def test_neither(given):
    with pytest.raises(UserError, match=r"schedule\.stop_after.*expected minutes above 0, or a time of day such as 06:30"):
        load_recipe("smoke", [f"schedule.stop_after={given}"])


def test_ranks_wait_longer_than_rewards_may_take():
    assert load_recipe("smoke").collective_timeout_s == 1800
    assert load_recipe("smoke", ["schedule.reward_timeout_s=5000"]).collective_timeout_s == 5120
    with pytest.raises(UserError, match=r"collective_timeout_minutes 5 is not above .*1 x .* 540 s = 9 min"):
        load_recipe("smoke", ["schedule.collective_timeout_minutes=5"])
    both = ["schedule.collective_timeout_minutes=5", "schedule.reward_timeout_s=200"]
    assert load_recipe("smoke", both).collective_timeout_s == 300
