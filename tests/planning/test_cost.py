"""Rows, operations and scaling: against numbers worked out by hand, and the published size of SD v1.4 and SDXL."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDIMScheduler
from small_model import small_family, small_policy, small_trajectories, small_unet

from prdp_fast.config.recipe import ScheduleSettings
from prdp_fast.core.format import format_flop
from prdp_fast.models.families import Family, StableDiffusion, StableDiffusionXL, read_family
from prdp_fast.planning.cost import PhaseRows, denoiser_flop, describe_epoch, device_peak, epoch_rows, predict_epoch
from prdp_fast.sampling.draws import UPDATE_STREAM
from prdp_fast.sampling.policy import Policy
from prdp_fast.sampling.rows import micro_batches, stratified
from prdp_fast.sampling.transitions import Transitions

# unet/config.json of the published pipelines, what differs from the class's own defaults.
SD14 = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
}
SDXL = {
    "sample_size": 128,
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


@pytest.fixture(scope="module")
def sd14() -> tuple[Family, int]:
    shapes = StableDiffusion(SD14, text_length=77)
    return shapes, denoiser_flop(shapes)


def sd_policy(steps: int = 50, guidance_scale: float | None = 5.0, interval: tuple[int, int] | None = None) -> Policy:
    """SD v1.4's noise schedule, as DDIM steps it: every one of the steps has a density."""
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1, clip_sample=False,
        set_alpha_to_one=False,
    )  # fmt: skip
    return Policy(
        Transitions.from_scheduler(scheduler, steps), guidance_scale, small_family().predict, guidance_interval=interval
    )


def test_sd14_costs_what_the_paper_scale_says(sd14) -> None:
    shapes, flop = sd14
    assert shapes.denoiser_parameters == 859_520_964
    assert flop / 1e12 == pytest.approx(0.803, abs=0.0005)
    rows = epoch_rows(ScheduleSettings(prompts_per_epoch=64, images_per_prompt=8), sd_policy(), needs_reference=True)
    total = sum(phase.flop(flop) for phase in rows.values())
    assert total / 1e15 == pytest.approx(206, abs=0.5)
    assert total / 790e12 == pytest.approx(260, abs=0.5)  # seconds


def test_attention_is_counted(sd14) -> None:
    """By hand: the self-attention of SD's blocks over h x w tokens of width c is 4 (h w)^2 c, and 16 blocks have one."""
    from torch.utils.flop_counter import FlopCounterMode

    shapes, _ = sd14
    denoiser = shapes.meta_denoiser().eval()
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        denoiser(**shapes.denoiser_inputs(1, "meta"))
    counts = {str(operator): count for operator, count in counter.get_flop_counts()["Global"].items()}
    # Down: two blocks on each of three levels; up: three; one in the middle, at 8 x 8.
    blocks = [(64, 320, 5), (32, 640, 5), (16, 1280, 5), (8, 1280, 1)]
    by_hand = sum(4 * (size**4 + size**2 * 77) * width * number for size, width, number in blocks)
    assert counts["aten.bmm"] == by_hand


def test_sdxl_is_counted_with_its_micro_conditioning() -> None:
    shapes = StableDiffusionXL(SDXL, text_length=77)
    assert shapes.denoiser_parameters == 2_567_463_684
    assert denoiser_flop(shapes) > 5e12


def test_the_embedded_model_from_its_files() -> None:
    shapes = read_family("tiny")
    # What README says of it, from the loaded weights.
    assert [round(count / 1e6, 2) for count in (shapes.vae_parameters, shapes.text_parameters, shapes.denoiser_parameters)] == [
        0.77, 0.62, 2.45,
    ]  # fmt: skip
    assert shapes.latent_shape == (4, 8, 8) and shapes.text_length == 20


def counted_rows(policy: Policy, trajectories, chosen=None) -> int:
    return sum(part.count * (2 if part.guided else 1) for part in micro_batches(policy, trajectories, 7, chosen))


@pytest.mark.parametrize("interval", [None, (300, 700)])
@pytest.mark.parametrize("updates", [1, 3])
def test_rows_are_those_the_passes_make(interval, updates: int) -> None:
    policy = small_policy()
    policy = Policy(policy.transitions, policy.guidance_scale, policy.predict, guidance_interval=interval)
    trajectories = small_trajectories(policy, small_unet(0), groups=2, images=3)
    schedule = ScheduleSettings(prompts_per_epoch=2, images_per_prompt=3, updates_per_epoch=updates)
    rows = epoch_rows(schedule, policy, needs_reference=True)
    every = counted_rows(policy, trajectories)
    assert rows["reference"] == PhaseRows(every)
    # K gradient passes, and K - 1 passes (1)
    assert rows["update"] == PhaseRows((2 * updates - 1) * every, updates * every)
    assert rows["rollout"].forward == 6 * policy.evaluations(torch.arange(len(policy.transitions)))
    assert epoch_rows(schedule, policy, needs_reference=True, first_epoch=True)["reference"].forward == 0
    assert epoch_rows(schedule, policy, needs_reference=False)["reference"].forward == 0


def test_rows_of_a_subset_are_its_expectation() -> None:
    """Uneven strata and a guidance interval: the average over many draws comes out."""
    policy = sd_policy(steps=11, interval=(200, 400))
    schedule = ScheduleSettings(prompts_per_epoch=4, images_per_prompt=2, update_timesteps=4, reference_timesteps=3)
    rows = epoch_rows(schedule, policy, needs_reference=True)
    stochastic, draws = policy.transitions.stochastic, 20_000
    for name, count in (("update", 4), ("reference", 3)):
        chosen = stratified(torch.arange(draws), len(stochastic), count, UPDATE_STREAM)
        each = policy.guided[stochastic[chosen]].double().sum(1) + count
        expected = rows[name].forward / 8
        assert abs(float(each.mean()) - expected) < 5 * float(each.std()) / math.sqrt(draws)


def test_recomputation_costs_one_more_forward() -> None:
    phase = PhaseRows(10, 4)
    assert phase.flop(3.0) == 3 * (10 + 2 * 4)
    assert phase.flop(3.0, recompute=True) == 3 * (10 + 3 * 4)


def test_describe_and_peaks() -> None:
    rows = {"rollout": PhaseRows(100), "update": PhaseRows(50, 50)}
    lines = describe_epoch(rows, 2e12, recompute=False, peak=1e15, gpus=2)
    assert lines[-1] == "at 2 x 1 PFLOP/s, the devices' peak, an epoch takes at least 0.2 s"  # (100 + 150) x 2e12 / 2e15 = 0.25
    assert "500 TFLOP" in lines[-2]
    assert not any("peak" in line for line in describe_epoch(rows, 2e12, recompute=False, peak=None, gpus=2))
    assert device_peak("NVIDIA H100 PCIe", torch.bfloat16) == 756.5e12
    assert device_peak("NVIDIA H100 80GB HBM3", torch.float32, tf32=True) == 989.4e12 / 2
    assert device_peak("NVIDIA H100 80GB HBM3", torch.float32) is None
    assert device_peak("NVIDIA GeForce GTX 1080", torch.bfloat16) is None
    assert format_flop(205.6e15) == "205.6 PFLOP"


# ---------------------------------------------------------------------------------------------------------------- scaling
PHASES = {"rollout": 40.0, "reference": 40.0, "update": 120.0, "checkpoint": 3.0}
GB = 1e9


def predict(gpus: int, stage: int, **options) -> float:
    return predict_epoch(PHASES, gpus, stage, 1_000_000_000, 2, 10 * GB, **options).communication


def test_one_gpu_is_what_was_measured() -> None:
    for stage in range(4):
        prediction = predict_epoch(PHASES, 1, stage, 10**9, 2, 10 * GB, micro_batches=100)
        assert prediction.seconds == 203.0 and prediction.communication == 0


def test_compute_is_divided_except_what_every_rank_does() -> None:
    assert predict_epoch(PHASES, 4, 0, 10**9, 2, 10 * GB).compute == 200 / 4 + 3


def test_communication_by_stage() -> None:
    """2 GB of weights over 10 GB/s: a whole copy takes 0.2 s, and a ring of 4 moves 3/4 of it per collective."""
    one = 0.2 * 3 / 4
    assert predict(4, 0) == pytest.approx(2 * one)  # all-reduce: 2 (n-1)/n
    assert predict(4, 1, micro_batches=400) == pytest.approx((2 + 1) * one)  # and the new weights all-gathered
    # 400 micro-batches on one GPU are 100 on each of four.
    assert predict(4, 2, micro_batches=400) == pytest.approx((2 * 100 + 1) * one)
    assert predict(4, 2, micro_batches=400, coalesced=True) == pytest.approx((2 + 1) * one)
    # At stage 3 these 10^9 parameters stay from a forward to its backward; of twice as many, half are gathered again.
    assert predict(4, 3, micro_batches=400) == pytest.approx((100 + 100 + 1) * one)
    assert predict(4, 3, micro_batches=400, max_live=0) == pytest.approx((100 + 200 + 1) * one)
    assert predict(4, 3, micro_batches=400, max_live=5 * 10**8) == pytest.approx((100 + 150 + 1) * one)
    assert predict(4, 3, micro_batches=400, coalesced=True) == pytest.approx((1 + 100 + 1) * one)
    # K = 2: everything twice, one pass (1) of 100 forwards, one gather for the rollout.
    assert predict(4, 3, micro_batches=400, updates=2) == pytest.approx((2 * 200 + 100 + 1) * one)
    assert predict(4, 0, gradient_bytes=4) == pytest.approx(4 * one)
    assert predict(4, 0, overlap=0.5) == pytest.approx(one)
