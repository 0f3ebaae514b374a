"""A weight that a method works on, and the meaning of its dimensions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lightning_sparse.core.layers import LayerKind, kind_of
from lightning_sparse.core.layout import Layout, Part, layout_of, owner_of
from lightning_sparse.functional import random_score

__all__ = ["Target"]


@dataclass(frozen=True)
class Target:
    """One weight that a method works on.

    Args:
        name: its name in the module's state dict.
        weight: the parameter itself, one matrix of it, or this rank's shard of it (a `Part`).
        output_dim: the output dimension.
        input_dim: the input dimension.
        groups: groups of a convolution, otherwise 1.
        stack_dims: dimensions that enumerate independent matrices, such as experts.
        layout_known: whether the dimensions come from a known kind of layer, and are not only assumed.
        parts: number of equal parts of the outputs that may each read a different input.
    """

    name: str
    weight: nn.Parameter
    output_dim: int = 0
    input_dim: int = 1
    groups: int = 1
    stack_dims: tuple[int, ...] = ()
    layout_known: bool = True
    parts: int = 1

    @classmethod
    def of(cls, name: str, weight: nn.Parameter, layer: nn.Module) -> Target:
        """The weight of a layer, with the layout of its kind."""
        kind = kind_of(layer, name.rpartition(".")[2])
        known = kind is not None
        kind = kind or LayerKind(nn.Module)
        groups = int(getattr(layer, "groups", 1))
        return cls(name, weight, kind.output_dim, kind.input_dim, groups, kind.stack_dims, known, kind.parts)

    @property
    def layout(self) -> Layout | None:
        """The position of this rank's shard in the weight; None if it holds the whole weight."""
        return layout_of(self.weight)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole weight."""
        return tuple(self.weight.shape) if self.layout is None else self.layout.shape

    @property
    def size(self) -> int:
        """The number of entries of the whole weight."""
        return math.prod(self.shape)

    @property
    def shares_rows(self) -> bool:
        """Whether one row serves several outputs, as in a grouped transposed convolution."""
        return self.output_dim != 0 and self.groups > 1

    @property
    def parts_outputs(self) -> bool:
        """Whether the inputs of one output are on several ranks."""
        return self.layout is not None and bool({*self.layout.cut} - {*self.output_dims})

    @property
    def output_dims(self) -> tuple[int, ...]:
        """The dimensions that distinguish outputs: the output dimension, and those of stacks."""
        return (*self.stack_dims, self.output_dim)

    @property
    def outputs(self) -> int:
        """The number of outputs, over all matrices."""
        return math.prod(self.shape[dim] for dim in self.output_dims)

    def unstack(self, tensor: Tensor) -> list[Tensor]:
        """The views of a tensor of the weight's shape for its single matrices; empty for those on other ranks."""
        if not self.stack_dims:
            return [tensor]
        if self.layout is not None:
            return [self._matrix(tensor, index, self.layout) for index in self._indices]
        first = tensor.movedim(self.stack_dims, tuple(range(len(self.stack_dims))))
        return list(first.flatten(0, len(self.stack_dims) - 1).unbind(0))

    def restack(self, tensors: Sequence[Tensor]) -> Tensor:
        """The tensor of the weight's shape from those of its single matrices."""
        if not self.stack_dims:
            return tensors[0]
        if self.layout is not None:
            whole = tensors[0].new_empty(self.layout.size)
            for tensor, index in zip(tensors, self._indices, strict=True):
                self._matrix(whole, index, self.layout).copy_(tensor)
            return whole
        sizes = [self.weight.shape[dim] for dim in self.stack_dims]
        together = torch.stack(list(tensors))
        return together.view(*sizes, *together.shape[1:]).movedim(tuple(range(len(sizes))), self.stack_dims).contiguous()

    def matrices(self) -> list[Target]:
        """The same weight, as one target for each of its matrices."""
        if not self.stack_dims:
            return [self]
        left = [dim for dim in range(self.weight.ndim) if dim not in self.stack_dims]
        alone = replace(self, stack_dims=(), output_dim=left.index(self.output_dim), input_dim=left.index(self.input_dim))
        views = [nn.Parameter(view, requires_grad=False) for view in self.unstack(self.weight.detach())]
        if self.layout is not None:
            layouts = [self.layout.select(self.stack_dims, index) for index in self._indices]
            views = [Part.make(view, owner_of(self.weight), layout) for view, layout in zip(views, layouts, strict=True)]
        return [replace(alone, name=f"{self.name}[{index}]", weight=view) for index, view in enumerate(views)]

    def draw(self, generator: torch.Generator) -> Tensor:
        """A random score for each entry that this rank holds: all ranks draw the whole, and each takes its shard."""
        if self.layout is None:
            return random_score(self.weight, generator)
        whole = random_score(torch.empty(self.shape, device="meta"), generator)
        return self.layout.local(whole).to(self.weight.device).contiguous()

    @property
    def _indices(self) -> list[tuple[int, ...]]:
        """The indices of all matrices, in order."""
        return list(itertools.product(*[range(self.shape[dim]) for dim in self.stack_dims]))

    def _matrix(self, tensor: Tensor, index: tuple[int, ...], layout: Layout) -> Tensor:
        """The view of one matrix, as far as this rank holds it."""
        for dim, position in sorted(zip(self.stack_dims, index, strict=True), reverse=True):
            position -= layout.start[dim]
            held = 0 <= position < layout.size[dim]
            tensor = tensor.select(dim, position) if held else tensor.narrow(dim, 0, 0).flatten(dim, dim + 1)
        return tensor
