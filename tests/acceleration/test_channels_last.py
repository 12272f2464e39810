"""A U-Net in channels-last gives the plain model's output and gradients, and nothing in it leaves the layout."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from small_model import small_family

from prdp_fast.acceleration import channels_last
from prdp_fast.acceleration.choose import Denoisers, Ranks, accelerate
from prdp_fast.acceleration.compile import compile_trained, uncompile
from prdp_fast.acceleration.probe import distance
from prdp_fast.config.recipe import LoraSettings, PerformanceSettings
from prdp_fast.core.errors import UserError
from prdp_fast.models.lora import add_adapter
from prdp_fast.models.upsampling import join_upsampling

CPU = torch.device("cpu")
SIZES = {
    "sample_size": 16, "layers_per_block": 1, "block_out_channels": (32, 64), "norm_num_groups": 8, "cross_attention_dim": 24,
    "attention_head_dim": 4, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip
FAMILIES = {
    "SD 1": {},
    "SD 2": {"use_linear_projection": True, "upcast_attention": False},
    "SDXL": {
        "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 8 * 6 + 24, "transformer_layers_per_block": (1, 2),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    },
}  # fmt: skip


def unet(name: str = "SD 1", **more) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(**(SIZES | FAMILIES[name] | more)).double()


def inputs(name: str, rows: int = 3, size: int = 16) -> dict[str, object]:
    g = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    found = {
        "sample": normal(rows, 4, size, size),
        "timestep": torch.arange(rows) * 7,
        "encoder_hidden_states": normal(rows, 7, 24),
    }
    if name == "SDXL":
        found["added_cond_kwargs"] = {"text_embeds": normal(rows, 24), "time_ids": normal(rows, 6)}
    return found


def results(model: UNet2DConditionModel, given: dict[str, object]) -> list[torch.Tensor]:
    output = model(**given)[0]
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [output, *torch.autograd.grad(output.square().sum(), wanted)]


def assert_equal(fast: list[torch.Tensor], plain: list[torch.Tensor]) -> None:
    """Float64: rounding alone, some 1e-15 of each tensor; a wrong term is of the tensor's own size."""
    for i, (own, other) in enumerate(zip(fast, plain, strict=True)):
        scale = other.norm() + 1e-6 * max(t.norm() for t in plain)  # gradients that are 0 but for rounding
        assert (own - other).norm() <= 1e-11 * scale, f"result {i}: off by {(own - other).norm() / scale:.1e}"


@pytest.mark.parametrize("name", FAMILIES)
def test_output_and_gradients_are_the_plain_model_s(name):
    model, given = unet(name), inputs(name)
    plain = results(model, given)
    assert channels_last.enable(model) == sum(type(m).__name__ == "ResnetBlock2D" for m in model.modules())
    assert_equal(results(model, given), plain)
    channels_last.disable(model)
    for own, other in zip(results(model, given), plain, strict=True):
        assert torch.equal(own, other)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_odd_sizes_and_many_rows():
    """Upsampling to an odd size, and the 64 rows from which diffusers upsamples in NCHW."""
    for rows, size in ((2, 15), (64, 4)):
        model, given = unet(), inputs("SD 1", rows, size)
        plain = results(model, given)
        channels_last.enable(model)
        assert_equal(results(model, given), plain)


@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_leaves_the_layout(name):
    model = unet(name)
    channels_last.enable(model)
    left: list[str] = []

    def look(where: str):
        def hook(module, args, output):
            if isinstance(output, torch.Tensor) and output.ndim == 4:
                seen.append(where)
                if not output.is_contiguous(memory_format=torch.channels_last):
                    left.append(where)

        return hook

    seen: list[str] = []
    for where, module in model.named_modules():
        module.register_forward_hook(look(where))
    with torch.no_grad():
        model(**inputs(name, rows=64, size=8))
    assert len(seen) > 30 and not left


def test_frozen_weights_are_laid_out_and_trained_ones_are_not():
    model = unet()
    channels_last.enable(model)
    assert model.conv_in.weight.is_contiguous()
    model.requires_grad_(False)
    channels_last.enable(model)
    assert model.conv_in.weight.is_contiguous(memory_format=torch.channels_last) and not model.conv_in.weight.is_contiguous()
    channels_last.disable(model)
    assert model.conv_in.weight.is_contiguous()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_with_an_adapter(checkpointing):
    model, given = unet(), inputs("SD 1")
    targets = ["conv1", "conv2", "conv_shortcut", "to_q", "proj_in", "time_emb_proj"]
    add_adapter(model, LoraSettings(rank=2, targets=targets), seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # 0 at first, and so would be its partner's gradient
            torch.nn.init.normal_(parameter, std=0.1)
    if checkpointing:
        model.enable_gradient_checkpointing()
        model.train()
    plain = results(model, given)
    channels_last.enable(model)
    assert_equal(results(model, given), plain)


def test_checkpointing():
    model, given = unet(), inputs("SD 1")
    plain = results(model, given)
    model.enable_gradient_checkpointing()
    model.train()
    channels_last.enable(model)
    assert_equal(results(model, given), plain)


def test_the_decoder_of_a_vae():
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(16, 32), norm_num_groups=4, latent_channels=4, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ).double()  # fmt: skip
    latents = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    plain = vae.decode(latents).sample
    assert channels_last.enable(vae.decoder) > 0
    assert_equal([vae.decode(latents).sample], [plain])
    channels_last.disable(vae.decoder)
    assert join_upsampling(vae.decoder) == 1
    channels_last.enable(vae.decoder)
    assert_equal([vae.decode(latents).sample], [plain])
    channels_last.disable(vae.decoder)
    upsampling = next(module for module in vae.decoder.modules() if type(module).__name__ == "Upsample2D")
    assert "forward" in upsampling.__dict__


def test_what_it_does_not_know_stays_as_it_is():
    model, given = unet(resnet_time_scale_shift="scale_shift"), inputs("SD 1")
    plain = results(model, given)
    assert channels_last.enable(model) == 0
    assert_equal(results(model, given), plain)


def test_compiling_and_uncompiling_leave_it_in_place(monkeypatch):
    """A compiler sees the plain forward; rows that it was not made for, and what comes after it, see this one."""
    monkeypatch.setattr("prdp_fast.acceleration.compile.BACKEND", "eager")
    torch._dynamo.reset()
    model, given = unet(), inputs("SD 1")
    plain = results(model, given)
    channels_last.enable(model)
    before = {name: module.__dict__["forward"] for name, module in model.named_modules() if "forward" in module.__dict__}
    for mode in ("blocks", "full"):
        compile_trained(model, mode, ["ResnetBlock2D", "BasicTransformerBlock"], {3})
        assert_equal(results(model, given), plain)
        uncompile(model)
        after = {name: module.__dict__["forward"] for name, module in model.named_modules() if "forward" in module.__dict__}
        assert after == before
    assert_equal(results(model, given), plain)


def choose(denoiser, reference=None, stage=2, remembered=None, **performance):
    chosen = {"compile": "off", "cuda_graphs": "off", "attention": "sdpa", "fuse_qkv": "off"} | performance
    return accelerate(
        Denoisers(denoiser, None, reference), PerformanceSettings(**chosen), small_family(), train_rows=3, sample_rows=3,
        stage=stage, device=CPU, dtype=torch.float32, ranks=Ranks(), remembered=remembered,
    ).decisions["channels_last"]  # fmt: skip


def test_the_switch():
    from small_model import small_unet

    denoiser = small_unet()
    reference = copy.deepcopy(denoiser).requires_grad_(False)
    probe_inputs = small_family().denoiser_inputs(3, CPU, torch.float32)
    with torch.no_grad():
        plain = denoiser(**probe_inputs)[0]
    decision = choose(denoiser, reference, channels_last="auto")
    assert decision.value == "off" and "CPU" in decision.reason
    assert choose(denoiser, reference, channels_last="on").value == "on"
    with torch.no_grad():
        for model in (denoiser, reference):
            assert isinstance(model.conv_in.forward, channels_last.ChannelsLastForward)
            assert distance([model(**probe_inputs)[0]], [plain]) < 1e-5
    with pytest.raises(UserError, match="channels_last is on, but at ZeRO-3 weights are gathered in hooks"):
        choose(denoiser, reference, stage=3, channels_last="on")
    assert choose(denoiser, reference, channels_last="off").value == "off"
    assert not isinstance(denoiser.conv_in.forward, channels_last.ChannelsLastForward)


@pytest.mark.parametrize(("setting", "remembered"), [("on", None), ("auto", {"channels_last": {"value": "on"}})])
def test_a_wrong_result_is_refused(monkeypatch, setting, remembered):
    """What the user set ends in one line; what the run chose before it went wrong is chosen anew."""
    from small_model import small_unet

    monkeypatch.setattr(channels_last, "geglu", lambda x: x[..., : x.shape[-1] // 2])
    monkeypatch.setattr("prdp_fast.acceleration.choose.choose_channels_last", as_on_cuda)
    arguments = {"remembered": remembered, "channels_last": setting}
    if setting == "on":
        with pytest.raises(UserError, match=r"performance.channels_last is on, but fails here: Unsuitable: its output is off by"):
            choose(small_unet(), **arguments)
        return
    denoiser = small_unet()
    decision = choose(denoiser, **arguments)
    assert decision.value == "off" and "its output is off by" in decision.reason
    assert not any(isinstance(module.__dict__.get("forward"), channels_last.ChannelsLastForward) for module in denoiser.modules())


def as_on_cuda(setting, probe, stage, remembered):
    from prdp_fast.acceleration.choose import choose_switch

    denoiser = probe.denoiser
    return choose_switch(
        "channels_last",
        setting,
        probe,
        lambda: channels_last.enable(denoiser),
        lambda: channels_last.disable(denoiser),
        remembered,
    )
