"""The position of this rank's part of a weight in the whole weight, and reductions over ranks.

With FSDP2 or tensor parallelism a parameter is a `DTensor`: every rank holds a block of it. Methods see that block as a
plain parameter in the same memory, a `Part`; its `Layout` describes its position. Without sharding there are no parts and
no communication.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement, Replicate
from torch.utils.weak import WeakIdKeyDictionary

from lightning_sparse.functional.spread import Spread

__all__ = [
    "Layout",
    "Part",
    "is_cut",
    "layout_of",
    "least_over_ranks",
    "lent_gradients",
    "local",
    "owner_of",
    "part_of",
    "parts_of",
    "spread_over",
    "total_over_ranks",
]

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_SENT = {torch.int16: torch.int32}  # NCCL cannot sum int16
_parts: Any = WeakIdKeyDictionary()  # the one shared part of each parameter


@dataclass(frozen=True)
class Layout:
    """The block of a weight that this rank holds.

    Args:
        shape: shape of the whole weight.
        start: first index of the block, by dimension.
        size: size of the block, by dimension.
        cut: the sharded dimensions: some rank may hold only a part of them.
        counts: whether this block is counted; of several copies of a block, only one is.
        device: the device for communication between ranks.

    Example:
        >>> rows = Layout((4, 3), (2, 0), (2, 3), (0,))
        >>> rows.local(torch.arange(12).view(4, 3)).tolist(), rows.places(torch.tensor([0, 5])).tolist()
        ([[6, 7, 8], [9, 10, 11]], [6, 11])
    """

    shape: tuple[int, ...]
    start: tuple[int, ...]
    size: tuple[int, ...]
    cut: tuple[int, ...] = ()
    counts: bool = True
    device: torch.device | str = "cpu"

    @classmethod
    def of(cls, parameter: Tensor) -> Layout:
        """Return the layout of the local part of a parameter in a sharded model.

        Raises:
            ValueError: if ranks hold partial sums, or blocks in an unknown placement.
        """
        shape, first = tuple(parameter.shape), distributed.get_rank() == 0
        if not isinstance(parameter, DTensor):
            return cls(shape, (0,) * len(shape), shape, (), first, parameter.device)
        mesh, placements = parameter.device_mesh, parameter.placements
        here, start, size = mesh.get_coordinate(), [0] * len(shape), list(shape)
        counts = here is not None and bool((mesh.mesh == 0).any())  # with several mesh slices, the one with rank 0
        for axis, placement in _in_order(placements):
            coordinate = 0 if here is None else here[axis]
            if isinstance(placement, Replicate):
                counts &= coordinate == 0
            elif (dim := getattr(placement, "dim", None)) is None:
                raise ValueError(f"A weight is placed as {placement}, and only blocks and copies can be counted.")
            else:  # like torch.chunk
                chunk = -(-size[dim] // mesh.size(axis))
                skipped = min(chunk * coordinate, size[dim])
                start[dim], size[dim] = start[dim] + skipped, min(chunk, size[dim] - skipped)
        held = tuple(local(parameter).shape)
        if held != tuple(size):
            raise ValueError(f"A rank holds {held} of a weight of {shape} placed as {placements}, and not {tuple(size)}.")
        cut = {
            placement.dim for axis, placement in enumerate(placements) if hasattr(placement, "dim") and mesh.size(axis) > 1
        }
        return cls(shape, tuple(start), tuple(size), tuple(sorted(cut)), counts, local(parameter).device)

    @property
    def numel(self) -> int:
        """Return the number of entries in the whole weight."""
        return math.prod(self.shape)

    def local(self, whole: Tensor) -> Tensor:
        """Return this rank's part of a whole tensor of the weight's shape; dimensions of size 1 broadcast."""
        for dim, (start, size) in enumerate(zip(self.start, self.size, strict=True)):
            if whole.shape[dim] == self.shape[dim]:
                whole = whole.narrow(dim, start, size)
        return whole

    def places(self, entries: Tensor | None = None) -> Tensor:
        """Return the flat positions in the whole weight of entries of the part, given by flat position; default: all."""
        if entries is None:
            index = torch.int32 if self.numel < 1 << 31 else torch.int64
            entries = torch.arange(math.prod(self.size), dtype=index, device=self.device)
        places, stride = torch.zeros_like(entries), 1
        for start, size, width in zip(self.start[::-1], self.size[::-1], self.shape[::-1], strict=True):
            places += (entries % max(size, 1) + start) * stride
            entries, stride = entries // max(size, 1), stride * width
        return places

    def along(self, dims: Sequence[int]) -> Layout:
        """Return the layout of a tensor that has only some dimensions of the weight.

        Raises:
            ValueError: if another dimension is sharded, so that no rank holds all the entries it needs.
        """
        if lost := [dim for dim in self.cut if dim not in dims]:
            raise ValueError(f"Dimension {lost[0]} of a weight is cut, and dimensions {list(dims)} need all of it.")
        picked = [tuple(values[dim] for dim in dims) for values in (self.shape, self.start, self.size)]
        return replace(
            self,
            shape=picked[0],
            start=picked[1],
            size=picked[2],
            cut=tuple(i for i, dim in enumerate(dims) if dim in self.cut),
        )

    def flattened(self, dims: Sequence[int]) -> Layout:
        """Return the layout with all dimensions except `dims` of size 1, as for thresholds that broadcast over a weight."""
        shape, start, size = (
            tuple(value if dim in dims else rest for dim, value in enumerate(values))
            for values, rest in ((self.shape, 1), (self.start, 0), (self.size, 1))
        )
        return replace(self, shape=shape, start=start, size=size, cut=tuple(dim for dim in self.cut if dim in dims))

    def select(self, dims: Sequence[int], indices: Sequence[int]) -> Layout:
        """Return the layout of one matrix of a stack; the part is empty if this rank does not hold the matrix."""
        held = all(0 <= index - self.start[dim] < self.size[dim] for dim, index in zip(dims, indices, strict=True))
        left = [dim for dim in range(len(self.shape)) if dim not in dims]
        shape, start, size = (tuple(values[dim] for dim in left) for values in (self.shape, self.start, self.size))
        size = size if held else (0, *size[1:])
        cut = tuple(position for position, dim in enumerate(left) if dim in self.cut)
        return replace(self, shape=shape, start=start, size=size, cut=cut)

    def total(self, sums: Tensor) -> Tensor:
        """Return sums over the whole weight from the sums over this rank's part; all ranks must call it."""
        return total_over_ranks(sums if self.counts else torch.zeros_like(sums))

    def gather(self, part: Tensor) -> Tensor:
        """Return the whole tensor on the CPU of the first rank, and no entries on other ranks; all ranks must call it.

        Bit patterns are summed as integers, so nothing is rounded and -0.0 keeps its sign.
        """
        raw = part.to(self.device).contiguous().view(_INTEGERS[part.element_size()])
        whole = torch.zeros(self.shape, dtype=_SENT.get(raw.dtype, raw.dtype), device=self.device)
        if self.counts:
            self.local(whole).copy_(raw)
        distributed.reduce(whole, 0)
        if distributed.get_rank() != 0:
            return torch.empty(0, dtype=part.dtype)
        return whole.cpu().to(raw.dtype).view(part.dtype)


def _in_order(placements: Sequence[Placement]) -> list[tuple[int, Placement]]:
    """Return placements in the order of sharding: with FSDP2 over tensor parallelism, tensor parallelism comes first."""
    return sorted(enumerate(placements), key=lambda entry: hasattr(entry[1], "split_factor"))


class Part(nn.Parameter):
    """This rank's part of a parameter, in the same memory: the weight that a method sees in a sharded model."""

    owner: nn.Parameter
    block: Layout

    @classmethod
    def make(cls, data: Tensor, owner: nn.Parameter, layout: Layout) -> Part:
        """Make the part of a parameter.

        Args:
            data: the local tensor.
            owner: the parameter as the module and the optimizer see it.
            layout: position of the part in the whole weight.
        """
        part: Part = cls(data.detach(), requires_grad=owner.requires_grad)
        part.owner, part.block = owner, layout
        return part


def is_cut(module: nn.Module) -> bool:
    """Whether any parameter of a module is sharded or replicated over ranks."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


@torch.no_grad()
def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor, in the same memory; the tensor itself if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def part_of(parameter: nn.Parameter) -> Part:
    """Return the part of a parameter in a sharded model; the same object as long as it is referenced."""
    reference = _parts.get(parameter)
    part = None if reference is None else reference()
    if part is None:
        part = Part.make(local(parameter), parameter, Layout.of(parameter))
        _parts[parameter] = weakref.ref(part)
    elif part.data_ptr() != local(parameter).data_ptr():  # FSDP2 has moved it to other memory
        part.data = local(parameter).detach()
    return part


def parts_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return all parameters of a module by name; of sharded ones, this rank's part."""
    named = dict(module.named_parameters())
    return {name: part_of(parameter) for name, parameter in named.items()} if is_cut(module) else named


def owner_of(weight: nn.Parameter) -> nn.Parameter:
    """Return the parameter that the module and the optimizer see for a weight that a method sees."""
    return weight.owner if isinstance(weight, Part) else weight


def layout_of(weight: Tensor) -> Layout | None:
    """Return the layout of a part; None for a weight that this rank holds whole."""
    return weight.block if isinstance(weight, Part) else None


def total_over_ranks(sums: Tensor) -> Tensor:
    """Return the sum of a small tensor over all ranks; all ranks must call it."""
    sums = sums.clone()
    distributed.all_reduce(sums)
    return sums


def least_over_ranks(number: Tensor) -> Tensor:
    """Return the smallest number of all ranks; all ranks must call it."""
    number = number.clone()
    distributed.all_reduce(number, distributed.ReduceOp.MIN)
    return number


def spread_over(layouts: Iterable[Layout | None]) -> Spread | None:
    """Return how several weights are distributed over ranks; None if nothing is sharded."""
    shares = [layout for layout in layouts if layout is not None]
    return Spread(total_over_ranks, shares) if shares else None


@contextmanager
def lent_gradients(weights: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Give parts the gradients of their owners within the context; changes to them also apply to the owners.

    Args:
        weights: the weights by name; those that are not parts keep their own gradients.
    """
    lent = [(weight, weight.owner, _as_placed(weight.owner)) for weight in weights.values() if isinstance(weight, Part)]
    for part, _, gradient in lent:
        part.grad = None if gradient is None else local(gradient)
    try:
        yield
    finally:
        for part, owner, gradient in lent:
            _give_back(part, owner, gradient)
            part.grad = None  # so that the owner can free its gradient


def _as_placed(owner: nn.Parameter) -> Tensor | None:
    """Return the gradient of a parameter, sharded like the parameter."""
    gradient = owner.grad
    if isinstance(gradient, DTensor) and isinstance(owner, DTensor) and gradient.placements != owner.placements:
        gradient = owner.grad = gradient.redistribute(placements=owner.placements)
    return gradient


def _give_back(part: Part, owner: nn.Parameter, before: Tensor | None) -> None:
    now = part.grad
    if now is None:
        owner.grad = None
    elif before is not None and now.data_ptr() == local(before).data_ptr():
        owner.grad = before
    elif isinstance(owner, DTensor):
        owner.grad = DTensor.from_local(
            now, owner.device_mesh, owner.placements, run_check=False, shape=owner.shape, stride=owner.stride()
        )
    else:
        owner.grad = now
