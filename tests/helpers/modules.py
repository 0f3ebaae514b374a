"""Toys in which numbers can be compared closely, and one with the mixin."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_sparse.loop import SparsityMixin
from lightning_sparse.testing import Toy, network, toy


def double(cls: type[Toy], **options: Any) -> Toy:
    """A toy in float64 that draws no random numbers."""
    module = cls(net=network(dropout=0), **options).double()
    module.load_state_dict({name: value.double() for name, value in toy().state_dict().items()})
    return module


class AutomaticMixin(SparsityMixin, Toy):
    """Asks for its penalty by itself."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch) + self.sparsity_penalty()
