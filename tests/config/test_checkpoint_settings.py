"""The recipe's checkpoints: how they are written, and which one is the best."""

from __future__ import annotations

import pytest

from prdp_fast.config.load import load_recipe
from prdp_fast.core.errors import UserError

EVALUATED = ["evaluation.every=2", "evaluation.prompts=4"]
HELD = ["evaluation.rewards=[{name: jpeg_size}]"]


@pytest.mark.parametrize("given", ["evaluation/seen", "evaluation/unseen", "evaluation/unseen/held/jpeg_size", "null"])
def test_metrics_that_there_are(given: str) -> None:
    settings = load_recipe("smoke", [*EVALUATED, *HELD, f"checkpoint.keep_best={given}"])
    assert settings.checkpoint.keep_best == (None if given == "null" else given)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([*EVALUATED, "checkpoint.keep_best=reward"], r"checkpoint\.keep_best.*'reward'.*evaluation/seen or evaluation/unseen"),
        ([*EVALUATED, "checkpoint.keep_best=evaluation/all"], r"checkpoint\.keep_best.*'evaluation/all'.*evaluation/unseen"),
        (
            [*EVALUATED, "checkpoint.keep_best=evaluation/unseen/held/clip"],
            r"'clip' is no reward of evaluation.rewards; there are",
        ),
        (
            [*EVALUATED, *HELD, "checkpoint.keep_best=evaluation/unseen/held/clip"],
            r"'clip' is no reward of evaluation.rewards; expected one of jpeg_size",
        ),
        (["evaluation.every=0", "checkpoint.keep_best=evaluation/seen"], r"with evaluation\.every 0, without evaluations; set"),
        (["evaluation.every=1", "evaluation.prompts=0", "checkpoint.keep_best=evaluation/seen"], r"with evaluation\.prompts 0,"),
    ],
)
def test_metrics_that_there_are_not(overrides: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_recipe("smoke", overrides)


@pytest.mark.parametrize(("given", "value"), [("on", "on"), ("off", "off"), ("true", "on"), ("auto", "auto")])
def test_async_save(given: str, value: str) -> None:
    assert load_recipe("smoke", [f"checkpoint.async_save={given}"]).checkpoint.async_save == value


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([*EVALUATED], r"'stop' without evaluation\.rewards, which it looks at; set that"),
        ([*HELD, "evaluation.every=0"], r"'stop' without evaluation\.every, "),
        ([*EVALUATED, *HELD], r"'stop' without checkpoint\.keep_best, .* evaluation/seen/held/NAME say"),
    ],
)
def test_a_stop_of_over_optimisation_wants_what_it_looks_at_and_keeps(overrides: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_recipe("smoke", [*overrides, "evaluation.on_over_optimised=stop"])
