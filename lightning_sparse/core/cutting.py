"""Layers made smaller, in place: what is left of their parameters, buffers and sizes when outputs or inputs leave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sparse.core.layers import kind_of
from lightning_sparse.core.linear import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS

__all__ = ["Kept", "cut", "cut_tensor", "own_tensors"]


@dataclass(frozen=True)
class Kept:
    """Which outputs and inputs of a layer are left, as positions in the layer it was; None for all.

    Args:
        outputs: rows, filters or channels, ascending; of `nn.MultiheadAttention` those of each of its three projections.
        inputs: columns or channels that are read, ascending.
    """

    outputs: list[int] | None = None
    inputs: list[int] | None = None

    def then(self, after: Kept) -> Kept:
        """What is left if `after` is kept of what this keeps."""
        return Kept(_then(self.outputs, after.outputs), _then(self.inputs, after.inputs))


def cut(layer: Any, kept: Kept) -> None:
    """Take outputs and inputs out of a layer, in place: its parameters, buffers and sizes."""
    pieces = {name: cut_tensor(layer, name, tensor, kept) for name, tensor in own_tensors(layer).items()}
    if isinstance(layer, CONVOLUTIONS):
        groups = _group_members(layer, kept)
        layer.groups = len(groups)
    for name, piece in pieces.items():
        old = getattr(layer, name)
        new: Any = nn.Parameter(piece, old.requires_grad) if isinstance(old, nn.Parameter) else piece
        setattr(layer, name, new)
    for names, indices in ((_OUT_NAMES, kept.outputs), (_IN_NAMES, kept.inputs)):
        for name in names:
            if indices is not None and hasattr(layer, name):
                setattr(layer, name, len(indices))


_OUT_NAMES = ("out_features", "out_channels", "num_features", "num_parameters", "nf")
_IN_NAMES = ("in_features", "in_channels", "nx")


def own_tensors(layer: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a layer itself."""
    return dict((*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)))


def cut_tensor(layer: nn.Module, name: str, tensor: Tensor, kept: Kept) -> Tensor:
    """What is left of a tensor in the shape of one of the layer's: a parameter, a gradient, a moment."""
    if isinstance(layer, nn.MultiheadAttention):
        return _take(tensor, 0, _rows(name, len(tensor), kept.outputs))
    if name == "weight" and tensor.ndim >= 2:
        if isinstance(layer, CONVOLUTIONS) and layer.groups > 1:
            rows = [_take(_take(tensor, 0, ahead), 1, within) for ahead, within in _group_members(layer, kept)]
            return torch.cat(rows)
        kind = kind_of(layer)
        outputs_first = kind is None or kind.output_dim == 0
        first, second = (kept.outputs, kept.inputs) if outputs_first else (kept.inputs, kept.outputs)
        return _take(_take(tensor, 0, first), 1, second)
    if tensor.ndim == 1 and len(tensor) == _out_count(layer):
        return _take(tensor, 0, kept.outputs)
    return tensor


def _out_count(layer: nn.Module) -> int | None:
    return next((int(getattr(layer, name)) for name in _OUT_NAMES if hasattr(layer, name)), None)


def _rows(name: str, count: int, outputs: list[int] | None) -> list[int] | None:
    """Rows of a parameter of `nn.MultiheadAttention`, of which some hold all three projections one after the other."""
    if outputs is None:
        return None
    parts = 3 if name.startswith("in_proj") else 1
    return [part * (count // parts) + row for part in range(parts) for row in outputs]


def _group_members(layer: Any, kept: Kept) -> list[tuple[list[int], list[int]]]:
    """Of each group that is left: positions along the weight's first dimension, and along its second within the group."""
    outputs = range(layer.out_channels) if kept.outputs is None else kept.outputs
    inputs = range(layer.in_channels) if kept.inputs is None else kept.inputs
    per_out, per_in = layer.out_channels // layer.groups, layer.in_channels // layer.groups
    within: list[tuple[list[int], list[int]]] = [([], []) for _ in range(layer.groups)]
    for output in outputs:
        within[output // per_out][0].append(output)
    for read in inputs:
        within[read // per_in][1].append(read)
    members = []
    for out, ins in within:
        if out and ins:
            transposed = isinstance(layer, TRANSPOSED_CONVOLUTIONS)
            members.append((ins, [o % per_out for o in out]) if transposed else (out, [i % per_in for i in ins]))
    if len({(len(ahead), len(within)) for ahead, within in members}) > 1:
        raise ValueError(f"groups of {layer} would differ in size.")
    return members


def _take(tensor: Tensor, dim: int, indices: Sequence[int] | None) -> Tensor:
    return tensor.clone() if indices is None else tensor.index_select(dim, torch.tensor(indices, device=tensor.device))


def _then(first: list[int] | None, second: list[int] | None) -> list[int] | None:
    if first is None or second is None:
        return second if first is None else first
    return [first[i] for i in second]
