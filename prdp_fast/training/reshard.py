"""A checkpoint's trained state put into a running optimizer whose shards lie otherwise: other ranks, another ZeRO stage.

Every rank reads, of all files, the pieces of parameters that are its own, and writes them into its vectors in place. Beside these
and the moments, which an optimizer that has made no step lacks, there is no copy of anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from prdp_fast.core.errors import UserError
from prdp_fast.models.ema import Average
from prdp_fast.training.shards import AVERAGE, MOMENTS, WEIGHT, Piece, Shards, described


class OwnShards:
    """This rank's float32 master weights in an engine of DeepSpeed's, and which pieces of parameters lie where in them."""

    def __init__(self, engine: Any, stage: int, rank: int, trained: Mapping[str, nn.Parameter]) -> None:
        """
        Args:
            engine: what `deepspeed.initialize` made; its optimizer is AdamW's, or wraps it.
            trained: by name, in the order in which the optimizer was given them.
        """
        self.engine, self.stage, self.rank, self.trained = engine, stage, rank, trained
        self.optimizer = engine.optimizer

    @property
    def adamw(self) -> torch.optim.Optimizer:
        return self.optimizer.optimizer if self.stage > 0 else self.optimizer

    @property
    def layout(self) -> Any:
        """As `Shards.layout` of a file that this rank would write."""
        if self.stage == 0:
            return None
        if self.stage == 3:
            return [vector.numel() for vector in self.vectors]
        return described(self.optimizer._param_slice_mappings)

    @property
    def vectors(self) -> list[torch.Tensor]:
        """What AdamW steps; at stage 0 the parameters themselves."""
        if self.stage == 3:  # which hides them from AdamW between its steps
            return list(self.optimizer.fp32_partitioned_groups_flat)
        return [vector for group in self.adamw.param_groups for vector in group["params"]]

    def shape(self, name: str) -> torch.Size:
        parameter = self.trained[name]
        return torch.Size(parameter.ds_shape) if self.stage == 3 else parameter.shape

    def pieces(self) -> Iterator[tuple[str, Piece]]:
        """What lies in `vectors`; what fills them up is left out."""
        for number, (name, parameter) in enumerate(self.trained.items()):
            if self.stage == 0:
                yield name, Piece(self.rank, number, 0, 0, parameter.numel())
            elif self.stage == 3:
                group, start, part = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
                offset = min(self.rank * part, parameter.ds_numel)
                yield name, Piece(self.rank, group, start, offset, min(part, parameter.ds_numel - offset))
            elif (own := parameter._hp_mapping) is not None:  # None: all of it is other ranks'
                yield name, Piece(
                    self.rank, own.param_group_index, own.hp_fragment_address.start, own.lp_fragment_address.start,
                    own.hp_fragment_address.numel,
                )  # fmt: skip

    @torch.no_grad()
    def fill(self, shards: Shards, average: Average | None, *, count_in_integers: bool) -> None:
        """Take over master weights, AdamW's moments and step, the moving average, buffers and counters. Every rank calls this.

        Args:
            average: of `vectors`.
            count_in_integers: whether AdamW's step is one, see `Shards.counts_in_integers`.
        Raises: UserError if the checkpoint is of other weights, or has no average where one is wanted.
        """
        self.check(shards, average)
        parts = {WEIGHT: self.vectors, AVERAGE: average.averages if average else []}
        if shards.step is not None:
            parts |= {kind: [torch.zeros_like(vector) for vector in self.vectors] for kind in MOMENTS}
        for name, piece in self.pieces():
            for kind, vectors in parts.items():
                if vectors:
                    put(vectors[piece.group], piece, shards.read(kind, name, piece.offset, piece.numel))
        state = None
        if shards.step is not None:
            state = {
                number: {
                    # Its own for each: AdamW counts in place.
                    "step": int(shards.step) if count_in_integers else torch.tensor(shards.step, dtype=torch.float32),
                    **{kind: parts[kind][number] for kind in MOMENTS},
                }
                for number in range(len(self.vectors))
            }
        buffers = shards.buffers()
        for name, buffer in self.engine.module.named_buffers():
            if name in buffers:
                buffer.copy_(buffers[name])
        self.set_optimizer(state)
        for counter in ("global_steps", "global_samples", "skipped_steps"):
            setattr(self.engine, counter, shards.model[counter])

    def check(self, shards: Shards, average: Average | None) -> None:
        """Raises: UserError."""
        what = f"checkpoint {shards.checkpoint}, of {shards}"
        own = {name: self.shape(name) for name in self.trained}
        if shards.shapes != own:
            odd = sorted(name for name in shards.shapes.keys() | own.keys() if shards.shapes.get(name) != own.get(name))
            was, now = (str(tuple(shapes[odd[0]])) if odd[0] in shapes else "none" for shapes in (shards.shapes, own))
            raise UserError(
                f"{what}, trains other weights than this job: {odd[0]} was {was}, now {now}; resume with the job of the run"
            )
        if average is not None and not shards.has_average:
            raise UserError(f"{what}, has no average of the weights; remove it to go on from the one before")

    def set_optimizer(self, state: dict[int, dict[str, Any]] | None) -> None:
        """Give AdamW its state, by the number of the vector, and compute with the new weights.

        Args: state: None if it has made no step.
        """
        if self.stage == 3:
            self.optimizer.checkpoint_event_prologue()
            self.optimizer.load_state_dict([self.stage_3_state(state)] * (self.rank + 1), load_optimizer_states=state is not None)
            self.optimizer.checkpoint_event_epilogue()
            return
        if state is not None:
            self.adamw.load_state_dict({"state": state, "param_groups": self.adamw.state_dict()["param_groups"]})
        if self.stage > 0:
            self.optimizer.update_lp_params()

    def stage_3_state(self, state: dict[int, dict[str, Any]] | None) -> dict[str, Any]:
        """What DeepSpeed reads from a file of stage 3: the vectors are there already, so that it makes 16-bit weights of them."""
        own = self.optimizer.state_dict()
        return own | {"optimizer_state_dict": own["optimizer_state_dict"] | {"state": state or {}}}


def put(vector: torch.Tensor, piece: Piece, value: torch.Tensor) -> None:
    """Args: vector: flat, or a whole parameter, of any memory format."""
    if piece.numel == vector.numel():
        vector.copy_(value.view(vector.shape))
    else:
        vector.narrow(0, piece.start, piece.numel).copy_(value)
