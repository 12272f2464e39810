"""What a run says of its steps: which are noisy and trained, and how they count."""

from __future__ import annotations

from dataclasses import replace

import pytest
from diffusers import FlowMatchEulerDiscreteScheduler

from prdp_fast.config.load import load_recipe
from prdp_fast.core.errors import UserError
from prdp_fast.evaluation.plan import choose_sampler
from prdp_fast.evaluation.request import EvaluationRequest
from prdp_fast.planning.dry_run import epoch_lines
from prdp_fast.planning.job import Job
from prdp_fast.reporting.evaluation_page import sampling
from prdp_fast.sampling.transitions import Transitions

DDIM = "sampler.scheduler=DDIMScheduler"


def job_of(*overrides: str) -> Job:
    return Job.prepare(load_recipe("smoke", list(overrides)), "zero2.json", world_size=1, cuda=False)


def flow_job(*overrides: str) -> Job:
    job = job_of()
    settings = load_recipe("smoke", ["sampler.num_inference_steps=10", *overrides])
    sampler = settings.sampler
    table = Transitions.from_scheduler(
        FlowMatchEulerDiscreteScheduler(shift=3.0), 10, sampler=sampler.method, noise_level=sampler.noise_level,
        window=sampler.stochastic_steps,
    )  # fmt: skip
    return replace(job, settings=settings, policy=replace(job.policy, transitions=table))


def test_a_job_without_a_choice_says_nothing() -> None:
    job = job_of()
    assert job.step_lines() == []
    assert job.rows_per_update == 16 * 3  # DDPM's last step has no density


@pytest.mark.parametrize(
    ("window", "words", "trained"),
    [
        ("[1,2]", "4 steps, of which steps 1 to 2 are noisy", 2),
        ("{count: 2}", "a run of 2 of steps 0 to 2 for each trajectory", 2),
    ],
)
def test_a_window(window: str, words: str, trained: int) -> None:
    job = job_of(DDIM, f"sampler.stochastic_steps={window}")
    (line,) = job.step_lines()
    assert words in line
    assert job.rows_per_update == 16 * trained
    assert f"rows per epoch, reference: {16 * 2 * trained}" in " ".join(epoch_lines(job, None))


def test_a_subset_of_more_steps_than_the_window_has() -> None:
    with pytest.raises(UserError, match=r"update_timesteps is 3, more than the 2 stochastic steps"):
        job_of(DDIM, "sampler.stochastic_steps={count: 2}", "schedule.updates_per_epoch=1", "schedule.update_timesteps=3")


def test_a_flow_model_whose_last_step_decides() -> None:
    sampler, weights = flow_job("sampler.method=cps").step_lines()
    assert "cps of noise level 0.8; 10 steps, of which steps 0 to 8 are noisy and trained" in sampler
    assert "counts 738 times as much in the log-prob of step 8 as of step 0" in weights
    assert "inverse_kappa" in weights
    assert len(flow_job("sampler.method=cps", "sampler.stochastic_steps=[3,6]").step_lines()) == 1
    even = flow_job("sampler.method=cps", "objective.step_weights=inverse_kappa").step_lines()[1]
    assert even.startswith("objective.step_weights inverse_kappa: 3.6 at step 0 to 0.0049 at step 8")


def test_an_evaluation_has_the_run_s_sampler_unless_told_otherwise() -> None:
    recipe = load_recipe("smoke", ["sampler.stochastic_steps={count: 2, first: 0, last: 5}", "sampler.method=cps"])
    own = choose_sampler(EvaluationRequest("run"), recipe)
    assert own == recipe.sampler
    asked = EvaluationRequest("run", stochastic_steps=("0", "3"), method="exact", noise_level=0.5)
    other = choose_sampler(asked, recipe)
    assert (other.stochastic_steps, other.method, other.noise_level) == ((0, 3), "exact", 0.5)
    assert choose_sampler(EvaluationRequest("run", stochastic_steps=("all",)), recipe).stochastic_steps is None
    for words, request in (
        ("stochastic_steps", EvaluationRequest("run", stochastic_steps=("3",))),
        ("method", EvaluationRequest("run", method="euler")),
    ):
        with pytest.raises(UserError, match=words) as caught:
            choose_sampler(request, recipe)
        assert "\n" not in str(caught.value)


def test_the_page_says_how_a_flow_was_sampled() -> None:
    recipe = load_recipe("smoke", ["sampler.stochastic_steps=[0,5]", "sampler.method=cps", "sampler.noise_level=0.9"])
    settings = {"models": {"alone": {"scheduler": "FlowMatchEulerDiscreteScheduler"}}}
    text = sampling(settings | {"sampler": recipe.sampler.model_dump(mode="json")})
    assert text == "FlowMatchEulerDiscreteScheduler, 4 steps, cps of noise level 0.9 at steps 0 to 5, guidance 2."
    run = load_recipe("smoke", ["sampler.stochastic_steps={count: 2}"]).sampler.model_dump(mode="json")
    assert "flow_sde at runs of 2 steps" in sampling(settings | {"sampler": run})
