"""Copies on the CPU of what a rank holds; whole tensors are assembled only when a checkpoint is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_sparse.core.layout import Layout, local
from lightning_sparse.functional import pack, unpack

__all__ = ["Piece", "like", "put_back_", "to_cpu", "whole"]


@dataclass(frozen=True, eq=False)
class Piece:
    """The part of a tensor that this rank holds, on the CPU.

    Args:
        stored: its values, or a mask at one bit per entry.
        layout: its position in the whole tensor.
        packed: whether it is a mask.
    """

    stored: Tensor
    layout: Layout
    packed: bool = False

    @classmethod
    def of(cls, part: Tensor, layout: Layout) -> Piece:
        """A copy of a part."""
        packed = part.dtype == torch.bool
        return cls(pack(part).cpu() if packed else part.detach().to("cpu", copy=True), layout, packed)

    @property
    def part(self) -> Tensor:
        """The part that was copied."""
        return unpack(self.stored, self.layout.size) if self.packed else self.stored

    def whole(self) -> Tensor:
        """The whole tensor, on the first rank; all ranks must call it."""
        gathered = self.layout.gather(self.part)
        return pack(gathered) if self.packed else gathered


def to_cpu(tensor: Tensor) -> Tensor | Piece:
    """A copy on the CPU of a tensor, or of this rank's part of it."""
    if isinstance(tensor, DTensor):
        return Piece.of(local(tensor), Layout.of(tensor))
    return tensor.detach().to("cpu", copy=True)


def whole(value: Any) -> Any:
    """The same with whole tensors instead of pieces; all ranks must call it, and only the first one gets them."""
    if isinstance(value, Piece):
        return value.whole()
    if type(value) is dict:
        return {key: whole(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(whole(item) for item in value)
    return value


@torch.no_grad()
def put_back_(saved: Mapping[str, Tensor | Piece], tensors: Mapping[str, Tensor]) -> None:
    """Copy what was saved into tensors of the same names, in place.

    Args:
        saved: pieces, or whole tensors from a checkpoint.
        tensors: some of them may be sharded.
    """
    for name, tensor in tensors.items():
        if name in saved:
            local(tensor).copy_(_part(saved[name], tensor))


def like(saved: Tensor | Piece, tensor: Tensor) -> Tensor:
    """What was saved, sharded like another tensor: moments of an optimizer are sharded like its weights."""
    if not isinstance(tensor, DTensor) or (isinstance(saved, Tensor) and saved.shape != tensor.shape):
        assert isinstance(saved, Tensor)
        return saved
    part = _part(saved, tensor).to(local(tensor).device)
    mesh, shape, stride = tensor.device_mesh, tensor.shape, tensor.stride()
    return DTensor.from_local(part, mesh, tensor.placements, run_check=False, shape=shape, stride=stride)


def _part(saved: Tensor | Piece, tensor: Tensor) -> Tensor:
    if isinstance(saved, Piece):
        return saved.part
    return Layout.of(tensor).local(saved).contiguous() if isinstance(tensor, DTensor) else saved
