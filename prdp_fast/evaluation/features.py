"""What images are compared in for diversity: colours from afar, or a CLIP model's view."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from prdp_fast.core.errors import UserError
from prdp_fast.evaluation.blocks import digest
from prdp_fast.rewards.clip import Clip, processor_pixels
from prdp_fast.rewards.scoring_model import read_pretrained

CLIP_BATCH = 64  # images at once


class Features(Protocol):
    def record(self) -> dict[str, Any]:
        """JSON of what the features depend on; "name" is for people."""

    def __call__(self, images: torch.Tensor) -> np.ndarray:
        """(N, 3, H, W) uint8 -> (N, F) float64, compared by Euclidean distance."""


class PixelFeatures:
    """Needs nothing, and says whether pictures look alike: place and colour, not content."""

    def record(self) -> dict[str, Any]:
        return {"name": "colours averaged over an 8 x 8 grid"}

    def __call__(self, images: torch.Tensor) -> np.ndarray:
        return pixel_features(images.numpy())


class ClipFeatures:
    """Unit vectors of a CLIP model's image tower: whether pictures show alike. Distances are from 0 to 2."""

    def __init__(self, directory: str) -> None:
        """directory: as save_pretrained writes it, with preprocessor_config.json. Weights are loaded on first use.

        Raises: UserError if it is none.
        """
        self.directory = Path(directory)
        for name in ("config.json", "preprocessor_config.json"):
            if not (self.directory / name).is_file():
                raise UserError(
                    f"--features {directory} has no {name}; expected a directory of a CLIP model and its image processor"
                )
        self.clip: Clip | None = None

    def record(self) -> dict[str, Any]:
        return {"name": f"the CLIP model {self.directory.resolve().name}", "digest": digest(self.directory)}

    def _load(self) -> Clip:
        from transformers import CLIPVisionModelWithProjection

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        tower = read_pretrained(f"--features {self.directory}", CLIPVisionModelWithProjection, str(self.directory))
        return Clip(tower.to(device).eval(), processor_pixels(f"--features {self.directory}", str(self.directory)))

    def __call__(self, images: torch.Tensor) -> np.ndarray:
        if self.clip is None:
            self.clip = self._load()
        return torch.cat([self.clip.images(part).double().cpu() for part in images.split(CLIP_BATCH)]).numpy()


def choose_features(directory: str | None) -> Features:
    return PixelFeatures() if directory is None else ClipFeatures(directory)


def pixel_features(images: np.ndarray, size: int = 8) -> np.ndarray:
    """What a picture looks like from afar: colours averaged over a grid.

    Args:
        images: (N, 3, H, W) uint8.
        size: cells a side; cell i covers pixels floor(i H / size) to ceil((i + 1) H / size), as adaptive average pooling does.
    Returns: (N, 3 * size * size) float64, each in [0, 1], divided by sqrt(3 * size * size): the distance of two pictures is the
        root mean square difference of their cells, from 0 to 1 (black against white).
    """
    height, width = images.shape[2:]
    rows = _pooling(height, size)
    columns = _pooling(width, size)
    cells = np.einsum("ih,nchw,jw->ncij", rows, images.astype(np.float64) / 255, columns, optimize=True)
    return cells.reshape(len(images), -1) / math.sqrt(3 * size * size)


def _pooling(length: int, cells: int) -> np.ndarray:
    """(cells, length) float64: row i averages the pixels of cell i."""
    table = np.zeros((cells, length))
    for cell in range(cells):
        first, last = cell * length // cells, -(-(cell + 1) * length // cells)
        table[cell, first:last] = 1 / (last - first)
    return table
