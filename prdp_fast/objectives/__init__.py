"""Objectives: small pure functions from rewards and log-probs to the gradient with respect to each log-prob."""

from prdp_fast.config.objectives import (
    DdpoSettings,
    DpokSettings,
    GrpoSettings,
    ObjectiveSettings,
    PrdpSettings,
    RebelSettings,
    RwrSettings,
)
from prdp_fast.objectives.base import Objective, ObjectiveInput, ObjectiveOutput
from prdp_fast.objectives.ddpo import DdpoObjective
from prdp_fast.objectives.dpok import DpokObjective
from prdp_fast.objectives.grpo import GrpoObjective
from prdp_fast.objectives.prdp import PrdpObjective
from prdp_fast.objectives.rebel import RebelObjective
from prdp_fast.objectives.running import update_statistics
from prdp_fast.objectives.rwr import RwrObjective

__all__ = [
    "DdpoObjective", "DpokObjective", "GrpoObjective", "Objective", "ObjectiveInput", "ObjectiveOutput", "PrdpObjective",
    "RebelObjective", "RwrObjective", "build_objective", "update_statistics",
]  # fmt: skip


def build_objective(settings: ObjectiveSettings, backend: str = "auto") -> Objective:
    match settings:
        case PrdpSettings():
            return PrdpObjective(
                settings.kl_weight, settings.clip_range, backend, pairs=settings.pairs,
                last_epoch=settings.reference == "last_epoch",
            )  # fmt: skip
        case DdpoSettings():
            return DdpoObjective(settings.clip_range, settings.normalization, settings.advantage_clip)
        case DpokSettings():
            return DpokObjective(settings.reward_weight, settings.kl_weight, settings.clip_range)
        case GrpoSettings():
            return GrpoObjective(settings.clip_range, settings.kl_weight, settings.advantage_clip)
        case RwrSettings():
            return RwrObjective(settings.temperature)
        case RebelSettings():
            return RebelObjective(settings.eta)
