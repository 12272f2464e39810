"""What a study is: configs/studies/NAME.yaml, checked before the first run starts."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import Field, ValidationError, model_validator

from prdp_fast.config.load import CONFIGS, explain, load_recipe, nearest, read_yaml
from prdp_fast.config.recipe import Settings
from prdp_fast.config.section import Section
from prdp_fast.core.errors import UserError

STUDIES = CONFIGS / "studies"


class Study(Section):
    """A grid of arms and seeds. Settings are the recipe's keys with dots, as for --set."""

    title: str
    question: str
    source: str = Field("", description="the claim of a paper that it looks at")
    recipe: str = Field(description="of every run")
    settings: dict[str, Any] = Field({}, description="of every run")
    arms: dict[str, dict[str, Any]] = Field(description="what differs")
    baseline: str = Field(description="the arm that the others are compared with, seed by seed")
    seeds: list[int] = Field([0, 1, 2], min_length=1)
    short: dict[str, Any] = Field(
        {}, description="further settings of --short, which shows that everything runs, and nothing else"
    )

    @model_validator(mode="after")
    def _check(self) -> Study:
        if self.baseline not in self.arms:
            raise ValueError(f"baseline {self.baseline!r} is no arm{nearest(self.baseline, list(self.arms))}")
        for name in self.arms:
            if not name.replace("_", "").replace("-", "").replace(".", "").isalnum():
                raise ValueError(f"arm {name!r}; expected letters, digits, '.', '_' and '-': it names a directory")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds {self.seeds} has one twice")
        return self


class Run(NamedTuple):
    """One cell of the grid."""

    arm: str
    seed: int
    overrides: list[str]  # "key=value", for --set

    @property
    def name(self) -> str:
        return f"{self.arm}-seed{self.seed}"


def load_study(name: str) -> Study:
    """By a path or a shipped name. Raises: UserError, one line."""
    for path in (Path(name), STUDIES / name, STUDIES / f"{name}.yaml"):
        if path.is_file():
            break
    else:
        known = sorted(path.stem for path in STUDIES.glob("*.yaml"))
        raise UserError(f"study {name!r} is neither a file nor one of the shipped studies{nearest(name, known)}")
    try:
        return Study.model_validate(read_yaml(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        raise UserError(f"study {path.name}: {explain(error, Study)}") from None
    except ValueError as error:
        raise UserError(f"study {path.name}: not valid YAML: {' '.join(str(error).split())}") from None


def grid(
    study: Study,
    *,
    seeds: list[int] | None = None,
    arms: list[str] | None = None,
    overrides: list[str] | None = None,
    short: bool = False,
) -> list[Run]:
    """The runs, every arm of a seed before the next seed: a study that is stopped has whole pairs.

    Args:
        seeds, arms: some of the study's; None: all. The baseline is always among the arms.
        overrides: of every run, after the study's own.
    Raises: UserError for an arm that there is none of.
    """
    for arm in arms or []:
        if arm not in study.arms:
            raise UserError(f"--arms {arm}: the study has no such arm{nearest(arm, list(study.arms))}")
    wanted = [arm for arm in study.arms if arms is None or arm in arms or arm == study.baseline]
    common = study.settings | (study.short if short else {})

    def words(arm: str) -> list[str]:
        # An arm may replace a whole section, which the others then go into.
        return [written(key, value) for key, value in (study.arms[arm] | common).items()] + (overrides or [])

    return [Run(arm, seed, words(arm)) for seed, arm in product(seeds or study.seeds, wanted)]


def written(key: str, value: Any) -> str:
    """key=value with a value in YAML's flow style, on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**9, sort_keys=False).strip()
    return f"{key}={text.removesuffix('...').strip()}"


def check(study: Study, runs: list[Run]) -> dict[str, Settings]:
    """The settings of each arm. Raises: UserError naming the arm whose settings no recipe takes."""
    settings: dict[str, Settings] = {}
    for run in runs:
        if run.arm in settings:
            continue
        try:
            settings[run.arm] = load_recipe(study.recipe, run.overrides, seed=run.seed)
        except UserError as error:
            raise UserError(f"arm {run.arm!r}: {error}") from None
    return settings
