"""NaN and infinity in a model: which weight holds one, and what to do about a dtype that is too narrow."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping

import torch
from torch import nn


def first_nonfinite(networks: Mapping[str, nn.Module]) -> str | None:
    """The first weight that is not finite, as 'unet.conv_out.bias (torch.float32) holds NaN'; None if all are.

    One pass over the weights where they are, and one wait for all of them.
    """
    peaks = [torch.nn.utils.get_total_norm(group, math.inf).double() for group in by_place(networks)]
    if not peaks or all(math.isfinite(peak) for peak in torch.stack([peak.to(peaks[0].device) for peak in peaks]).tolist()):
        return None
    for name, value in weights_of(networks):
        if not value.isfinite().all():
            return f"{name} ({value.dtype}) holds {'NaN' if value.isnan().any() else 'infinity'}"
    return None


def weights_of(networks: Mapping[str, nn.Module]) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers of floating-point numbers, with the network's name in front."""
    for network, module in networks.items():
        for name, value in itertools.chain(module.named_parameters(), module.named_buffers()):
            if value.is_floating_point() and value.numel():
                yield f"{network}.{name}", value.detach()


def by_place(networks: Mapping[str, nn.Module]) -> list[list[torch.Tensor]]:
    """The weights, those of one dtype and device together: what one kernel can go over."""
    groups: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}
    for _, value in weights_of(networks):
        groups.setdefault((value.dtype, value.device), []).append(value)
    return list(groups.values())


def wider(dtype: torch.dtype) -> str:
    """What to do where a dtype is too narrow."""
    if dtype == torch.float16:
        return "use a --config with bf16, or with neither bf16 nor fp16"
    if dtype == torch.bfloat16:
        return "use a --config without bf16, to compute in float32"
    return "check the model and its scheduler_config.json"
