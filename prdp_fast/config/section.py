"""What every section of a recipe is."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

LARGEST = 1e30  # of numbers that meet float32


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
