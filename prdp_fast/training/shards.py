"""The trained state in a checkpoint's shards, read by the name of a parameter: whichever ranks and ZeRO stage wrote them.

DeepSpeed reads its shards again on as many ranks and at the stage that wrote them. Here they are taken apart:

    stage 0     one file; weights and moments of every parameter whole
    1 and 2     a group's parameters one after the other in one vector, cut into a part a rank; a rank's file says which fragment
                of which parameter lies where in its part
    3           every parameter cut into a part a rank, the last filled up with zeros; a rank's parts one after the other

What is read is what is asked for: files are mapped into memory, and nothing is put together that is not wanted. DeepSpeed is not
imported. A pickle that asks for anything but tensors, plain values and the four names below is refused.

Source: DeepSpeed's utils/zero_to_fp32.py and checkpoint/ds_to_universal.py, which read the same layouts.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from prdp_fast.core.errors import UserError

ZERO = "zero"  # DeepSpeed's folder in a checkpoint
WEIGHT, MOMENTS, AVERAGE = "weight", ("exp_avg", "exp_avg_sq"), "average"  # what there is of a parameter, float32
NVME = "offloaded_tensors"  # folder of what DeepSpeed keeps on NVMe

_RANK = re.compile(r"(?:bf16_)?(?:zero_pp_rank_(\d+)_)?mp_rank_00_(model|optim)_states\.pt")


@dataclass
class Address:
    """Of a fragment in a rank's vector, as DeepSpeed's fragment_address."""

    numel: int = 0
    start: int = 0


class _Unused:
    """A loss scaler, which the engine has its own of."""


STAND_INS = [
    (Address, "deepspeed.utils.tensor_fragment.fragment_address"),
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (_Unused, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_Unused, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
]


class NotDataError(ValueError):
    """A file of tensors and plain values holds something else, which could run code where it is read."""

    @classmethod
    def of(cls, path: Any, error: pickle.UnpicklingError) -> NotDataError:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"it asks for {found[1]} when it is read" if found else "it is no plain pickle"
        return cls(f"{Path(str(path)).name}: {what}, expected tensors and plain values alone")


def read_data(path: Path) -> dict[str, Any]:
    """A file of `torch.save`, its tensors mapped into memory. Raises: NotDataError; and what torch raises of a damaged one."""
    with torch.serialization.safe_globals(STAND_INS):
        try:
            # Zip files alone can be mapped; a plain pickle is read, and refused if it is no data.
            return torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
        except pickle.UnpicklingError as error:
            raise NotDataError.of(path, error) from error


@dataclass(frozen=True)
class Piece:
    """Part of a parameter, flattened, in one of a rank's vectors."""

    rank: int
    group: int  # the number of the vector
    start: int  # in the vector
    offset: int  # in the parameter
    numel: int


class Shards:
    """The trained state of one checkpoint, whose files are whole.

    Raises: ValueError, KeyError and others where the files are not what DeepSpeed writes.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        models: dict[int, Path] = {}
        self._files: dict[int, Path] = {}  # of optimizers, by rank
        for path in sorted((checkpoint / ZERO).iterdir()):
            if match := _RANK.fullmatch(path.name):
                (models if match[2] == "model" else self._files)[int(match[1] or 0)] = path
        if not models:
            raise ValueError(f"{ZERO} has no file of weights")
        self.model = read_data(models[0])
        self.ranks = int(self.model["dp_world_size"])
        if self._files and sorted(self._files) != list(range(self.ranks)):
            raise ValueError(f"{ZERO} has optimizer states of ranks {sorted(self._files)}, expected those of {self.ranks} ranks")
        self._states: dict[int, dict[str, Any]] = {}
        self._averages: dict[int, Any] = {}

    def __str__(self) -> str:
        return f"{self.ranks} rank{'s' * (self.ranks > 1)} at ZeRO stage {self.stage}"

    @property
    def client(self) -> dict[str, Any]:
        """What the engine counts itself."""
        return self.model["prdp"]

    @property
    def on_nvme(self) -> bool:
        return (self.checkpoint / ZERO / NVME).exists()

    @cached_property
    def stage(self) -> int:
        if not self._files:
            return 0
        state = self._state(0)
        return int(state.get("zero_stage", 1))  # the optimizer of stage 1 in bf16 does not say

    def _state(self, rank: int) -> dict[str, Any]:
        """Of a rank's optimizer at stages 1 to 3."""
        if rank not in self._states:
            self._states[rank] = read_data(self._files[rank])["optimizer_state_dict"]
        return self._states[rank]

    @cached_property
    def shapes(self) -> dict[str, torch.Size]:
        """Of the trained parameters, by name."""
        if self.stage == 0:
            buffers = set(self.model["buffer_names"])
            return {name: value.shape for name, value in self.model["module"].items() if name not in buffers}
        return {name: torch.Size(shape) for group in self.model["param_shapes"] for name, shape in group.items()}

    def buffers(self) -> dict[str, torch.Tensor]:
        """Of the denoiser, as they were saved."""
        return {name: self.model["module"][name] for name in self.model["buffer_names"] if name in self.model["module"]}

    # Where things lie.

    def layout(self, rank: int) -> Any:
        """How a rank's file is laid out: equal to `described` of an optimizer that would write it alike."""
        if self.stage == 0:
            return None
        state = self._state(rank)
        if self.stage == 3:
            return [vector.numel() for vector in state["fp32_flat_groups"]]
        return described(state["param_slice_mappings"])

    @cached_property
    def counts_in_integers(self) -> bool:
        """Whether the optimizer's step is an integer, as that of DeepSpeed's optimizer for CPUs; or a tensor, as torch's."""
        return any(type(state["step"]) is int for state in self._optimizer(0).values())

    @cached_property
    def pieces(self) -> dict[str, list[Piece]]:
        """By parameter, first to last. Raises: ValueError if they are not the whole of it."""
        found: dict[str, list[Piece]] = {name: [] for name in self.shapes}
        ends = dict.fromkeys(self.shapes, 0)
        for name, piece in self._fragments():
            piece = Piece(piece.rank, piece.group, piece.start, ends[name], min(piece.numel, self._numel(name) - ends[name]))
            ends[name] += piece.numel
            if piece.numel:
                found[name].append(piece)
        for name, end in ends.items():
            if end != self._numel(name):
                raise ValueError(f"{self.checkpoint / ZERO} has {end} of the {self._numel(name)} numbers of {name}")
        return found

    def _numel(self, name: str) -> int:
        return self.shapes[name].numel()

    def _fragments(self) -> Iterator[tuple[str, Piece]]:
        """Parameters' pieces, those of each in order; at stage 3 with what fills up the last."""
        if self.stage == 0:
            for number, name in enumerate(self.shapes):
                yield name, Piece(0, number, 0, 0, self._numel(name))
        elif self.stage < 3:
            for rank in range(self.ranks):
                for group, fragments in enumerate(self._state(rank)["param_slice_mappings"]):
                    for name, address in fragments.items():
                        yield name, Piece(rank, group, address.start, 0, address.numel)
        else:
            for group, shapes in enumerate(self.model["param_shapes"]):
                start = 0
                for name in shapes:
                    part = -(-self._numel(name) // self.ranks)
                    for rank in range(self.ranks):
                        yield name, Piece(rank, group, start, 0, part)
                    start += part

    # What lies there.

    @cached_property
    def step(self) -> float | None:
        """Of AdamW: updates that it has made. None if there was none."""
        steps = [float(state["step"]) for state in self._optimizer(0).values()]
        return max(steps) if steps else None

    def _optimizer(self, rank: int) -> dict[int, dict[str, Any]]:
        """State of a rank's AdamW by the number of the vector."""
        if self.stage == 0:
            return self.model["optimizer"]["state"]
        return self._state(rank)["optimizer_state_dict" if self.stage == 3 else "base_optimizer_state"]["state"]

    def read(self, kind: str, name: str, start: int = 0, numel: int | None = None) -> torch.Tensor:
        """Some of what there is of a parameter.

        Args:
            kind: WEIGHT, one of MOMENTS, or AVERAGE.
            start, numel: of the flattened parameter; None is to its end.
        Returns: (numel,) float32 on the CPU, perhaps a view of the file.
        """
        end = self._numel(name) if numel is None else start + numel
        parts = []
        for piece in self.pieces[name]:
            first, last = max(start, piece.offset), min(end, piece.offset + piece.numel)
            if first < last:
                parts.append(self._part(kind, piece, piece.start + first - piece.offset, last - first))
        return parts[0] if len(parts) == 1 else torch.cat(parts or [torch.zeros(0)])

    def _part(self, kind: str, piece: Piece, start: int, numel: int) -> torch.Tensor:
        if kind == AVERAGE:
            return self._average(piece, start, numel)
        if kind in MOMENTS:
            state = self._optimizer(piece.rank).get(piece.group)
            if state is None:  # a parameter that never had a gradient
                return torch.zeros(numel)
            vector = state[kind]
        elif self.stage == 0:
            vector = self.model["module"][list(self.shapes)[piece.group]]
        else:
            key = "fp32_flat_groups" if self.stage == 3 else "single_partition_of_fp32_groups"
            vector = self._state(piece.rank)[key][piece.group]
        if vector.dtype != torch.float32:
            raise ValueError(f"{self.checkpoint / ZERO} has a {kind} in {vector.dtype}, expected torch.float32")
        return vector.reshape(-1).narrow(0, start, numel)

    @property
    def has_average(self) -> bool:
        return self._average_file(0).is_file()

    def _average_file(self, rank: int) -> Path:
        return self.checkpoint / average_name(rank)

    def _average(self, piece: Piece, start: int, numel: int) -> torch.Tensor:
        """Raises: UserError if the file is missing or damaged."""
        path = self._average_file(piece.rank)
        try:
            if piece.rank not in self._averages:
                self._averages[piece.rank] = safe_open(path, "pt")
            part = self._averages[piece.rank].get_slice(str(piece.group))
            return part[start : start + numel] if len(part.get_shape()) == 1 else part[:].reshape(-1)[start : start + numel]
        except (OSError, SafetensorError) as error:
            raise UserError(f"checkpoint {self.checkpoint} has no readable average of the weights ({error})") from None

    def whole(self, kind: str, name: str) -> torch.Tensor:
        """A parameter of its own shape, float32 on the CPU, a copy."""
        return self.read(kind, name).clone().view(self.shapes[name])

    def state_dict(self, *, averaged: bool) -> dict[str, torch.Tensor]:
        """The trained weights, or their moving average."""
        return {name: self.whole(AVERAGE if averaged else WEIGHT, name) for name in self.shapes}


def average_name(rank: int) -> str:
    """The file of a rank's share of the moving average."""
    return f"average-rank-{rank:05d}.safetensors"


def described(mappings: Any) -> list[list[tuple[str, int, int]]]:
    """DeepSpeed's addresses of fragments, its own class or the one above, as plain values."""
    return [[(name, one.start, one.numel) for name, one in group.items()] for group in mappings]
