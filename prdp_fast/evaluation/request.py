"""What a user asks of an evaluation. Imports nothing heavy: the command line takes its defaults from here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class EvaluationRequest:
    """What to evaluate, as it was asked for. `plan.plan_evaluation` checks it.

    Where a field is None, a run's recipe decides. Without a run the defaults of recipes do.
    """

    model: str  # an output directory of training, a diffusers directory or a hub id
    base: str | None = None  # what to compare with; None: a run's own base, and nothing without a run
    prompts: Sequence[str] = ()  # sets, as `plan.find_set` reads them; none: a run's seen and unseen
    rewards: Sequence[str] = ()  # as `plan.parse_reward` reads them, beside those of a run's recipe
    samples: int = 64  # images a prompt
    limit: int | None = None  # prompts drawn from a set; None: a run's evaluation.prompts, and all without a run
    seed: int = 0  # draws prompts, noise and intervals
    output: Path | None = None  # None: RUN/evaluation, or evaluations/MODEL
    scheduler: str | None = None  # class name
    steps: int | None = None
    guidance: str | None = None  # a number, or "none"
    guidance_interval: Sequence[int] | None = None  # first and last timestep that is guided
    eta: float | None = None
    method: str | None = None  # of flow-matching models
    noise_level: float | None = None
    stochastic_steps: Sequence[str] | None = None  # first and last step that is noisy, or "all"
    batch: int | None = None  # images a call of the denoiser
    dtype: str | None = None  # None: float32 on a CPU, a run's own on a GPU
    trust_code: bool = False  # whether Python files that the run's record names may be run
    features: str | None = None  # directory of a CLIP model, for diversity; None: colours on an 8 x 8 grid
