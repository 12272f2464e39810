"""How tensors lie in memory, what their outputs look like, and how their rows are cut into tiles. Host side, metadata only."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch

MAX_PLANES = 64  # more channels than this in mixed layouts are copied: a tile holds all of them


class TileConfig(NamedTuple):
    """A row as the kernels see it: `channels` planes of `pixels`, in tiles of (c_block, p_block), `tiles` of them a program."""

    flat: bool  # one plane, every tensor's memory in the same order
    channels: int
    pixels: int
    c_block: int
    p_block: int
    tiles: int
    num_warps: int

    @property
    def splits(self) -> int:
        """Programs a row."""
        return -(-self.pixels // (self.p_block * self.tiles))


def result_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """float32, or float64 if any tensor is."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def empty_like(t: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Uninitialised, dense: channels-last if `t` is, else contiguous. For outputs, which `rows` must not copy."""
    last = t.dim() == 4 and t.shape[1] <= MAX_PLANES and t.is_contiguous(memory_format=torch.channels_last)
    return torch.empty_like(t, dtype=dtype, memory_format=torch.channels_last if last else torch.contiguous_format)


def format_of(t: torch.Tensor) -> torch.memory_format:
    """Of what `empty_like` has made."""
    return torch.contiguous_format if t.is_contiguous() else torch.channels_last


def inner_strides(t: torch.Tensor) -> tuple[int, ...]:
    """Strides within a row, of the dimensions longer than 1: the others have none that counts."""
    return tuple(stride for stride, size in zip(t.stride()[1:], t.shape[1:], strict=True) if size != 1)


def dense_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """`inner_strides` of a contiguous row of this shape."""
    strides, step = [], 1
    for size in reversed(shape):
        if size != 1:
            strides.append(step)
            step *= size
    return tuple(reversed(strides))


def plane_strides(t: torch.Tensor) -> tuple[int, int] | None:
    """(channel stride, pixel stride) of rows whose dimensions after the first merge into one; None if they do not."""
    rest = [(stride, size) for stride, size in zip(t.stride()[2:], t.shape[2:], strict=True) if size != 1]
    if any(outer[0] != inner[0] * inner[1] for outer, inner in pairwise(rest)):
        return None
    return (t.stride(1) if t.shape[1] > 1 else 0), (rest[-1][0] if rest else 1)


class Rows(NamedTuple):
    """Tensors to hand to a kernel, with (row, channel, pixel) strides each, and how their rows are cut."""

    tensors: list[torch.Tensor]
    strides: list[tuple[int, int, int]]
    tile: TileConfig


def rows(tensors: Sequence[torch.Tensor], *, in_order: bool = False) -> Rows:
    """Tensors with the same row shape, read without a copy when their rows are all contiguous, all alike, or planes.

    in_order: elements are numbered (by the noise), so a flat walk needs memory order to be index order.
    """
    shape = tensors[0].shape[1:]
    size = shape.numel()
    contiguous = dense_strides(shape)
    double = result_dtype(*tensors) == torch.float64
    strides = [inner_strides(t) for t in tensors]
    alike = all(s == strides[0] for s in strides)
    if alike and (strides[0] == contiguous or (not in_order and is_dense(tensors[0]))):
        return Rows(list(tensors), [(t.stride(0), 0, 1) for t in tensors], _flat_tile(size, double))
    if shape[0] > MAX_PLANES:
        tensors = [t.contiguous() for t in tensors]
        return Rows(tensors, [(t.stride(0), 0, 1) for t in tensors], _flat_tile(size, double))
    found, where = [], []
    for t in tensors:
        planes = plane_strides(t)
        if planes is None:
            t = t.contiguous()
            planes = plane_strides(t)
            assert planes is not None
        found.append(t)
        where.append((t.stride(0), *planes))
    return Rows(found, where, _plane_tile(shape[0], size // shape[0]))


def is_dense(t: torch.Tensor) -> bool:
    """Whether the rows are free of gaps, in any order of the dimensions."""
    order = sorted(((stride, size) for stride, size in zip(t.stride()[1:], t.shape[1:], strict=True) if size != 1), reverse=True)
    return tuple(stride for stride, _ in order) == dense_strides([size for _, size in order])


# How rows are cut: by the size of a row and nothing else, so that its reduction does not depend on the batch around it.
#
# A row of up to ONE_PROGRAM elements, an SD latent of 4 x 64 x 64, is one program's, which needs no scratch and no semaphore. The
# programs of a larger row leave their sums for the one that arrives last. A thread has 8 elements of a tile: one 16-byte load of
# bf16, two of float32. A row of up to MEDIUM elements, an SDXL latent of 4 x 128 x 128, is cut finer than the largest ones: eight
# such rows in programs of four tiles would leave half of a GPU idle and wait for memory four times over. The alternatives, and
# the model of bytes and latencies behind the choice, are in kernels/README.md; which is faster only a GPU can say.
# PRDP_KERNELS_SPREAD=2 or 4 is the number of tiles of a program of a medium row; PRDP_KERNELS_ONE_PROGRAM=4096 makes an SD latent
# one, of eight programs. With 4 tiles, two programs an SD latent, a log-prob took 2 us more on an H100.
ONE_PROGRAM = int(os.environ.get("PRDP_KERNELS_ONE_PROGRAM", "16384"))
SPREAD = int(os.environ.get("PRDP_KERNELS_SPREAD", "1"))

# (elements of a row up to, tile, tiles a program, warps)
TABLE = (
    (128, 128, 1, 1),
    (256, 256, 1, 1),
    (512, 512, 1, 2),
    (1024, 1024, 1, 4),
    (4096, 1024, 4, 4),
)
LARGE = (8192, 2, 32)  # tile, tiles, warps of rows of up to ONE_PROGRAM elements
LARGE_F64 = (4096, 4, 16)  # in float64, which needs more registers than a thread of 32 warps has
TILE, TILES, WARPS = 2048, 4, 8  # of larger ones
MEDIUM = 65536
PLANE_TILE = 2048  # elements of a tile that spans all channels


def _flat_tile(size: int, double: bool = False) -> TileConfig:
    for limit, tile, tiles, warps in TABLE:
        if size <= limit:
            return TileConfig(True, 1, size, 1, tile, tiles, warps)
    tile, tiles, warps = LARGE_F64 if double else LARGE
    if size <= min(ONE_PROGRAM, tile * tiles):
        return TileConfig(True, 1, size, 1, tile, tiles, warps)
    return TileConfig(True, 1, size, 1, TILE, SPREAD if size <= MEDIUM else TILES, WARPS)


def elementwise_tile(size: int) -> TileConfig:
    """Of rows without a sum, noise alone and gradients alone: more programs than a row with a sum has."""
    if size <= 4096:
        return _flat_tile(size)
    return TileConfig(True, 1, size, 1, TILE, 1 if size <= MEDIUM else TILES, WARPS)


def _plane_tile(channels: int, pixels: int) -> TileConfig:
    c_block = 1 << (channels - 1).bit_length()
    p_block = min(max(PLANE_TILE // c_block, 4), max(4, 1 << (pixels - 1).bit_length()))
    tiles, warps = 4, max(1, min(8, c_block * p_block // 256))
    if 4 * c_block * p_block < c_block * pixels <= ONE_PROGRAM:
        p_block, warps = 2 * p_block, 2 * warps
    return TileConfig(False, channels, pixels, c_block, p_block, tiles, warps)
