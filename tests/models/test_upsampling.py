from __future__ import annotations

import copy

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.models.upsampling import Upsample2D

from prdp_fast.models.pipeline import Pipeline
from prdp_fast.models.upsampling import join_upsampling
from prdp_fast.world import TINY


def layer(channels: int, out_channels: int, bias: bool = True, **options) -> Upsample2D:
    torch.manual_seed(channels)
    return Upsample2D(channels, use_conv=True, out_channels=out_channels, bias=bias, **options).double().requires_grad_(False)


@pytest.mark.parametrize(("channels", "out_channels", "bias"), [(1, 1, True), (3, 5, True), (8, 2, False)])
@pytest.mark.parametrize("size", [(1, 1), (1, 4), (3, 2), (7, 5)])
def test_one_convolution_equals_two_layers(channels: int, out_channels: int, bias: bool, size: tuple[int, int]) -> None:
    """In float64, every pixel, borders included."""
    plain = layer(channels, out_channels, bias)
    joined = copy.deepcopy(plain)
    assert join_upsampling(joined) == 1
    x = torch.randn(2, channels, *size, dtype=torch.float64)
    torch.testing.assert_close(joined(x), plain(x), rtol=1e-13, atol=1e-13)
    odd = (2 * size[0] + 1, 2 * size[1] + 1)
    assert torch.equal(joined(x, odd), plain(x, odd))
    assert joined.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize(
    "options", [{"kernel_size": 5, "padding": 2}, {"interpolate": False}, {"norm_type": "rms_norm", "eps": 1e-5}]
)
def test_other_layers_stay_as_they_are(options: dict) -> None:
    plain = layer(4, 4, **{"elementwise_affine": True, **options})
    other = copy.deepcopy(plain)
    assert join_upsampling(other) == 0
    x = torch.randn(1, 4, 3, 3, dtype=torch.float64)
    assert torch.equal(other(x), plain(x))


def test_the_pipelines_decoder_is_diffusers_own_but_for_rounding() -> None:
    vae = AutoencoderKL.from_pretrained(TINY / "vae").eval()
    own = Pipeline.load("tiny", torch.device("cpu"), torch.float32)
    latents = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, result = vae.decode(latents).sample, own.vae.decode(latents).sample
    error = float((result - expected).abs().max())
    assert error < 1e-5, f"off by {error:.1e}"
    assert sum(name.endswith("joined_kernel") for name, _ in own.vae.named_buffers()) == 2  # both of its upsampling layers
    bytes_of = ((expected / 2 + 0.5).clamp(0, 1) * 255).round()
    assert float((own.decode(latents).float() - bytes_of).abs().max()) <= 1
    assert {name: value.shape for name, value in own.vae.state_dict().items()} == {
        name: value.shape for name, value in vae.state_dict().items()
    }


def test_kernels_follow_the_model_and_its_copies() -> None:
    plain = layer(4, 4)
    joined = copy.deepcopy(plain)
    join_upsampling(joined)
    twin = copy.deepcopy(joined)
    twin.joined_kernel.zero_()  # the copy computes with its own
    assert joined.joined_kernel.any()
    x = torch.randn(1, 4, 3, 3, dtype=torch.float64)
    assert torch.equal(twin(x), plain.conv.bias.view(1, -1, 1, 1).expand(1, 4, 6, 6))
    half = joined.to(torch.bfloat16, memory_format=torch.channels_last)
    assert half.joined_kernel.dtype == torch.bfloat16 and half(x.bfloat16()).dtype == torch.bfloat16
    # Three roundings of 2**-9 each (input, kernel, output) of sums of 16 products of about unit size.
    error = (half(x.bfloat16()).double() - plain(x)).abs().max()
    assert error < 3 * 2**-9 * 16
