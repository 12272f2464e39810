"""What a rank has to hold, in bytes, before and while it holds it.

The plan adds up what is known from sizes; activations are measured, on CUDA by the allocator, elsewhere on fake tensors that are
never allocated.
"""

from __future__ import annotations

import copy
import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prdp_fast.errors import OneRankError, UserError
from prdp_fast.models.lora import trained_parameters
from prdp_fast.models.shapes import Shapes
from prdp_fast.settings import Settings

if TYPE_CHECKING:
    from prdp_fast.zero import ZeroConfig

Place = Literal["device", "host"]
When = Literal["always", "rollout", "update"]
T = TypeVar("T")

FLOAT32 = 4
BUCKET = 500_000_000  # elements: DeepSpeed's default reduce_bucket_size, allocated whole whatever the model's size
LIVE = 1_000_000_000  # parameters: DeepSpeed's default stage3_max_live_parameters
# Of the free memory, what the plan may fill: allocators cut it into pieces, and cuDNN and cuBLAS take workspaces of their own.
USABLE = 0.9
CPU_MICRO_BATCH = 64  # rows; on a CPU the embedded model is no faster with 128, and slower with 256


# ------------------------------------------------------------------------------------------------------------- measuring
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
    """What one U-Net call holds beyond weights and gradients: fixed + rows * per row."""

    per_row: int
    fixed: int = 0
    forward_per_row: int = 0  # of a call without gradients
    forward_fixed: int = 0

    def training(self, rows: int) -> int:
        return self.fixed + rows * self.per_row

    def sampling(self, rows: int) -> int:
        return self.forward_fixed + rows * self.forward_per_row


def forward_backward(unet: nn.Module, shapes: Shapes, rows: int, dtype: torch.dtype) -> None:
    """One training call on zeros. Gradients are there before, as they are for all but the first micro-batch of an update."""
    inputs = shapes.unet_inputs(rows, next(unet.parameters()).device, dtype)
    unet(**inputs)[0].float().square().mean().backward()


def measure_activations(unet: nn.Module, shapes: Shapes, dtype: torch.dtype) -> Activations:
    """From calls of one row and of two. Fills the gradients of `unet`.

    Args:
        unet: trainable, in `dtype`, on the device to measure on; or fake.
    """
    for parameter in unet.parameters():
        if parameter.grad is None and parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    device = next(unet.parameters()).device

    def forward(rows: int) -> None:
        with torch.no_grad():
            unet(**shapes.unet_inputs(rows, device, dtype))

    def train(rows: int) -> None:
        forward_backward(unet, shapes, rows, dtype)

    if device.type == "cuda":
        train(1)  # libraries choose their algorithms and take their workspaces at the first call
    one, two = (peak_bytes(lambda rows=rows: train(rows), unet) for rows in (1, 2))  # type: ignore[misc]
    one_free, two_free = (peak_bytes(lambda rows=rows: forward(rows), unet) for rows in (1, 2))  # type: ignore[misc]
    return Activations(two - one, max(0, 2 * one - two), two_free - one_free, max(0, 2 * one_free - two_free))


def fake_activations(shapes: Shapes, dtype: torch.dtype, *, checkpointing: bool = False) -> Activations:
    """The same without memory, weights or a device: fake tensors of a CPU."""
    with shapes.fake_unet(dtype) as unet:
        unet.train()
        if checkpointing:
            unet.enable_gradient_checkpointing()
        return measure_activations(unet, shapes, dtype)


# ------------------------------------------------------------------------------------------------------------------ plan
@dataclass(frozen=True)
class Item:
    name: str
    size: int  # bytes, on one rank
    place: Place = "device"
    when: When = "always"


@dataclass(frozen=True)
class Footprint:
    """What of a job decides over its memory."""

    unet_parameters: int  # an adapter's included
    frozen_parameters: int  # VAE and text encoder
    dtype: torch.dtype
    stage: int
    world_size: int
    rows: int  # trajectories of this rank
    steps: int  # T
    latent_shape: tuple[int, int, int]
    needs_reference: bool
    activations: Activations
    micro_batch: int  # rows of one backward
    evaluations: int  # U-Net rows of one row: 2 with guidance
    rollout_batch: int = 64
    coalesced: bool = False
    offload_optimizer: bool = False
    offload_param: bool = False
    reduce_bucket: int = BUCKET
    double_bucket: bool = False
    max_live: int = LIVE
    adapter_parameters: int | None = None  # what is trained of the U-Net; None: all of it
    averaged: bool = False  # a moving average of what is trained

    @property
    def trained_parameters(self) -> int:
        return self.unet_parameters if self.adapter_parameters is None else self.adapter_parameters

    @classmethod
    def of(
        cls, settings: Settings, config: ZeroConfig, shapes: Shapes, activations: Activations, micro_batch: int, *,
        world_size: int, needs_reference: bool, cuda: bool,
    ) -> Footprint:  # fmt: skip
        schedule, zero = settings.schedule, config.values["zero_optimization"]
        half, wanted = config.dtype != torch.float32, settings.performance.coalesce_gradients
        bucket = int(zero.get("reduce_bucket_size", BUCKET))
        return cls(
            unet_parameters=shapes.unet_parameters,
            frozen_parameters=shapes.vae_parameters + shapes.text_parameters,
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
            coalesced=config.stage > 0 and not half and (wanted == "on" or (wanted == "auto" and config.stage < 3)),
            offload_optimizer=zero.get("offload_optimizer", {}).get("device", "none") != "none",
            offload_param=zero.get("offload_param", {}).get("device", "none") != "none",
            # A CPU gives memory when it is written to, and no more is ever written than there are gradients.
            reduce_bucket=bucket if cuda else min(bucket, shapes.trained_parameters),
            double_bucket=bool(zero.get("overlap_comm", False)) and config.stage < 3,
            max_live=int(zero.get("stage3_max_live_parameters", LIVE)),
            adapter_parameters=None if shapes.lora is None else shapes.trained_parameters,
            averaged=settings.model.ema_decay is not None,
        )


@dataclass(frozen=True)
class MemoryPlan:
    items: tuple[Item, ...]

    def total(self, place: Place = "device", when: When | None = None) -> int:
        """Bytes at the worst moment, or of the items of one moment."""
        if when is not None:
            return sum(item.size for item in self.items if item.place == place and item.when == when)
        return self.total(place, "always") + max(self.total(place, "rollout"), self.total(place, "update"))

    def fits(self, available: float, host: float | None = None, *, usable: float = USABLE) -> bool:
        """Whether the worst moment leaves a margin of 1 - `usable` of the free bytes."""
        return self.total() <= usable * available and (host is None or self.total("host") <= usable * host)

    def table(self) -> str:
        """A small block of lines, largest first; what is 0 is left out."""
        lines = []
        for item in sorted(self.items, key=lambda item: -item.size):
            if item.size:
                note = ", ".join(word for word in (item.place, item.when) if word not in ("device", "always"))
                lines.append(f"  {item.name:<34} {human(item.size):>10}" + (f"  ({note})" if note else ""))
        lines.append(f"  {'at the worst moment':<34} {human(self.total()):>10}")
        if self.total("host"):
            lines.append(f"  {'and on the host':<34} {human(self.total('host')):>10}")
        return "\n".join(["memory of one rank, planned:", *lines])


def human(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def plan_memory(job: Footprint) -> MemoryPlan:
    """Add it up. Where DeepSpeed keeps what is read from its optimizers (0.19.8), stage by stage."""
    count, trained, ranks, stage = job.unet_parameters, job.trained_parameters, job.world_size, job.stage
    width = job.dtype.itemsize
    bf16_optimizer = stage == 1 and job.dtype == torch.bfloat16  # DeepSpeed has one of its own for this
    share = -(-trained // ranks)  # of what is divided among the ranks
    optimizer_place: Place = "host" if job.offload_optimizer else "device"

    # Weights: whole on each rank, except at stage 3. Stages 1 to 3 train a float32 copy of the rank's share, also in float32.
    held = -(-count // ranks) if stage == 3 else count
    items = [Item("weights", held * width, "host" if job.offload_param and stage == 3 else "device")]
    if stage > 0:
        items.append(Item("master weights", share * FLOAT32, optimizer_place))
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

    if job.needs_reference and job.adapter_parameters is None:  # with an adapter it is the U-Net with that off
        items.append(Item("reference weights", count * width))
    if stage == 3:
        items.append(Item("weights gathered for the rollout", count * width, when="rollout"))
        items.append(Item("weights gathered in the update", min(count, job.max_live) * width, when="update"))
    latent = job.latent_shape[0] * job.latent_shape[1] * job.latent_shape[2]
    items.append(Item("trajectories", job.rows * (job.steps + 1) * latent * FLOAT32))
    items.append(Item("VAE and text encoder", job.frozen_parameters * width))
    items.append(Item("activations", job.activations.training(job.micro_batch * job.evaluations), when="update"))
    sampled = min(job.rollout_batch, job.rows) * job.evaluations
    items.append(Item("activations of the rollout", job.activations.sampling(sampled), when="rollout"))
    return MemoryPlan(tuple(items))


# ----------------------------------------------------------------------------------------------------------- micro-batch
def sizes_up_to(most: int) -> list[int]:
    """Micro-batches worth trying, largest first: multiples of 8, then powers of two, which matrix units like."""
    return [*range(most // 8 * 8, 0, -8), *(size for size in (4, 2, 1) if size <= most)]


def choose_micro_batch(
    job: Footprint,
    available: float,
    *,
    most: int,
    trial: Callable[[int], bool] | None = None,
    agree: Callable[[float], float] = lambda size: size,
) -> int:
    """The largest micro-batch that fits.

    Args:
        available: free bytes on the rank's device.
        most: rows that an update has anyway, or the largest size known to be of use.
        trial: tells whether a size really fits; asked once, and the next size (half) is taken on trust.
        agree: the minimum over all ranks.
    Raises: UserError, on every rank, if one row does not fit on some rank.
    """
    size = next((size for size in sizes_up_to(most) if plan_memory(replace(job, micro_batch=size)).fits(available)), 0)
    if trial is not None and size > 1 and not trial(size):
        size = next(smaller for smaller in sizes_up_to(size // 2))
    agreed = int(agree(float(size)))
    if agreed == 0:
        plan = plan_memory(replace(job, micro_batch=1))
        raise UserError(
            f"schedule.micro_batch auto: not even one row fits: {human(plan.total())} planned on a rank with {human(available)} "
            "free, on this rank or another; use a higher ZeRO stage, more ranks, or performance.activation_checkpointing true"
        )
    return agreed


def fit(
    job: Footprint,
    unet: nn.Module,
    shapes: Shapes,
    *,
    wanted: int | None,
    most: int,
    local_ranks: int,
    agree: Callable[[float], float],
) -> tuple[int, MemoryPlan, int]:
    """Measure the activations of the real U-Net, and choose the micro-batch if the recipe leaves it open. Every rank calls it.

    Args:
        job: its activations and micro-batch are filled in here.
        unet: float32, on the rank's device, before DeepSpeed takes it over; left alone.
        wanted: the recipe's micro-batch; None for auto.
        most, agree: as in `choose_micro_batch`.
    Returns: the micro-batch, the plan with it, and the bytes that this rank may fill.
    """
    device = next(unet.parameters()).device
    available = free_bytes(device, local_ranks)
    job, size = _try_out(job, unet, shapes, available, None if wanted else most, agree)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what the copy and its gradients took
    size = wanted or size
    return size, plan_memory(replace(job, micro_batch=size)), available


def _try_out(
    job: Footprint, unet: nn.Module, shapes: Shapes, available: int, most: int | None, agree: Callable[[float], float]
) -> tuple[Footprint, int]:
    """The job with its activations measured on a copy of the U-Net, and, if `most` is given, the micro-batch to take."""
    device = next(unet.parameters()).device
    probe = copy.deepcopy(unet).to(job.dtype).train()
    for parameter in trained_parameters(probe):
        parameter.requires_grad_(True)
    job = replace(job, activations=measure_activations(probe, shapes, job.dtype))

    def trial(size: int) -> bool:
        rows = size * job.evaluations
        try:
            used = peak_bytes(lambda: forward_backward(probe, shapes, rows, job.dtype), probe)
        except torch.OutOfMemoryError:
            return False
        measured = replace(job.activations, per_row=0, fixed=used)
        return plan_memory(replace(job, micro_batch=size, activations=measured)).fits(available)

    if most is None:
        return job, 0
    if device.type == "cuda":
        return job, choose_micro_batch(job, available, most=most, trial=trial, agree=agree)
    return job, choose_micro_batch(job, available, most=min(most, CPU_MICRO_BATCH), agree=agree)


def free_bytes(device: torch.device, local_ranks: int = 1) -> int:
    """What this rank may fill: of a GPU what is free and what it holds already, of a CPU its part of what is available."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    try:
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":") for line in file)
        available = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):  # no Linux
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return available // local_ranks


# ---------------------------------------------------------------------------------------------------------- out of memory
def halve_on_oom(
    attempt: Callable[[int], T],
    size: int,
    *,
    clear: Callable[[], None],
    any_rank: Callable[[bool], bool],
    say: Callable[[str], None],
    recoverable: bool = True,
) -> tuple[T, int]:
    """Run a gradient pass; if a rank runs out of memory, forget what it added and run it again, once, with half the micro-batch.

    A backward that stopped half way has added part of its gradient, and which part is unknown: hence all over again.

    Args:
        attempt: the whole pass at a micro-batch size.
        clear: removes every gradient that the pass has added.
        any_rank: whether it is true on any rank. A collective: every rank calls it after every attempt.
        say: tells the user one line.
        recoverable: False where ranks communicate inside a forward or backward. A rank that stops there leaves the others
            waiting, so that nothing can be agreed upon, and the job has to stop.
    Returns: what `attempt` returned, and the size it ran with.
    Raises: UserError if it cannot be mended, or half is too much as well.
    """
    first = size
    while True:
        result: T | None = None
        failed = False
        try:
            result = attempt(size)
        except torch.OutOfMemoryError:
            failed = True
        # Outside the except clause: the traceback of the exception holds the activations that have to go.
        if failed and not recoverable:
            clear()
            raise OneRankError(out_of_memory(first, size))
        if not any_rank(failed):
            return result, size  # type: ignore[return-value]
        result = None
        clear()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if size < first or size == 1:
            raise UserError(out_of_memory(first, size))
        size = size // 2
        say(f"out of memory in the update with schedule.micro_batch {first}: going on with {size}, the gradient is the same")


def out_of_memory(asked: int, size: int) -> str:
    tried = f"schedule.micro_batch {asked}" + (f", and with {size} after it" if size != asked else "")
    mend = f"set schedule.micro_batch {size // 2} or auto" if size > 1 else "set performance.activation_checkpointing true"
    return f"out of memory in the update with {tried}; {mend}, or use a higher ZeRO stage, and start the job again"
