"""Philox4x32-10 (Salmon et al., SC 2011) in int64 torch arithmetic, and standard normals by Box-Muller."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
NORMAL_STREAM = 0x4E4F524D  # fourth counter word of the noise
SEED_STREAM = 0x53454544  # and of derived seeds, so that the two never share a block
MASK = 0xFFFFFFFF

Words = tuple[torch.Tensor, ...]


def _mul_hi_lo(multiplier: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32 bits of multiplier * x. The halves of x keep every product below 2**48, clear of int64's sign."""
    low = multiplier * (x & 0xFFFF)
    high = multiplier * (x >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox_4x32_10(counter: Words, key: Words) -> Words:
    """Four random words of a counter of four and a key of two; all int64 tensors holding 0..2**32-1, broadcast together."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        high0, low0 = _mul_hi_lo(MULTIPLIERS[0], c0)
        high1, low1 = _mul_hi_lo(MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return c0, c1, c2, c3


def split(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Low and high 32 bits of the two's complement of int64 values."""
    return x & MASK, (x >> 32) & MASK


def box_muller(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two independent standard normals, float32, from two words.

    u1 = (x + 1/2) 2**-32 lies in [2**-33, 1], so its logarithm is finite and |normal| <= 6.77; u2 = y 2**-32 in [0, 1].
    Both are one correctly rounded float32 operation (the scalings are exact), so that any device reproduces them bit for bit;
    what remains is the rounding of log, sqrt, cos and sin.
    """
    u1 = (x.float() + 0.5) * 2.0**-32
    angle = y.float() * 2.0**-32 * (2 * math.pi)
    radius = (-2.0 * u1.log()).sqrt()
    return radius * angle.cos(), radius * angle.sin()


def philox_normal(seeds: torch.Tensor, shape: Sequence[int], step: int | torch.Tensor) -> torch.Tensor:
    """(N, *shape) float32. Element e of a row is word e % 4 of the block with counter (e // 4 low, high, step, NORMAL_STREAM)."""
    n, size = seeds.shape[0], math.prod(shape)
    block = torch.arange(-(-size // 4), device=seeds.device)
    counter_low, counter_high = split(block)
    step = torch.as_tensor(step, device=seeds.device).reshape(-1, 1) & MASK
    stream = torch.full_like(step, NORMAL_STREAM)
    key_low, key_high = split(seeds.unsqueeze(1))
    a, b, c, d = philox_4x32_10((counter_low, counter_high, step, stream), (key_low, key_high))  # each (N, blocks)
    normals = torch.stack([*box_muller(a, b), *box_muller(c, d)], dim=-1)
    return normals.reshape(n, 4 * block.numel())[:, :size].reshape(n, *shape)


def derive_seeds(seed: int, epoch: int, prompt: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """(N,) int64: Philox chained over the integers, each the counter of a block whose key is the state so far."""
    state = torch.full_like(prompt, seed)
    for position, value in enumerate((torch.full_like(prompt, epoch), prompt, image)):
        where, stream = torch.full_like(prompt, position), torch.full_like(prompt, SEED_STREAM)
        low, high, _, _ = philox_4x32_10((*split(value), where, stream), split(state))
        # The high word becomes signed before it is moved up, which keeps the product inside int64.
        state = ((high ^ 0x80000000) - 0x80000000) * 2**32 + low
    return state
