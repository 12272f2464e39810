"""An exponential moving average of the trained weights, which is smoother than the last of them.

It is kept beside the float32 weights that the optimizer steps, so a rank averages what is its own and ranks exchange nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from prdp_fast.core.errors import UserError


def rate(updates: int, decay: float) -> float:
    """What the n-th update (from 1) keeps of the average: `decay`, at first less.

    (1 + n) / (10 + n) at most: at decay 0.999 a run of 100 updates would otherwise still be nine tenths its first weights.
    """
    return min(decay, (1 + updates) / (10 + updates))


def write_averages(averages: list[torch.Tensor], path: Path) -> None:
    """What `Average.load` reads."""
    save_file({str(number): average.contiguous() for number, average in enumerate(averages)}, path)


class Average:
    """The average of some float32 tensors, which begins as they are."""

    def __init__(self, weights: Iterable[torch.Tensor], decay: float) -> None:
        self.weights, self.decay = [weight.detach() for weight in weights], decay
        assert all(weight.dtype == torch.float32 for weight in self.weights), "master weights are float32"
        self.averages = [weight.clone() for weight in self.weights]

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """After update number `updates`, counted from 1."""
        share = 1 - rate(updates, self.decay)
        for average, weight in zip(self.averages, self.weights, strict=True):
            average.lerp_(weight, share)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange weights and averages, in place and to the bit; twice is nothing."""
        for average, weight in zip(self.averages, self.weights, strict=True):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)

    def load(self, path: Path) -> None:
        """Raises: UserError if the file is missing, damaged or of other weights."""
        try:
            saved = load_file(path)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"checkpoint {path.parent} has no readable average of the weights ({error}); remove that checkpoint to go on "
                "from the one before, or begin anew with --resume never and another --output"
            ) from None
        shapes = {str(number): average.shape for number, average in enumerate(self.averages)}
        if {name: value.shape for name, value in saved.items()} != shapes:
            raise UserError(f"checkpoint {path.parent} averages other weights than this job's; resume with the job of the run")
        for number, average in enumerate(self.averages):
            average.copy_(saved[str(number)])
