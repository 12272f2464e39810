"""The one door to DeepSpeed: the trained denoiser, whichever way its weights, gradients and optimizer are sharded."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import os
import pickle
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed finds it by itself too, with a warning

import deepspeed
import torch.distributed as dist
from deepspeed.ops import __compatible_ops__
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils import groups, safe_get_full_fp32_param, safe_set_full_fp32_param, safe_set_local_fp32_param
from deepspeed.utils.tensor_fragment import fragment_address
from pydantic import ValidationError
from torch import nn

from prdp_fast.config.deepspeed import DeepSpeedConfig
from prdp_fast.config.recipe import OptimizerSettings
from prdp_fast.core import distributed
from prdp_fast.core.errors import OneRankError, UserError, brief
from prdp_fast.models.ema import Average, write_averages
from prdp_fast.models.lora import adapter_off, has_adapter, trained_parameters
from prdp_fast.training.host_copy import HostCopies
from prdp_fast.training.reshard import OwnShards
from prdp_fast.training.shards import ZERO, NotDataError, Shards, average_name

# DeepSpeed calls collectives by names that torch 2.13 has replaced, and every rank would say so in every run.
warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)

FP16_HEADROOM = 4096.0  # fp16 gradients start with the largest weight at 2**12 and halve on overflow, like any loss scale
FP16_PATIENCE = 200  # updates without overflow before the headroom doubles again


@dataclass(frozen=True)
class StepResult:
    grad_norm: float  # of the true gradient, before clipping; inf if it was not finite
    applied: bool  # False: the gradient was not finite and the weights are as they were


def join_process_group() -> None:
    """Let DeepSpeed use the process group that `core.distributed.init` made."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it
    # A shared-memory all-reduce for inference on CPUs, which training never calls: it is compiled at the first start, where a
    # killed job leaves a lock that the next one waits for without end, and every rank leaves 64 MiB in /dev/shm.
    __compatible_ops__["deepspeed_shm_comm"] = False
    groups._WORLD_GROUP = None  # of a job that ran in this process before
    deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)


def set_master(parameter: nn.Parameter, value: torch.Tensor) -> None:
    """Write this rank's share of a parameter's float32 master weights. No communication; the 16-bit weights stay as they are.

    Args: value: the whole parameter, float32.
    """
    if not hasattr(parameter, "ds_tensor"):  # stages 1 and 2
        safe_set_full_fp32_param(parameter, value)
        return
    size = parameter.ds_tensor.numel()  # the last rank's is filled up with zeros
    own = value.flatten()[dist.get_rank() * size :][:size]
    safe_set_local_fp32_param(parameter, nn.functional.pad(own, (0, size - own.numel())))


# What a rank does with a file of a checkpoint: `write(content, path)` writes it.
Put = Callable[[Callable[[Any, Path], None], Any, Path], None]


@contextlib.contextmanager
def putting(engine: Any, put: Put) -> Iterator[list[str]]:
    """Around DeepSpeed's `save_checkpoint`: each file of this rank is given to `put`. Yields what went wrong.

    DeepSpeed waits for the other ranks between its files. An error that left it there would leave them waiting, so what errors
    say is kept until it has returned. The errors themselves are not: they would hold the file open, and with it its room on a
    full disk.
    """
    faults: list[str] = []

    def keeping(do: Callable[..., Any]) -> Callable[..., None]:
        def call(*args: Any, **kwargs: Any) -> None:
            try:
                if not faults:
                    do(*args, **kwargs)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # of the disk, and what torch says of it
                faults.append(brief(error))

        return call

    files = engine.checkpoint_engine
    write = files.save
    files.save = keeping(lambda state_dict, path: put(write, state_dict, Path(path)))
    engine._copy_recovery_script = keeping(engine._copy_recovery_script)
    try:
        yield faults
    finally:
        del files.save, engine._copy_recovery_script


@contextlib.contextmanager
def data_only() -> Iterator[None]:
    """Inside, `torch.load` makes tensors, plain values and what DeepSpeed puts beside them, whatever its caller asks for.

    DeepSpeed asks for everything that a pickle can do, and a pickle can run any program.
    """
    load = torch.load

    def load_data(file: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return load(file, *args, **kwargs | {"weights_only": True})
        except pickle.UnpicklingError as error:
            raise NotDataError.of(file, error) from error

    torch.load = load_data
    try:
        with torch.serialization.safe_globals([LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]):
            yield
    finally:
        torch.load = load


class ZeroEngine:
    """A trained denoiser, whichever way DeepSpeed shards it.

    Gradients: every `backward` adds a plain sum, gradients are averaged over ranks, and the sum of an update is clipped once.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        settings: OptimizerSettings,
        config: DeepSpeedConfig,
        device: torch.device,
        coalesce_gradients: str = "auto",
        fused_optimizer: bool = False,
        ema_decay: float | None = None,
    ) -> None:
        self.config, self.device, self.dtype = config, device, config.dtype
        self.learning_rate, self.warmup_updates = settings.learning_rate, settings.warmup_updates
        self.max_grad_norm = settings.max_grad_norm
        self.updates = 0
        self.scale = 1.0
        self.fp16_headroom, self.fp16_clean = FP16_HEADROOM, 0
        self.copies = HostCopies(device)
        self.resharded: str | None = None  # what wrote the checkpoint that was loaded, if its shards lay otherwise than ours

        # At stage 3 the weights are gathered once per rollout into this copy, not layer by layer at every step.
        self.gathered = copy.deepcopy(denoiser).to(self.dtype).requires_grad_(False).eval() if config.stage == 3 else None
        # What a rollout calls in place of the denoiser whose weights it samples with: the same, cheaper.
        self.sampling_view: Callable[[nn.Module], Any] = lambda denoiser: denoiser
        self.trained = trained_parameters(denoiser)
        self.has_adapter = has_adapter(denoiser)
        for parameter in self.trained:
            parameter.requires_grad_(True)
        denoiser.train()
        values = copy.deepcopy(config.values)
        optimizer_class: type[torch.optim.Optimizer] = torch.optim.AdamW
        extra = {"fused": True} if fused_optimizer else {}
        if config.offloads_optimizer and device.type == "cuda":
            optimizer_class, extra = deepspeed.ops.adam.DeepSpeedCPUAdam, {}  # fused by itself
        elif config.offloads_optimizer:  # without an accelerator the plain optimizer is already on the CPU, and needs no compiler
            values["zero_force_ds_cpu_optimizer"] = False
        optimizer = optimizer_class(
            self.trained,
            lr=settings.learning_rate,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            **extra,
        )
        # DeepSpeed casts the weights and then makes the master weights of what is left of them.
        loaded = [] if self.dtype == torch.float32 else [value.detach().to("cpu", copy=True) for value in self.trained]
        kept = set(denoiser.state_dict())
        # Tables that are no weights, as they were loaded: they are cast below.
        self.buffers = {
            name: buffer.detach().to("cpu", copy=self.dtype != torch.float32)
            for name, buffer in denoiser.named_buffers() if name in kept
        }  # fmt: skip
        join_process_group()
        try:
            self.engine, *_ = deepspeed.initialize(model=denoiser, optimizer=optimizer, config=values)
        except ValidationError as error:  # of sections that are DeepSpeed's alone
            problem = error.errors()[0]
            place = ".".join(map(str, problem["loc"]))
            raise UserError(
                f"config {config.path.name}: DeepSpeed refuses {place} = {problem['input']!r} of {error.title}: "
                f"{problem['msg']}; correct it, or remove it"
            ) from None
        for buffer in self.engine.module.buffers():  # DeepSpeed leaves them; the reference and other copies have them cast
            if buffer.is_floating_point():
                buffer.data = buffer.data.to(self.dtype)
        for parameter in self.trained if loaded else ():
            set_master(parameter, loaded.pop(0))
        self.coalesce = config.coalesces(coalesce_gradients)
        # Of what the optimizer steps: this rank's share of the master weights, at stage 0 the weights themselves.
        assert ema_decay is None or config.stage < 3, "stage 3 moves its master weights about"
        masters = (master for group in optimizer.param_groups for master in group["params"])
        self.average = None if ema_decay is None else Average(masters, ema_decay)

    @property
    def rank(self) -> int:
        return dist.get_rank()

    @property
    def world_size(self) -> int:
        return dist.get_world_size()

    @property
    def denoiser(self) -> nn.Module:
        """The module of the training path: call it for log-probs that are differentiated, or compared with such."""
        return self.engine

    @contextlib.contextmanager
    def sampling_denoiser(self) -> Iterator[Any]:
        """The current weights, called as the denoiser is, for inference. No communication inside the block."""
        with self.whole_denoiser() as denoiser:
            yield self.sampling_view(denoiser)

    @contextlib.contextmanager
    def whole_denoiser(self) -> Iterator[nn.Module]:
        """The denoiser itself with the current weights. No communication inside the block."""
        if self.gathered is None:
            yield self.engine.module
            return
        self.gathered.to(self.device)
        with torch.no_grad():
            for full, sharded in zip(self.gathered.parameters(), self.engine.module.parameters(), strict=True):
                if sharded.requires_grad:  # the others are as they were copied
                    with deepspeed.zero.GatheredParameters([sharded]):
                        full.copy_(sharded)
        yield self.gathered
        if self.device.type == "cuda":
            self.gathered.to("cpu")  # the update needs the room

    @contextlib.contextmanager
    def base_denoiser(self) -> Iterator[nn.Module]:
        """The denoiser without its adapter, which is what an adapter's run has for a reference."""
        with self.whole_denoiser() as denoiser, adapter_off(denoiser):
            yield denoiser

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the weights are their moving average, if one is kept. Not in an update; every rank enters and leaves."""
        if self.average is None:
            yield
            return
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        assert self.average is not None
        self.average.swap()
        if self.config.stage > 0:
            self.engine.optimizer.update_lp_params()  # what the denoiser computes with, from the master weights

    # At beta 1e-5 the weights of the log-probs are 1e4 and more. A power of two brings them to about 1 for the backward pass,
    # where fp16 would overflow, and is undone before clipping; both are exact.
    def set_scale(self, max_weight: float) -> None:
        """Choose the loss scale of the next update from max |dloss/dlog_prob| over all ranks."""
        exponent = math.frexp(max_weight)[1] if 0 < max_weight < math.inf else 0
        self.scale = math.ldexp(self.fp16_headroom if self.dtype == torch.float16 else 1.0, -max(-120, min(120, exponent)))
        if self._optimizer_unscales:
            self.engine.optimizer.override_loss_scale(self.scale)
        elif self.dtype != torch.float32:
            self.scale = 1.0  # the bf16 optimizer of stage 1 has no scale, and bf16 has float32's range

    @property
    def _optimizer_unscales(self) -> bool:
        return hasattr(self.engine.optimizer, "override_loss_scale")

    @property
    def passes_are_local(self) -> bool:
        """Whether no rank waits for another inside a forward or backward: `accumulating` reduces gradients on leaving.

        Not at stage 3, where every layer gathers its weights, nor at stage 2 where each backward scatters its gradients.
        """
        return self.config.stage < 2 or (self.config.stage == 2 and self.coalesce)

    @contextlib.contextmanager
    def accumulating(self) -> Iterator[None]:
        """Around the backward passes of one update. With `passes_are_local`, ranks reduce the gradients once, on leaving."""
        if self.coalesce:
            with self.engine.coalesce_grad_reduction():
                yield
        elif self.passes_are_local:  # stages 0 and 1 reduce once in any case, otherwise inside the last backward
            with self.engine.no_sync():
                yield
            self.engine.set_gradient_accumulation_boundary(True)
            self.engine.allreduce_gradients()
        else:
            yield
        self.engine.set_gradient_accumulation_boundary(True)  # `coalesce_grad_reduction` restores "not the last backward"

    def discard_gradients(self) -> None:
        """Forget what an update has added so far, an interrupted backward included. Only with `passes_are_local`."""
        optimizer = self.engine.optimizer
        if hasattr(optimizer, "exit_backward"):
            optimizer.exit_backward()  # which an interrupted backward has not reached; otherwise it does nothing
        optimizer.zero_grad()

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Add the gradient of `loss`; `last` marks the update's final micro-batch, where ranks average, if not on leaving."""
        self.engine.set_gradient_accumulation_boundary(last and not self.passes_are_local)
        self.engine.backward(loss if self._optimizer_unscales else loss * self.scale, scale_wrt_gas=False)

    def step(self) -> StepResult:
        """Clip, take an optimizer step, and clear the gradients."""
        warmup = min(1.0, (self.updates + 1) / self.warmup_updates) if self.warmup_updates else 1.0
        for group in self.engine.optimizer.param_groups:
            group["lr"] = self.learning_rate * warmup
        if self.config.stage == 0:
            result = self._plain_step()
        else:
            self.engine.step()
            norm = float(self.engine.get_global_grad_norm())
            result = StepResult(norm, applied=math.isfinite(norm) and not getattr(self.engine.optimizer, "overflow", False))
        self.updates += result.applied
        if self.average is not None and result.applied:
            self.average.update(self.updates)
        self._adapt_headroom(result.applied)
        return result

    def _plain_step(self) -> StepResult:
        """Stage 0: the gradients lie on the parameters, so scale and finiteness are ours to mind."""
        gradients = [p.grad for p in self.engine.module.parameters() if p.grad is not None]
        for gradient in gradients:
            gradient /= self.scale
        norm = float(nn.utils.get_total_norm(gradients))
        if not math.isfinite(norm):
            self.engine.optimizer.zero_grad()
            return StepResult(math.inf, applied=False)
        self.engine.step()
        return StepResult(norm, applied=True)

    def _adapt_headroom(self, applied: bool) -> None:
        self.fp16_clean = self.fp16_clean + 1 if applied else 0
        if not applied:
            self.fp16_headroom = max(self.fp16_headroom / 2, 2.0**-24)
        elif self.fp16_clean % FP16_PATIENCE == 0:
            self.fp16_headroom = min(self.fp16_headroom * 2, 2.0**24)

    def full_state_dict(self) -> dict[str, torch.Tensor]:
        """The trained weights (an adapter's, or all) in float32 on the CPU, from the master copy; every rank must call it."""
        state = {}
        for name, parameter in self.engine.module.named_parameters():
            if not parameter.requires_grad:
                continue
            full = safe_get_full_fp32_param(parameter)
            if full is None:  # stage 0 keeps no master copy: the parameter is it
                full = parameter.detach()
            state[name] = full.detach().to("cpu", torch.float32, copy=True)
        if not self.has_adapter:
            state |= self.buffers
        return state

    def save(self, directory: Path) -> list[Path]:
        """Trained weights and optimizer, every rank its shard, into `directory`.

        Returns: the files that this rank has written.
        Raises: OSError if one cannot be written, after the last collective; other ranks may not know. OneRankError before it.
        """
        written = []

        def put(write: Callable[[Any, Path], None], content: Any, path: Path) -> None:
            write(content, path)
            written.append(path)

        self._put_files(directory, put)
        return written

    def copy(self, directory: Path) -> Callable[[], list[Path]]:
        """The same in two steps: copies to host memory now, and what writes them from any thread and returns the files.

        A later call takes the copies' room, so what is returned has to be done by then. Raises: as `save`.
        """
        writes: list[tuple[Callable[[Any, Path], None], Any, Path]] = []
        self.copies.begin()
        self._put_files(directory, lambda write, content, path: writes.append((write, self.copies.take(content), path)))
        self.copies.finish()

        def write_all() -> list[Path]:
            for write, content, path in writes:
                write(content, path)
            return [path for _, _, path in writes]

        return write_all

    def _put_files(self, directory: Path, put: Put) -> None:
        """Every file of a checkpoint that is this rank's to write. Every rank calls this. Raises: as `save`."""
        own = {"updates": self.updates, "fp16_headroom": self.fp16_headroom, "fp16_clean": self.fp16_clean}
        with putting(self.engine, put) as faults:
            try:
                self.engine.save_checkpoint(
                    str(directory), tag=ZERO, client_state={"prdp": own}, save_latest=False,
                    exclude_frozen_parameters=self.has_adapter,
                )  # fmt: skip
            except (UserError, torch.OutOfMemoryError):
                raise
            except Exception as error:  # between two collectives, or of one
                raise OneRankError(
                    f"checkpoint {directory} cannot be gathered on rank {self.rank} ({brief(error)}); give the same command: it "
                    "goes on from the checkpoint before"
                ) from error
        if faults:
            raise OSError(faults[0])
        if self.average is not None:
            put(write_averages, self.average.averages, directory / average_name(self.rank))

    def load(self, directory: Path) -> None:
        """Go on from a checkpoint: bit for bit where this job's shards are laid out as its own, else resharded.

        Every rank calls this. `resharded` says afterwards what wrote it, if that was another number of ranks, or another stage.

        Raises: UserError if the checkpoint is of another job, NotDataError; ValueError and others if its files are damaged.
        """
        shards, own = Shards(directory), self._own_shards()
        integers = isinstance(own.adamw, deepspeed.ops.adam.DeepSpeedCPUAdam)  # which counts its steps so
        alike = (shards.ranks, shards.stage) == (self.world_size, self.config.stage)
        if alike and not shards.on_nvme:
            same_steps = shards.step is None or shards.counts_in_integers == integers
            alike = distributed.all_reduce([float(same_steps and shards.layout(self.rank) == own.layout)], "min")[0] > 0
        if alike:
            self._load_own(directory)
        elif shards.on_nvme or "nvme" in self.config.offloads:
            raise UserError(
                f"checkpoint {directory}, of {shards}, would have to be resharded for {self.world_size} at stage "
                f"{self.config.stage}, and what is offloaded to NVMe cannot be; resume with the ranks and --config of the run"
            )
        else:
            own.fill(shards, self.average, count_in_integers=integers)
        self.resharded = None if alike else str(shards)
        for name, value in shards.client.items():
            setattr(self, name, value)

    def _own_shards(self) -> OwnShards:
        trained = {name: value for name, value in self.engine.module.named_parameters() if value.requires_grad}
        return OwnShards(self.engine, self.config.stage, self.rank, trained)

    def _load_own(self, directory: Path) -> None:
        """What was written on these ranks at this stage."""
        with data_only():
            loaded, _ = self.engine.load_checkpoint(str(directory), tag=ZERO, load_module_strict=not self.has_adapter)
        if loaded is None:
            raise UserError(f"checkpoint {directory} has no weights that DeepSpeed reads; remove it to go on from the one before")
        if self.average is not None:
            self.average.load(directory / average_name(self.rank))
