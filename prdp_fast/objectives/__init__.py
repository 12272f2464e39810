"""Objectives: small pure functions from rewards and log-probs to the gradient with respect to each log-prob."""

from prdp_fast.config.recipe import DdpoSettings, PrdpSettings
from prdp_fast.objectives.base import Objective, ObjectiveInput, ObjectiveOutput
from prdp_fast.objectives.ddpo import DdpoObjective
from prdp_fast.objectives.prdp import PrdpObjective

__all__ = ["DdpoObjective", "Objective", "ObjectiveInput", "ObjectiveOutput", "PrdpObjective", "build_objective"]


def build_objective(settings: PrdpSettings | DdpoSettings, backend: str = "auto") -> Objective:
    if isinstance(settings, DdpoSettings):
        return DdpoObjective(settings.clip_range, settings.normalization, settings.advantage_clip)
    return PrdpObjective(settings.kl_weight, settings.clip_range, backend)
