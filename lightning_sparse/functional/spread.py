"""Tensors of which every rank holds a part, and what an exact selection must know about them."""

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
        """The number of entries of the whole tensor."""

    @property
    def counts(self) -> bool:
        """Whether this rank's part is counted; of several copies of a part only one is."""

    def places(self, entries: Tensor) -> Tensor:
        """Convert flat positions in this part to flat positions in the whole tensor."""


@dataclass(frozen=True)
class Chosen:
    """Some entries of a share, as a separate tensor in the same order.

    Args:
        share: the share that contains them.
        entries: their flat positions in this rank's part.
        numel: number of chosen entries on all ranks together.
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
        total: returns the sum of a small tensor over all ranks; every rank must call it, and all get the sum.
        shares: one per tensor.
    """

    total: Callable[[Tensor], Tensor]
    shares: Sequence[Share]

    @property
    def numel(self) -> int:
        """The number of entries of all whole tensors together."""
        return sum([share.numel for share in self.shares])

    def counted(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The parts that are counted on this rank."""
        return [tensor for tensor, share in zip(tensors, self.shares, strict=True) if share.counts]

    def sums(self, numbers: Sequence[Tensor]) -> list[int]:
        """Sum integers over all ranks, given as one or more 0-d tensors per share; synchronizes with the device once."""
        each = len(numbers) // len(self.shares)
        mine = [number * self.shares[index // each].counts for index, number in enumerate(numbers)]
        return self.total(torch.stack(mine).long()).tolist()

    def any(self, flags: Sequence[Tensor]) -> bool:
        """Whether one of the 0-d flags is true on any rank."""
        return bool(self.total(torch.stack(list(flags)).any().long()))

    def chosen(self, masks: Sequence[Tensor], numbers: Sequence[int]) -> Spread:
        """The same for the entries that masks choose.

        Args:
            masks: one per share.
            numbers: number of entries that each mask chooses on all ranks together.
        """
        entries = [mask.flatten().nonzero().squeeze(1) for mask in masks]
        return Spread(self.total, [Chosen(*parts) for parts in zip(self.shares, entries, numbers, strict=True)])
