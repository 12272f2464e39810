"""DeepSpeed behind one file: its JSON resolved against the recipe, its engine wrapped, its collectives named.

Nothing else in the project imports deepspeed.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import math
import os
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
from deepspeed.accelerator import get_accelerator
from deepspeed.ops import __compatible_ops__
from deepspeed.utils import groups, safe_get_full_fp32_param
from torch import nn

from prdp_fast.errors import UserError
from prdp_fast.models.ema import Average
from prdp_fast.models.lora import has_adapter, trained_parameters
from prdp_fast.settings import REPOSITORY, OptimizerSettings, Settings

# DeepSpeed calls collectives by names that torch 2.13 has replaced, and every rank would say so in every run.
warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)

CONFIGS = REPOSITORY / "configs"
FP16_HEADROOM = 4096.0  # fp16 gradients start with the largest weight at 2**12 and halve on overflow, like any loss scale
FP16_PATIENCE = 200  # updates without overflow before the headroom doubles again


# ---------------------------------------------------------------------------------------------------------------- ranks
def launched_world_size() -> int:
    """Ranks of this job as the launcher set them; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched_local_ranks() -> int:
    """Ranks of this job that share this machine."""
    return int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or "1")


def launched_rank() -> int:
    return int(os.environ.get("RANK", "0"))


def init_distributed() -> torch.device:
    """Join the job's process group (NCCL on CUDA, gloo on CPU) and return this rank's device."""
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if "RANK" not in os.environ and not dist.is_initialized():
        # Run by python itself: a job of one, which needs no address and so takes no port.
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it; RANK would tell child processes that a launcher ran
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    # A shared-memory all-reduce for inference on CPUs, which training never calls: it is compiled at the first start, where a
    # killed job leaves a lock that the next one waits for without end, and every rank leaves 64 MiB in /dev/shm.
    __compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=backend, verbose=False)  # takes over a group that exists
    device = torch.device(get_accelerator().device_name(int(os.environ.get("LOCAL_RANK", "0"))))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def shutdown_distributed() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
        groups._WORLD_GROUP = None  # DeepSpeed would go on with the group that is gone, in this process's next job


def barrier() -> None:
    dist.barrier()


def all_reduce(values: list[float], op: str = "sum") -> list[float]:
    """Reduce a few numbers over all ranks in float64; op is sum, max or min."""
    device = get_accelerator().current_device_name() if dist.get_backend() == "nccl" else "cpu"
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op={"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}[op])
    return tensor.tolist()


def gather_objects(value: Any) -> list[Any]:
    """Every rank's picklable value, in rank order, on every rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


# --------------------------------------------------------------------------------------------------------- configuration
@dataclass(frozen=True)
class ZeroConfig:
    """A DeepSpeed JSON with every "auto" resolved."""

    path: Path
    values: dict[str, Any]  # what deepspeed.initialize is given
    stage: int
    dtype: torch.dtype  # of the policy's weights and matrix products

    @property
    def offloads_optimizer(self) -> bool:
        return self.values["zero_optimization"].get("offload_optimizer", {}).get("device", "none") != "none"


def find_config(name: str) -> Path:
    for candidate in (Path(name), CONFIGS / name, CONFIGS / f"{name}.json"):
        if candidate.is_file():
            return candidate
    known = ", ".join(sorted(path.name for path in CONFIGS.glob("*.json")))
    raise UserError(f"--config {name!r} is neither a file nor one of the shipped configurations; known: {known}")


def resolve_config(name: str, settings: Settings, *, world_size: int, stochastic_steps: int, cuda: bool) -> ZeroConfig:
    """Fill in "auto" and refuse a value that contradicts the recipe.

    Args:
        name: path, or name of a file in configs/.
        stochastic_steps: S, the steps of a trajectory that have a log-prob.
        cuda: whether the job runs on CUDA, where "auto" precision is bf16 (float32 at stage 0 and on a CPU).
    Raises: UserError naming the file, the DeepSpeed key and the recipe's key.
    """
    path = find_config(name)
    try:
        config = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"config {path.name}: not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"config {path.name}: expected a DeepSpeed configuration object, got {type(config).__name__}")

    def settle(section: dict[str, Any], key: str, value: Any, recipe_key: str, shown: str = "") -> Any:
        """The recipe's value, which the configuration may leave out, leave to "auto" or repeat, but not contradict."""
        given = section.pop(key, "auto")
        same = given == "auto" or (list(given) == list(value) if isinstance(value, (list, tuple)) else given == value)
        if not same:
            raise UserError(
                f"config {path.name}: {shown or key} is {given}, but the recipe's {recipe_key} makes it {value}; "
                f'write "auto", or change one of the two'
            )
        return value

    schedule, optimizer = settings.schedule, settings.optimizer
    trajectories = schedule.prompts_per_epoch * schedule.images_per_prompt
    # DeepSpeed wants numbers, and uses them for nothing here: every update says which backward is its last. So "auto", which is
    # found when the job starts, is 1 to DeepSpeed, and the job's record does not depend on the memory that happened to be free.
    micro_batch = 1 if schedule.micro_batch == "auto" else schedule.micro_batch
    accumulation = math.ceil(trajectories * stochastic_steps / world_size / micro_batch)
    for key, value, recipe_key in (
        ("train_batch_size", micro_batch * accumulation * world_size, "schedule (rows of one update over all ranks)"),
        ("train_micro_batch_size_per_gpu", micro_batch, "schedule.micro_batch"),
        ("gradient_accumulation_steps", accumulation, "schedule (prompts x images x steps / ranks / micro_batch)"),
    ):
        settle(config, key, "auto" if schedule.micro_batch == "auto" else value, recipe_key)
        if key != "train_batch_size":
            config[key] = value
    # DeepSpeed clips at 1.0 when nothing is said, so it is always said.
    config["gradient_clipping"] = settle(config, "gradient_clipping", optimizer.max_grad_norm, "optimizer.max_grad_norm")
    config.setdefault("steps_per_print", 1_000_000_000)

    section = config.pop("optimizer", {})
    kind = section.get("type", "AdamW")
    if kind.lower() != "adamw":
        raise UserError(f"config {path.name}: optimizer.type is {kind!r}; expected 'AdamW', the optimizer of the recipe")
    parameters = dict(section.get("params", {}))
    settle(parameters, "lr", optimizer.learning_rate, "optimizer.learning_rate", "optimizer.params.lr")
    settle(parameters, "betas", optimizer.betas, "optimizer.betas", "optimizer.params.betas")
    settle(parameters, "eps", optimizer.eps, "optimizer.eps", "optimizer.params.eps")
    settle(parameters, "weight_decay", optimizer.weight_decay, "optimizer.weight_decay", "optimizer.params.weight_decay")
    if parameters:
        raise UserError(
            f"config {path.name}: optimizer.params.{next(iter(parameters))} has no counterpart in the recipe; remove it"
        )
    if "scheduler" in config:
        raise UserError(f"config {path.name}: a 'scheduler' section contradicts the recipe's optimizer.warmup_updates; remove it")

    zero = config.setdefault("zero_optimization", {})
    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise UserError(f"config {path.name}: zero_optimization.stage is {stage!r}; expected 0, 1, 2 or 3")
    for key in [key for key, value in zero.items() if value == "auto"]:
        del zero[key]  # DeepSpeed's own default
    return ZeroConfig(path, config, stage, _resolve_precision(path, config, stage, cuda))


def _resolve_precision(path: Path, config: dict[str, Any], stage: int, cuda: bool) -> torch.dtype:
    bf16, fp16 = config.setdefault("bf16", {}), config.setdefault("fp16", {})
    if fp16.get("enabled", False) == "auto":
        fp16["enabled"] = False
    if bf16.get("enabled", "auto") == "auto":
        bf16["enabled"] = cuda and stage > 0 and not fp16.get("enabled", False)
    if bf16["enabled"] and fp16.get("enabled", False):
        raise UserError(f"config {path.name}: bf16 and fp16 are both enabled; enable one")
    half = bf16["enabled"] or fp16.get("enabled", False)
    if half and stage == 0:
        raise UserError(
            f"config {path.name}: stage 0 adds the gradients of hundreds of micro-batches up in 16 bits, which loses the small "
            "ones; use stage 1 (it adds in float32), or turn bf16/fp16 off"
        )
    if half:
        config["data_types"] = {"grad_accum_dtype": "fp32"} | config.get("data_types", {})
    if bf16["enabled"] and stage > 1:
        bf16["check_grad_overflow"] = True  # a non-finite gradient never reaches the weights
    return torch.bfloat16 if bf16["enabled"] else torch.float16 if half else torch.float32


# ---------------------------------------------------------------------------------------------------------------- engine
@dataclass(frozen=True)
class StepResult:
    grad_norm: float  # of the true gradient, before clipping; inf if it was not finite
    applied: bool  # False: the gradient was not finite and the weights are as they were


class ZeroEngine:
    """A trained U-Net, whichever way DeepSpeed shards it.

    Gradients: every `backward` adds a plain sum, gradients are averaged over ranks, and the sum of an update is clipped once.
    """

    def __init__(
        self,
        unet: nn.Module,
        settings: OptimizerSettings,
        config: ZeroConfig,
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

        # At stage 3 the weights are gathered once per rollout into this copy, not layer by layer at every step.
        self.gathered = copy.deepcopy(unet).to(self.dtype).requires_grad_(False).eval() if config.stage == 3 else None
        # What a rollout calls in place of the U-Net whose weights it samples with: the same, cheaper.
        self.sampling_view: Callable[[nn.Module], Any] = lambda unet: unet
        self.trained = trained_parameters(unet)
        self.has_adapter = has_adapter(unet)
        for parameter in self.trained:
            parameter.requires_grad_(True)
        unet.train()
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
        self.engine, *_ = deepspeed.initialize(model=unet, optimizer=optimizer, config=values)
        self.coalesce = self._can_coalesce(coalesce_gradients)
        # Of what the optimizer steps: this rank's share of the master weights, at stage 0 the weights themselves.
        assert ema_decay is None or config.stage < 3, "stage 3 moves its master weights about"
        masters = (master for group in optimizer.param_groups for master in group["params"])
        self.average = None if ema_decay is None else Average(masters, ema_decay)

    def _can_coalesce(self, wanted: str) -> bool:
        """Whether gradients are reduced once an update.

        Stages 1 to 3 in float32. In 16 bits DeepSpeed keeps the sum of an update's micro-batches in 16 bits until it is reduced,
        which loses the small ones. Every rank then holds all gradients, so where weights are sharded for want of room (stage 3)
        it is no default.
        Raises: UserError if it is insisted on and impossible.
        """
        stage, half = self.config.stage, self.dtype != torch.float32
        if not hasattr(self.engine.optimizer, "_coalesce_grad_reduction"):
            reason = f"the optimizer of ZeRO stage {stage} in {self.dtype} cannot"
        elif half:
            reason = f"DeepSpeed would add the gradients of an update up in {self.dtype}"
        else:
            return wanted == "on" or (wanted == "auto" and stage < 3)
        if wanted == "on":
            raise UserError(f"performance.coalesce_gradients is on, but {reason}; set auto, or another --config")
        return False

    @property
    def rank(self) -> int:
        return dist.get_rank()

    @property
    def world_size(self) -> int:
        return dist.get_world_size()

    @property
    def unet(self) -> nn.Module:
        """The module of the training path: call it for log-probs that are differentiated, or compared with such."""
        return self.engine

    @contextlib.contextmanager
    def sampling_unet(self) -> Iterator[Any]:
        """The current weights, called as the U-Net is, for inference. No communication inside the block."""
        with self.whole_unet() as unet:
            yield self.sampling_view(unet)

    @contextlib.contextmanager
    def whole_unet(self) -> Iterator[nn.Module]:
        """The U-Net itself with the current weights. No communication inside the block."""
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
            self.engine.optimizer.update_lp_params()  # what the U-Net computes with, from the master weights

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
    def local_passes(self) -> bool:
        """Whether no rank waits for another inside a forward or backward: `accumulating` reduces gradients on leaving.

        Not at stage 3, where every layer gathers its weights, nor at stage 2 where each backward scatters its gradients.
        """
        return self.config.stage < 2 or (self.config.stage == 2 and self.coalesce)

    @contextlib.contextmanager
    def accumulating(self) -> Iterator[None]:
        """Around the backward passes of one update. With `local_passes`, ranks reduce the gradients once, on leaving."""
        if self.coalesce:
            with self.engine.coalesce_grad_reduction():
                yield
        elif self.local_passes:  # stages 0 and 1 reduce once in any case, otherwise inside the last backward
            with self.engine.no_sync():
                yield
            self.engine.set_gradient_accumulation_boundary(True)
            self.engine.allreduce_gradients()
        else:
            yield
        self.engine.set_gradient_accumulation_boundary(True)  # `coalesce_grad_reduction` restores "not the last backward"

    def discard_gradients(self) -> None:
        """Forget what the update's backwards have added so far, one that was interrupted included. Only with `local_passes`."""
        optimizer = self.engine.optimizer
        if hasattr(optimizer, "exit_backward"):
            optimizer.exit_backward()  # which an interrupted backward has not reached; otherwise it does nothing
        optimizer.zero_grad()

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Add the gradient of `loss`; `last` marks the update's final micro-batch, where ranks average, if not on leaving."""
        self.engine.set_gradient_accumulation_boundary(last and not self.local_passes)
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
            state.update({name: buffer.cpu() for name, buffer in self.engine.module.named_buffers()})
        return state

    def save(self, directory: Path) -> None:
        """Trained weights and optimizer, every rank its shard, into `directory`."""
        own = {"updates": self.updates, "fp16_headroom": self.fp16_headroom, "fp16_clean": self.fp16_clean}
        self.engine.save_checkpoint(
            str(directory), tag="zero", client_state={"prdp": own}, save_latest=False, exclude_frozen_parameters=self.has_adapter
        )  # fmt: skip
        if self.average is not None:
            self.average.save(directory / self._average_name)

    def load(self, directory: Path) -> None:
        """Raises: UserError if the checkpoint is of another number of ranks or ZeRO stage."""
        loaded, client_state = self.engine.load_checkpoint(str(directory), tag="zero", load_module_strict=not self.has_adapter)
        if loaded is None:
            raise UserError(
                f"checkpoint {directory} was not written by {self.world_size} rank(s) at ZeRO stage {self.config.stage}; "
                "resume with the ranks and --config of the run, or --resume never into another --output"
            )
        for name, value in client_state["prdp"].items():
            setattr(self, name, value)
        if self.average is not None:
            self.average.load(directory / self._average_name)

    @property
    def _average_name(self) -> str:
        return f"average-rank-{self.rank:05d}.safetensors"
