"""Sets of masks: stored, or derived from variables."""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from lightning_sparse.core.layout import Layout, layout_of, spread_over
from lightning_sparse.core.pieces import Piece, whole
from lightning_sparse.functional import any_bits, apply_bits_, is_for_one_thread, mask_bits, pack, unpack

__all__ = ["LiveMasks", "MaskSet", "Masks", "Mold", "add_up"]


class Masks(ABC):
    """The masks of named weights; True = kept."""

    live: ClassVar[bool]
    """Whether masks change in every step; then they are counted only as often as Lightning logs."""

    @abstractmethod
    def __getitem__(self, name: str) -> Tensor: ...

    @abstractmethod
    def __iter__(self) -> Iterator[str]: ...

    @abstractmethod
    def numel(self, name: str) -> int:
        """The number of entries of one weight."""

    @property
    @abstractmethod
    def counts(self) -> dict[str, int]:
        """The number of kept entries of each weight."""

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __contains__(self, name: object) -> bool:
        return name in list(iter(self))

    def dropped(self, name: str) -> Tensor:
        """The complement of the mask."""
        return ~self[name]

    @property
    def kept(self) -> int:
        """The number of kept entries."""
        return sum(self.counts.values())

    @property
    def total(self) -> int:
        """The number of entries."""
        return sum([self.numel(name) for name in self])

    @property
    def sparsity(self) -> float:
        """The fraction of dropped entries."""
        return 1 - self.kept / self.total if self.total else 0.0

    def fingerprint(self) -> Tensor:
        """One number per mask, in order; two sets with equal numbers have equal masks, except by rare chance."""
        sums = [zlib.crc32(pack(self[name]).cpu().numpy().tobytes()) for name in self]
        return torch.tensor(sums, dtype=torch.int64)

    def whereabouts(self) -> Tensor:
        """One number per mask, in order, for the block of the weight that this rank holds; ranks compare equal blocks."""
        layouts = [self.layouts.get(name) for name in self]
        blocks = [0 if it is None else zlib.crc32(repr((it.start, it.size)).encode()) for it in layouts]
        return torch.tensor(blocks, dtype=torch.int64)

    @property
    def layouts(self) -> Mapping[str, Layout]:
        """The positions of this rank's shards; weights that it holds entirely are omitted."""
        return {}

    def added_up(self, counts: Mapping[str, Tensor]) -> dict[str, int]:
        """Counts of this rank's shards, summed over all ranks; synchronizes with the device once."""
        return add_up(counts, self.layouts)


def add_up(counts: Mapping[str, Tensor], layouts: Mapping[str, Layout]) -> dict[str, int]:
    """Sum the counts of this rank's shards over all ranks; synchronizes with the device once.

    Args:
        counts: by name of the weight.
        layouts: positions of shards, by name; omits weights that this rank holds entirely.
    """
    numbers = list(counts.values())
    spread = spread_over(layouts.get(name) for name in counts)
    if spread is not None:
        return dict(zip(counts, spread.sums(numbers), strict=True))
    together = torch.stack([count.to(numbers[0].device) for count in numbers]).tolist() if numbers else []
    return dict(zip(counts, together, strict=True))


class MaskSet(Masks):
    """Stored masks: one bit of information per weight, a byte in memory, a bit on disk.

    Example:
        >>> masks = MaskSet({"fc.weight": torch.ones(2, 2)})
        >>> _ = masks.replace({"fc.weight": torch.tensor([[True, False], [True, True]])})
        >>> masks.kept, masks.total, masks.sparsity
        (3, 4, 0.25)
    """

    live = False

    def __init__(self, weights: Mapping[str, Tensor] | None = None) -> None:
        # As int8 with all bits set where kept: a byte per weight, in the form that is applied twice per step.
        self._bits = {
            name: torch.full(weight.shape, -1, dtype=torch.int8, device=weight.device)
            for name, weight in (weights or {}).items()
        }
        self._layouts = _layouts(weights or {})
        self._kept = {name: self.numel(name) for name in self._bits}
        self._uncounted: dict[str, Tensor] = {}
        self._total: int | None = None
        self.changes = 0
        """How often masks have been replaced or loaded."""

    def __getitem__(self, name: str) -> Tensor:
        return self._bits[name] != 0

    def __iter__(self) -> Iterator[str]:
        return iter(self._bits)

    def __len__(self) -> int:
        return len(self._bits)

    def __contains__(self, name: object) -> bool:
        return name in self._bits

    def numel(self, name: str) -> int:
        return self._layouts[name].numel if name in self._layouts else self._bits[name].numel()

    @property
    def layouts(self) -> Mapping[str, Layout]:
        return self._layouts

    @property
    def counts(self) -> dict[str, int]:
        self._count()
        return dict(self._kept)

    @property
    def kept(self) -> int:
        self._count()
        return sum(self._kept.values())

    @property
    def total(self) -> int:
        if self._total is None:
            self._total = sum([self.numel(name) for name in self._bits])
        return self._total

    def dropped(self, name: str) -> Tensor:
        return self._bits[name] == 0

    def replace(
        self,
        masks: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
        settle: Callable[[str, Tensor], None] = lambda name, entries: None,
    ) -> None:
        """Replace the masks of some weights one after the other; a generator keeps only one of them in memory.

        Args:
            masks: by name, or pairs of name and mask.
            settle: called for each weight whose mask has changed, with its name and its unsettled entries: all except those
                kept before and after.
        """
        for name, mask in masks.items() if isinstance(masks, Mapping) else masks:
            old = self._bits[name]
            if mask.shape != old.shape or mask.dtype != torch.bool:
                raise ValueError(
                    f"The mask of '{name}' must be boolean of shape {tuple(old.shape)}, "
                    f"not {mask.dtype} of shape {tuple(mask.shape)}."
                )
            bits = mask_bits(mask).to(old.device)
            if self._layouts or not bits.equal(old):  # with shards, all ranks must count the same weights
                self._uncounted[name] = mask.count_nonzero()
                self._bits[name] = bits
                settle(name, (old & bits) == 0)
        self._count()
        self.changes += 1  # also if nothing has changed: all ranks must compare together

    def _count(self) -> None:
        """Count what was replaced since the last time; synchronizes with the device once."""
        if self._uncounted:
            counted, self._uncounted = self._uncounted, {}
            self._kept |= self.added_up(counted)

    def bits(self, name: str, like: Tensor) -> Tensor | None:
        """The mask in the form that is applied, on the device of a tensor; None if nothing is dropped."""
        bits = self._bits.get(name)
        if bits is None or (name not in self._uncounted and self._kept[name] == self.numel(name)):
            return None
        return bits if bits.device == like.device else bits.to(like.device)

    @torch.no_grad()
    def apply_(self, tensors: Mapping[str, Tensor | None]) -> None:
        """Set dropped entries of the given tensors to zero, in place; names without a mask pass through."""
        for name, tensor in tensors.items():
            if tensor is not None and (bits := self.bits(name, tensor)) is not None:
                apply_bits_(tensor, bits)

    @torch.no_grad()
    def astray(self, tensors: Mapping[str, Tensor]) -> str | None:
        """The first tensor with a dropped entry that is not +0.0, or None; synchronizes with the device once."""
        kept = {name: bits for name, tensor in tensors.items() if (bits := self.bits(name, tensor)) is not None}
        names, found = [*kept], [any_bits(tensors[name], ~bits) for name, bits in kept.items()]
        together = torch.stack([flag.to(found[0].device) for flag in found]).tolist() if found else []
        return next((name for name, flag in zip(names, together, strict=True) if flag), None)

    def to(self, weights: Mapping[str, Tensor]) -> None:
        """Move each mask to the device of its weight; for a shard, only its part of the mask stays."""
        parts = {name: layout for name, layout in _layouts(weights).items() if name in self._bits}
        for name, layout in parts.items():
            if name not in self._layouts:
                self._bits[name] = layout.local(self._bits[name]).clone()
        self._layouts = parts
        self._bits = {name: bits.to(weights[name].device) for name, bits in self._bits.items()}

    def pieces(self) -> dict[str, Any]:
        """This rank's part of the masks, at one bit per weight on the CPU."""
        saved: dict[str, Any] = {}
        for name, bits in self._bits.items():
            layout = self._layouts.get(name)
            if layout is None:
                saved[name] = {"shape": list(bits.shape), "kept": pack(self[name]).cpu()}
            else:
                saved[name] = {"shape": list(layout.shape), "kept": Piece.of(self[name], layout)}
        return saved

    def state_dict(self) -> dict[str, Any]:
        """Whole masks at one bit per weight; with sharded weights, all ranks must call it, and only the first gets them."""
        saved: dict[str, Any] = whole(self.pieces())
        return saved

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` or `pieces` returned, on the CPU."""
        kept = {name: saved["kept"] for name, saved in state.items()}
        self._layouts = {name: piece.layout for name, piece in kept.items() if isinstance(piece, Piece)}
        masks = {
            name: saved.part if isinstance(saved, Piece) else unpack(saved, tuple(state[name]["shape"]))
            for name, saved in kept.items()
        }
        self._bits = {name: mask_bits(mask) for name, mask in masks.items()}
        self._kept, self._total, self._uncounted = {}, None, {name: mask.count_nonzero() for name, mask in masks.items()}
        self._count()
        self.changes += 1


class Mold:
    """Applies masks to gradients or to weights; created once per change of masks.

    In small layers calls cost more than the arithmetic, so everything that is constant between steps is precomputed. For
    small models (`WIDE`) on a CPU, this includes masks of 32 bits: their steps are so short that widening bytes would show.

    Args:
        masks: the masks to apply.
        weights: by name; those without dropped entries are skipped.
    """

    WIDE: ClassVar = 2**22
    """The largest number of entries of all weights together for which masks of 32 bits are kept: at most 16 MiB."""

    SMALL: ClassVar = 2**15
    """The largest number of entries of a weight for which numpy, with cheaper calls, beats torch, with more threads."""

    def __init__(self, masks: MaskSet, weights: Mapping[str, nn.Parameter]) -> None:
        self.changes = masks.changes
        found = [(weight, bits) for name, weight in weights.items() if (bits := masks.bits(name, weight)) is not None]
        fits = sum([bits.numel() for _, bits in found]) <= self.WIDE
        self._parts = [(weight, bits, *self._prepared(weight, bits, fits)) for weight, bits in found]

    def _prepared(self, weight: Tensor, bits: Tensor, wide: bool) -> tuple[Tensor | None, Any]:
        """The mask in the form that torch applies, or else numpy; neither of them where bytes are applied as they are."""
        if not weight.is_cpu or weight.dtype != torch.float32:
            return None, None
        if not wide:
            return None, bits.numpy() if is_for_one_thread(weight) else None
        widened = torch.empty_like(weight, dtype=torch.int32, requires_grad=False).copy_(bits)
        for_numpy = torch.get_num_threads() == 1 or bits.numel() <= self.SMALL
        return (None, widened.numpy()) if for_numpy else (widened, None)

    def press_gradients(self) -> None:
        """Set the gradients of dropped entries to zero; called without autograd."""
        for weight, bits, wide, array in self._parts:
            gradient = weight.grad
            if gradient is None:
                continue
            if gradient.requires_grad or (wide is None and array is None):
                apply_bits_(gradient, bits)
            elif wide is not None:
                gradient.view(torch.int32).bitwise_and_(wide)
            else:
                raw = gradient.numpy().view(np.int32)
                np.bitwise_and(raw, array, raw)

    @torch.no_grad()
    def press_weights(self) -> None:
        """Set dropped entries to zero."""
        for weight, bits, _, _ in self._parts:
            apply_bits_(weight, bits)


class LiveMasks(Masks):
    """Masks that follow variables: positive means kept. Nothing is stored; everything is recomputed on access.

    Args:
        variables: by name of the weight, in its shape; they may change in place.
        layouts: of weights of which this rank holds a shard.

    Example:
        >>> variables = {"fc.weight": torch.tensor([0.1, -0.1])}
        >>> masks = LiveMasks(variables)
        >>> _ = variables["fc.weight"].sub_(1)
        >>> masks.counts
        {'fc.weight': 0}
    """

    live = True

    def __init__(self, variables: Mapping[str, Tensor], layouts: Mapping[str, Layout] | None = None) -> None:
        self.variables, self._layouts = variables, layouts or {}

    @property
    def layouts(self) -> Mapping[str, Layout]:
        return self._layouts

    def __getitem__(self, name: str) -> Tensor:
        return self.variables[name] > 0

    def __iter__(self) -> Iterator[str]:
        return iter(self.variables)

    def numel(self, name: str) -> int:
        return self._layouts[name].numel if name in self._layouts else self.variables[name].numel()

    @property
    def counts(self) -> dict[str, int]:
        return self.added_up({name: (variable > 0).sum() for name, variable in self.variables.items()})


def _layouts(weights: Mapping[str, Tensor]) -> dict[str, Layout]:
    return {name: layout for name, weight in weights.items() if (layout := layout_of(weight)) is not None}
