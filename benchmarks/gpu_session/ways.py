"""How a U-Net is called."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Way:
    """How a U-Net is called."""

    title: str
    compile: str = "off"  # off, blocks, full, max-autotune
    attention: str = "sdpa"
    channels_last: bool = False
    graph: bool = False  # the forward as a CUDA graph
    rows: int = 32
    gradients: bool = True  # time forward and backward too
    forward: bool = True
