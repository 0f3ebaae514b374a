"""Tensors of which every rank holds a part: what an exact selection must know about them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Chosen", "Share", "Spread"]


class Share(Protocol):
    """The part of one tensor that this rank holds."""

    @property
    def numel(self) -> int:
        """How many entries the whole tensor has."""

    @property
    def counts(self) -> bool:
        """Whether this rank's part is counted; of copies of one part only one is."""

    def places(self, entries: Tensor) -> Tensor:
        """Where entries of the part, given by their flat positions, lie in the whole, flat too."""


@dataclass(frozen=True)
class Chosen:
    """Some entries of a share, as a tensor of their own; their order is that of the share.

    Args:
        share: that they are from.
        entries: their flat positions in this rank's part.
        numel: how many have been chosen on all ranks together.
    """

    share: Share
    entries: Tensor
    numel: int

    @property
    def counts(self) -> bool:
        return self.share.counts

    def places(self, entries: Tensor) -> Tensor:
        return self.share.places(self.entries[entries])


@dataclass(frozen=True)
class Spread:
    """Several tensors over several ranks.

    Args:
        total: the sum of a small tensor over all ranks; every rank must call it, and each gets the sum.
        shares: one per tensor.
    """

    total: Callable[[Tensor], Tensor]
    shares: Sequence[Share]

    @property
    def numel(self) -> int:
        """How many entries all whole tensors have together."""
        return sum([share.numel for share in self.shares])

    def counted(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The parts that count on this rank."""
        return [tensor for tensor, share in zip(tensors, self.shares, strict=True) if share.counts]

    def sums(self, numbers: Sequence[Tensor]) -> list[int]:
        """Whole numbers, one or more 0-d tensors per share in a row, summed over all ranks; waits for the device once."""
        each = len(numbers) // len(self.shares)
        mine = [number * self.shares[index // each].counts for index, number in enumerate(numbers)]
        return self.total(torch.stack(mine).long()).tolist()

    def any(self, flags: Sequence[Tensor]) -> bool:
        """Whether one of the 0-d flags is true on any rank."""
        return bool(self.total(torch.stack(list(flags)).any().long()))

    def chosen(self, masks: Sequence[Tensor], numbers: Sequence[int]) -> Spread:
        """The same for those entries that masks choose.

        Args:
            masks: one per share.
            numbers: how many each of them chooses on all ranks together.
        """
        entries = [mask.flatten().nonzero().squeeze(1) for mask in masks]
        return Spread(self.total, [Chosen(*parts) for parts in zip(self.shares, entries, numbers, strict=True)])
