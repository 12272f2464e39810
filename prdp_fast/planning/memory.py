"""What a rank has to hold, in bytes, before and while it holds it.

The plan adds up what is known from sizes; activations are measured, on CUDA by the allocator, elsewhere on fake tensors that are
never allocated.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prdp_fast.config.deepspeed import DeepSpeedConfig
from prdp_fast.config.recipe import Settings
from prdp_fast.core import cgroups
from prdp_fast.core.format import format_bytes
from prdp_fast.models.families import Family

Place = Literal["device", "host"]
When = Literal["always", "start", "rollout", "update"]  # start: until the optimizer has its masters
MOMENTS: tuple[When, ...] = ("start", "rollout", "update")
T = TypeVar("T")

FLOAT32 = 4
BUCKET = 500_000_000  # elements: DeepSpeed's default reduce_bucket_size, allocated whole whatever the model's size
LIVE = 1_000_000_000  # parameters: DeepSpeed's default stage3_max_live_parameters
# Of the free memory, what the plan may fill: allocators cut it into pieces, and cuDNN and cuBLAS take workspaces of their own.
USABLE = 0.9


class _LiveBytes(TorchDispatchMode):
    """Bytes of the tensors made inside the block that are alive, and the most there were at once."""

    def __init__(self, known: nn.Module) -> None:
        super().__init__()
        self.live = self.peak = 0
        tensors = [*known.parameters(), *known.buffers(), *(p.grad for p in known.parameters() if p.grad is not None)]
        self._seen = {id(tensor.untyped_storage()) for tensor in tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if id(storage) not in self._seen:
                    self._seen.add(id(storage))
                    self.live += storage.nbytes()
                    self.peak = max(self.peak, self.live)
                    weakref.finalize(storage, self._free, id(storage), storage.nbytes())
        return result

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


def peak_bytes(function: Callable[[], Any], module: nn.Module) -> int:
    """The most bytes `function` held at once beyond what was there, on the module's device.

    On CUDA the allocator's own account; elsewhere every tensor an operator made, real or fake, without operators' workspaces.
    """
    device = next(module.parameters()).device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    with _LiveBytes(module) as live:
        function()
    return live.peak


@dataclass(frozen=True)
class Activations:
    """What one denoiser call holds beyond weights and gradients: fixed + rows * per row."""

    per_row: int
    fixed: int = 0
    forward_per_row: int = 0  # of a call without gradients
    forward_fixed: int = 0

    def training(self, rows: int) -> int:
        return self.fixed + rows * self.per_row

    def sampling(self, rows: int) -> int:
        return self.forward_fixed + rows * self.forward_per_row


def forward_backward(denoiser: nn.Module, shapes: Family, rows: int, dtype: torch.dtype) -> None:
    """One training call on zeros. Gradients are there before, as they are for all but the first micro-batch of an update."""
    inputs = shapes.denoiser_inputs(rows, next(denoiser.parameters()).device, dtype)
    denoiser(**inputs)[0].float().square().mean().backward()


def measure_activations(denoiser: nn.Module, shapes: Family, dtype: torch.dtype) -> Activations:
    """From calls of one row and of two. Fills the gradients of `denoiser`.

    Args:
        denoiser: trainable, in `dtype`, on the device to measure on; or fake.
    """
    for parameter in denoiser.parameters():
        if parameter.grad is None and parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    device = next(denoiser.parameters()).device

    def forward(rows: int) -> None:
        with torch.no_grad():
            denoiser(**shapes.denoiser_inputs(rows, device, dtype))

    def train(rows: int) -> None:
        forward_backward(denoiser, shapes, rows, dtype)

    if device.type == "cuda":
        train(1)  # libraries choose their algorithms and take their workspaces at the first call
    one, two = (peak_bytes(lambda rows=rows: train(rows), denoiser) for rows in (1, 2))  # type: ignore[misc]
    one_free, two_free = (peak_bytes(lambda rows=rows: forward(rows), denoiser) for rows in (1, 2))  # type: ignore[misc]
    return Activations(two - one, max(0, 2 * one - two), two_free - one_free, max(0, 2 * one_free - two_free))


def fake_activations(shapes: Family, dtype: torch.dtype, *, checkpointing: bool = False) -> Activations:
    """The same without memory, weights or a device: fake tensors of a CPU."""
    with shapes.fake_denoiser(dtype) as denoiser:
        denoiser.train()
        if checkpointing:
            denoiser.enable_gradient_checkpointing()
        return measure_activations(denoiser, shapes, dtype)


@dataclass(frozen=True)
class Item:
    name: str
    size: int  # bytes, on one rank
    place: Place = "device"
    when: When = "always"


@dataclass(frozen=True)
class Footprint:
    """What of a job decides over its memory."""

    denoiser_parameters: int  # an adapter's included
    frozen_parameters: int  # VAE, and text encoder unless its embeddings are stored
    dtype: torch.dtype
    stage: int
    world_size: int
    rows: int  # trajectories of this rank
    steps: int  # T
    latent_shape: tuple[int, int, int]
    needs_reference: bool
    activations: Activations
    micro_batch: int  # rows of one backward
    evaluations: int  # denoiser rows of one row: 2 with guidance
    rollout_batch: int = 64
    coalesced: bool = False
    offload_optimizer: bool = False
    offload_param: bool = False
    reduce_bucket: int = BUCKET
    double_bucket: bool = False
    max_live: int = LIVE
    adapter_parameters: int | None = None  # what is trained of the denoiser; None: all of it
    averaged: bool = False  # a moving average of what is trained
    on_cpu: bool = False  # the device is the host
    denoiser_buffers: int = 0  # numbers beside the weights, which no stage divides
    async_save: bool = False  # what a checkpoint consists of is copied, see `choose_async_save`

    @property
    def trained_parameters(self) -> int:
        return self.denoiser_parameters if self.adapter_parameters is None else self.adapter_parameters

    @classmethod
    def of(
        cls, settings: Settings, config: DeepSpeedConfig, shapes: Family, activations: Activations, micro_batch: int, *,
        world_size: int, needs_reference: bool, cuda: bool,
    ) -> Footprint:  # fmt: skip
        schedule, zero = settings.schedule, config.values["zero_optimization"]
        bucket = int(zero.get("reduce_bucket_size", BUCKET))
        return cls(
            denoiser_parameters=shapes.denoiser_parameters,
            frozen_parameters=shapes.vae_parameters + (0 if settings.prompts.stored_embeddings else shapes.text_parameters),
            dtype=config.dtype,
            stage=config.stage,
            world_size=world_size,
            rows=schedule.prompts_per_epoch * schedule.images_per_prompt // world_size,
            steps=settings.sampler.num_inference_steps,
            latent_shape=shapes.latent_shape,
            needs_reference=needs_reference,
            activations=activations,
            micro_batch=micro_batch,
            evaluations=1 if settings.sampler.guidance_scale is None else 2,
            rollout_batch=settings.sampler.rollout_batch,
            coalesced=config.coalesces(settings.performance.coalesce_gradients),
            offload_optimizer=config.offloads_optimizer,
            offload_param=zero.get("offload_param", {}).get("device", "none") != "none",
            # A CPU gives memory when it is written to, and no more is ever written than there are gradients.
            reduce_bucket=bucket if cuda else min(bucket, shapes.trained_parameters),
            double_bucket=bool(zero.get("overlap_comm", False)) and config.stage < 3,
            max_live=int(zero.get("stage3_max_live_parameters", LIVE)),
            adapter_parameters=None if shapes.lora is None else shapes.trained_parameters,
            averaged=settings.model.ema_decay is not None,
            on_cpu=not cuda,
            denoiser_buffers=shapes.denoiser_buffers,
            async_save=settings.checkpoint.async_save == "on",
        )


@dataclass(frozen=True)
class MemoryPlan:
    items: tuple[Item, ...]

    def total(self, place: Place = "device", when: When | None = None) -> int:
        """Bytes at the worst moment, or of the items of one moment."""
        if when is not None:
            return sum(item.size for item in self.items if item.place == place and item.when == when)
        return self.total(place, "always") + max(self.total(place, moment) for moment in MOMENTS)

    def fits(self, available: float, host: float | None = None, *, usable: float = USABLE) -> bool:
        """Whether the worst moment leaves a margin of 1 - `usable` of the free bytes."""
        return self.total() <= usable * available and (host is None or self.total("host") <= usable * host)

    def table(self) -> str:
        """A small block of lines, largest first; what is 0 is left out."""
        lines = []
        for item in sorted(self.items, key=lambda item: -item.size):
            if item.size:
                note = ", ".join(word for word in (item.place, item.when) if word not in ("device", "always"))
                lines.append(f"  {item.name:<34} {format_bytes(item.size):>10}" + (f"  ({note})" if note else ""))
        lines.append(f"  {'at the worst moment':<34} {format_bytes(self.total()):>10}")
        if self.total("host"):
            lines.append(f"  {'and on the host':<34} {format_bytes(self.total('host')):>10}")
        return "\n".join(["memory of one rank, planned:", *lines])


def plan_memory(job: Footprint) -> MemoryPlan:
    """Add it up. Where DeepSpeed keeps what is read from its optimizers (0.19.8), stage by stage."""
    count, trained, ranks, stage = job.denoiser_parameters, job.trained_parameters, job.world_size, job.stage
    width = job.dtype.itemsize
    bf16_optimizer = stage == 1 and job.dtype == torch.bfloat16  # DeepSpeed has one of its own for this
    share = -(-trained // ranks)  # of what is divided among the ranks
    host: Place = "device" if job.on_cpu else "host"
    optimizer_place: Place = host if job.offload_optimizer else "device"

    # Weights: whole on each rank, except at stage 3. Stages 1 to 3 train a float32 copy of the rank's share, also in float32.
    held = -(-count // ranks) if stage == 3 else count
    items = [Item("weights", held * width, host if job.offload_param and stage == 3 else "device")]
    if stage > 0:
        items.append(Item("master weights", share * FLOAT32, optimizer_place))
    if width != FLOAT32:
        # DeepSpeed rounds the weights before it makes the masters, so every rank keeps what was loaded until they are made.
        items.append(Item("copy of the weights as loaded", trained * FLOAT32, host, "start"))
    stepped = share if stage > 0 else trained
    items.append(Item("optimizer state", 2 * stepped * FLOAT32, optimizer_place))
    if job.averaged:
        items.append(Item("average of the weights", stepped * FLOAT32, optimizer_place))

    # Gradients. Micro-batches add up in float32.
    if stage == 0:
        items.append(Item("gradients", trained * FLOAT32, when="update"))
    elif job.coalesced:
        # All of them locally, then this rank's share of the sum.
        items.append(Item("gradients", trained * width, when="update"))
        items.append(Item("gradients, own share", share * FLOAT32, optimizer_place, "update"))
    elif stage == 1:
        # The bf16 optimizer keeps whole float32 sums for good; others have them in the update.
        items.append(Item("gradients, summed", trained * FLOAT32, when="always" if bf16_optimizer else "update"))
        if width != FLOAT32:
            items.append(Item("gradients, of a micro-batch", trained * width, when="update"))
    else:
        items.append(Item("gradients, own share", share * FLOAT32, optimizer_place, "always" if stage == 3 else "update"))
    if stage > 0 and not bf16_optimizer:
        buffers = (2 if job.double_bucket else 1) * job.reduce_bucket * width
        items.append(Item("gradient reduction buffer", buffers, when="always" if stage == 3 else "update"))

    if job.needs_reference and job.adapter_parameters is None:  # with an adapter it is the denoiser with that off
        items.append(Item("reference weights", (count + job.denoiser_buffers) * width))
    if job.denoiser_buffers:
        items.append(Item("tables beside the weights", job.denoiser_buffers * width))
    if stage == 3:
        items.append(Item("weights gathered for the rollout", (count + job.denoiser_buffers) * width, when="rollout"))
        items.append(Item("weights gathered in the update", min(count, job.max_live) * width, when="update"))
    latent = job.latent_shape[0] * job.latent_shape[1] * job.latent_shape[2]
    items.append(Item("trajectories", job.rows * (job.steps + 1) * latent * FLOAT32))
    items.append(Item("VAE and text encoder", job.frozen_parameters * width))
    items.append(Item("activations", job.activations.training(job.micro_batch * job.evaluations), when="update"))
    sampled = min(job.rollout_batch, job.rows) * job.evaluations
    items.append(Item("activations of the rollout", job.activations.sampling(sampled), when="rollout"))
    if job.async_save:
        items.append(copy_of_checkpoint(job))
    return MemoryPlan(tuple(items))


def copy_of_checkpoint(job: Footprint) -> Item:
    """What rank 0 writes of a checkpoint, more than any other rank. Once made, the room for it stays."""
    stage, trained = job.stage, job.trained_parameters
    stepped = -(-trained // job.world_size) if stage > 0 else trained
    weights = (trained if stage < 3 else 0) + job.denoiser_buffers
    masters = 1 if stage > 0 else 0
    size = weights * job.dtype.itemsize + (2 + masters + job.averaged) * stepped * FLOAT32
    return Item("copy that a checkpoint is written of", size, "device" if job.on_cpu else "host")


def choose_async_save(
    wanted: str, plan: MemoryPlan, job: Footprint, available: float, host: float, *, agree: Callable[[bool], bool]
) -> tuple[bool, MemoryPlan]:
    """Whether checkpoints are written while training goes on.

    Args:
        wanted: the recipe's `checkpoint.async_save`; auto: where there is room for the copy.
        plan: of `job`.
        available, host: free bytes of the device, and of the host, for this rank.
        agree: whether it is true on all ranks.
    Returns: it, and the plan with the copy if there is one.
    """
    if wanted != "auto":
        return wanted == "on", plan
    with_copy = MemoryPlan((*plan.items, copy_of_checkpoint(job)))
    return (True, with_copy) if agree(with_copy.fits(available, host)) else (False, plan)


def free_bytes(device: torch.device, local_ranks: int = 1) -> int:
    """What this rank may fill: of a GPU what is free and what it holds already, of a CPU its part of what is available, to this
    machine and within the limits of its control groups."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    try:
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":") for line in file)
        available = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):  # no Linux
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    room = cgroups.memory_room()
    return min(available, available if room is None else room) // local_ranks
