"""The memory plan adds up, what it measures is what is there, and running out of memory changes no gradient."""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import replace

import pytest
import torch
from plain_engine import PlainEngine, run
from small_model import SHAPE, small_policy, small_trajectories, small_unet

from prdp_fast.core.errors import OneRankError, UserError
from prdp_fast.core.format import format_bytes
from prdp_fast.models.families import StableDiffusion
from prdp_fast.planning.memory import (
    Activations,
    Footprint,
    Item,
    MemoryPlan,
    choose_async_save,
    copy_of_checkpoint,
    fake_activations,
    forward_backward,
    measure_activations,
    peak_bytes,
    plan_memory,
)
from prdp_fast.planning.micro_batch import choose_micro_batch, fit, halve_on_oom, sizes_up_to
from prdp_fast.training.passes import gradient_pass

SMALL = StableDiffusion(dict(small_unet().config), text_length=6)
P = 859_520_964  # SD v1.4
SD = Footprint(
    denoiser_parameters=P, frozen_parameters=206_000_000, dtype=torch.bfloat16, stage=2, world_size=8, rows=64, steps=50,
    latent_shape=(4, 64, 64), needs_reference=True, activations=Activations(10**9, 10**8, 10**7, 10**6), micro_batch=16,
    evaluations=2, rollout_batch=64, reduce_bucket=500_000_000,
)  # fmt: skip


def sizes(job: Footprint) -> dict[str, tuple[int, str, str]]:
    return {item.name: (item.size, item.place, item.when) for item in plan_memory(job).items}


def test_stage_2_in_bf16_item_by_item() -> None:
    share = -(-P // 8)
    assert sizes(SD) == {
        "weights": (2 * P, "device", "always"),
        "copy of the weights as loaded": (4 * P, "host", "start"),
        "master weights": (4 * share, "device", "always"),
        "optimizer state": (8 * share, "device", "always"),
        "gradients, own share": (4 * share, "device", "update"),
        "gradient reduction buffer": (10**9, "device", "update"),
        "reference weights": (2 * P, "device", "always"),
        "trajectories": (64 * 51 * 4 * 64 * 64 * 4, "device", "always"),  # DESIGN: 3.3 MB a sample
        "VAE and text encoder": (412_000_000, "device", "always"),
        "activations": (10**8 + 32 * 10**9, "device", "update"),
        "activations of the rollout": (10**6 + 128 * 10**7, "device", "rollout"),
    }


def test_stages_divide_what_they_promise() -> None:
    plain = sizes(replace(SD, stage=0, dtype=torch.float32))
    assert plain["weights"][0] == plain["gradients"][0] == 4 * P and plain["optimizer state"][0] == 8 * P
    assert "master weights" not in plain
    first = sizes(replace(SD, stage=1))
    assert first["gradients, summed"] == (4 * P, "device", "always") and first["gradients, of a micro-batch"][0] == 2 * P
    third = sizes(replace(SD, stage=3))
    assert third["weights"][0] == 2 * -(-P // 8)
    assert third["weights gathered for the rollout"] == (2 * P, "device", "rollout")
    coalesced = sizes(replace(SD, dtype=torch.float32, coalesced=True))
    assert coalesced["gradients"][0] == 4 * P and coalesced["gradients, own share"][0] == 4 * -(-P // 8)
    offloaded = plan_memory(replace(SD, stage=3, offload_optimizer=True, offload_param=True))
    on_host = {item.name for item in offloaded.items if item.place == "host" and item.when != "start"}
    assert on_host == {"weights", "master weights", "optimizer state", "gradients, own share"}


def test_the_worst_moment_and_the_margin() -> None:
    plan = MemoryPlan((Item("a", 100), Item("b", 50, when="update"), Item("c", 70, when="rollout"), Item("d", 9, "host")))
    assert plan.total() == 170 and plan.total("host") == 9
    assert plan.fits(170 / 0.9 + 1) and not plan.fits(170 / 0.9 - 1)
    assert not plan.fits(1000, host=9)
    assert replace(plan, items=(*plan.items, Item("e", 90, when="start"))).total() == 190
    assert "c " in plan.table() and "170 B" in plan.table() and "(rollout)" in plan.table()
    assert format_bytes(1536) == "1.5 KiB" and format_bytes(3 * 2**30) == "3.0 GiB"


def test_the_copy_that_masters_start_from_is_counted() -> None:
    """Of what is trained, whole on every rank, beside a 16-bit policy alone; on a CPU it takes the same memory as all else."""
    name = "copy of the weights as loaded"
    assert sizes(replace(SD, stage=3, world_size=64))[name] == (4 * P, "host", "start")
    assert sizes(replace(SD, adapter_parameters=1000))[name] == (4000, "host", "start")
    assert name not in sizes(replace(SD, dtype=torch.float32))
    cpu = replace(SD, on_cpu=True, offload_optimizer=True)
    assert {place for _, place, _ in sizes(cpu).values()} == {"device"} and plan_memory(cpu).total("host") == 0
    small = replace(cpu, activations=Activations(0), rows=1)
    assert plan_memory(small).total() - plan_memory(small).total(when="always") >= 4 * P


def test_the_copy_of_a_checkpoint_by_stage() -> None:
    """Rank 0's: 16-bit weights below stage 3, and its share of float32 weights, moments and average."""
    share, name = -(-P // 8), "copy that a checkpoint is written of"
    assert sizes(replace(SD, async_save=True))[name] == (2 * P + 12 * share, "host", "always") and name not in sizes(SD)
    assert copy_of_checkpoint(replace(SD, averaged=True)).size == 2 * P + 16 * share
    assert copy_of_checkpoint(replace(SD, stage=3)).size == 12 * share
    assert copy_of_checkpoint(replace(SD, stage=0, dtype=torch.float32)).size == 12 * P
    assert copy_of_checkpoint(replace(SD, stage=0, dtype=torch.float32, adapter_parameters=1000)).size == 12_000
    assert copy_of_checkpoint(replace(SD, on_cpu=True)).place == "device"


def test_auto_writes_behind_where_the_copy_has_room() -> None:
    plan, copied = plan_memory(SD), copy_of_checkpoint(SD)
    device, host = plan.total() / 0.9 + 1, (plan.total("host") + copied.size) / 0.9 + 1
    options = {"plan": plan, "job": SD, "available": device, "agree": bool}
    chosen, with_copy = choose_async_save("auto", host=host, **options)
    assert chosen and with_copy.total("host") == plan.total("host") + copied.size and with_copy.total() == plan.total()
    assert choose_async_save("auto", host=host - 2, **options) == (False, plan)
    assert choose_async_save("auto", host=host, **options | {"agree": lambda fits: False}) == (False, plan), "on another rank"
    assert choose_async_save("on", host=0, **options) == (True, plan) and choose_async_save("off", host=host, **options) == (
        False,
        plan,
    )
    cpu = replace(SD, on_cpu=True)
    options |= {"plan": plan_memory(cpu), "job": cpu, "host": 0}
    room = plan_memory(cpu).total() + copied.size
    assert choose_async_save("auto", **options | {"available": room / 0.9 + 1})[0]
    assert not choose_async_save("auto", **options | {"available": room / 0.9 - 1})[0]


# -------------------------------------------------------------------------------------------------------------- measuring
def test_peak_of_known_tensors() -> None:
    module = torch.nn.Linear(1, 1)

    def work() -> None:
        a = torch.zeros(1000)  # 4000 bytes
        b = a + 1  # 8000 alive
        del a
        c = b.view(10, 100)  # a view, nothing new
        c.mul_(2)
        (c * 2).sum()  # 8000 and a scalar

    assert peak_bytes(work, module) == 8004


def test_activations_grow_by_the_row_and_fake_ones_are_real_ones() -> None:
    denoiser = small_unet(0).requires_grad_(True).train()
    real = measure_activations(denoiser, SMALL, torch.float32)
    assert real.per_row > real.forward_per_row > 0
    fake = fake_activations(SMALL, torch.float32)
    assert fake.per_row == pytest.approx(real.per_row, rel=0.1)
    five = peak_bytes(lambda: forward_backward(denoiser, SMALL, 5, torch.float32), denoiser)
    assert real.training(5) == pytest.approx(five, rel=0.05)


def saved_bytes(denoiser: torch.nn.Module, rows: int) -> int:
    """Bytes that autograd keeps between forward and backward: unique storages that are no weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in denoiser.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        denoiser(**SMALL.denoiser_inputs(rows, "cpu"))
    return sum(storage.nbytes() for storage in saved.values())


def test_checkpointing_saves_memory_and_keeps_the_gradient() -> None:
    policy = small_policy()
    trajectories = small_trajectories(policy, small_unet(0))
    weights = torch.randn(trajectories.log_probs.shape, generator=torch.Generator().manual_seed(1))
    gradients, saved, peaks = [], [], []
    for checkpointing in (False, True):
        denoiser = small_unet(0).requires_grad_(True).train()
        if checkpointing:
            denoiser.enable_gradient_checkpointing()
        gradient_pass(policy, denoiser, trajectories, weights, 8, lambda loss, last: loss.backward())
        gradients.append([parameter.grad for parameter in denoiser.parameters()])
        saved.append(saved_bytes(denoiser, 2) - saved_bytes(denoiser, 1))
        peaks.append(measure_activations(denoiser, SMALL, torch.float32).per_row)
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plain, rtol=1e-5, atol=1e-6 * float(plain.abs().max()))
    assert saved[1] < saved[0] / 2
    assert peaks[1] < 0.8 * peaks[0]


# ------------------------------------------------------------------------------------------------------------ micro-batch
def test_sizes_are_multiples_of_eight_or_powers_of_two() -> None:
    assert sizes_up_to(27) == [24, 16, 8, 4, 2, 1]
    assert sizes_up_to(3) == [2, 1]


def test_the_largest_micro_batch_that_fits() -> None:
    job = replace(SD, rollout_batch=1)
    room = plan_memory(replace(job, micro_batch=24)).total() / 0.9 + 1
    assert choose_micro_batch(job, room, most=1000) == 24
    assert choose_micro_batch(job, room, most=20) == 16
    tried = []
    assert choose_micro_batch(job, room, most=1000, trial=lambda size: bool(tried.append(size))) == 8
    assert tried == [24]
    assert choose_micro_batch(job, room, most=1000, agree=lambda size: min(size, 4)) == 4
    with pytest.raises(UserError, match=r"not even one row fits.*activation_checkpointing"):
        choose_micro_batch(job, 10**9, most=1000)
    with pytest.raises(UserError, match="or another"):
        choose_micro_batch(job, room, most=1000, agree=lambda size: 0)


def test_auto_on_a_cpu() -> None:
    denoiser = small_unet(0)
    job = replace(
        SD, denoiser_parameters=SMALL.denoiser_parameters, dtype=torch.float32, latent_shape=SHAPE, reduce_bucket=0, stage=0
    )
    options = {"local_ranks": 1, "agree": lambda size: size}
    size, plan, available = fit(job, denoiser, SMALL, wanted=None, most=1000, **options)
    assert size == 64 and plan.fits(available)
    assert fit(job, denoiser, SMALL, wanted=None, most=40, **options)[0] == 40
    assert fit(job, denoiser, SMALL, wanted=7, most=1000, **options)[0] == 7
    assert all(parameter.grad is None for parameter in denoiser.parameters()), "the real U-Net must be left alone"


# ---------------------------------------------------------------------------------------------------------- out of memory
class Exhausted(PlainEngine):
    """Runs out of memory in the n-th backward, after part of its gradient has been added."""

    def fail_at(self, *numbers: int) -> Exhausted:
        self.failing, self.calls, self.in_block = set(numbers), itertools.count(), False
        return self

    @contextlib.contextmanager
    def accumulating(self):
        self.in_block = True
        yield
        self.in_block = False

    def discard_gradients(self) -> None:
        assert self.in_block, "ranks would have reduced already"
        super().discard_gradients()

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        if next(self.calls) in self.failing:
            list(self.denoiser.parameters())[3].grad.add_(1.0)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        loss.backward()


@pytest.mark.parametrize("moment", [1, 2])
@pytest.mark.parametrize("updates", [1, 2])
def test_out_of_memory_changes_no_gradient(capsys, moment: int, updates: int) -> None:
    policy = small_policy()
    trajectories = small_trajectories(policy, small_unet(0))
    whole = PlainEngine(small_unet(0))
    run(policy, whole, small_unet(1), trajectories, updates, 8)
    short = Exhausted(small_unet(0)).fail_at(moment)
    report = run(policy, short, small_unet(1), trajectories, updates, 8)
    assert report.micro_batch == 4
    printed = capsys.readouterr().out.strip().splitlines()
    assert printed == ["out of memory in the update with schedule.micro_batch 8: going on with 4, the gradient is the same"]
    for got, expected in zip(short.gradients, whole.gradients, strict=True):
        scale = max(float(gradient.abs().max()) for gradient in expected)
        for g, e in zip(got, expected, strict=True):
            assert float((g - e).abs().max()) < 1e-5 * scale


def test_out_of_memory_twice_or_beyond_repair_is_one_clear_line() -> None:
    def exhausted(size: int) -> None:
        raise torch.OutOfMemoryError("no")

    cleared, said = [], []
    options = {"clear": lambda: cleared.append(1), "say": said.append}
    with pytest.raises(UserError, match=r"micro_batch 8, and with 4 after it; set schedule.micro_batch 2 or auto"):
        halve_on_oom(exhausted, 8, any_rank=lambda failed: failed, **options)
    assert len(said) == 1 and len(cleared) == 2
    with pytest.raises(UserError, match="activation_checkpointing"):
        halve_on_oom(exhausted, 1, any_rank=lambda failed: failed, **options)
    with pytest.raises(OneRankError, match=r"set schedule\.micro_batch 4"):
        halve_on_oom(exhausted, 8, any_rank=lambda failed: pytest.fail("a collective"), recoverable=False, **options)


def test_every_rank_goes_again_when_another_ran_out_of_memory() -> None:
    answers, attempts = iter([True, False]), []
    result = halve_on_oom(
        lambda size: attempts.append(size) or size, 8, clear=lambda: None, say=lambda line: None,
        any_rank=lambda failed: next(answers),
    )  # fmt: skip
    assert result == (4, 4) and attempts == [8, 4]
