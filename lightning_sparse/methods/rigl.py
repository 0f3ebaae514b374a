"""Rigged lottery: grow where the loss pulls hardest."""

from __future__ import annotations

from typing import ClassVar, final

from torch import Tensor

from lightning_sparse.families.rewiring import Rewiring
from lightning_sparse.functional import magnitude
from lightning_sparse.loop import Shards

__all__ = ["RigL"]


@final
class RigL(Rewiring):
    """Drop the smallest weights, grow where the dense gradient is largest.

    Source: Evci et al. 2020, "Rigging the Lottery: Making All Tickets Winners", https://arxiv.org/abs/1911.11134, and the
    official repository google-research/rigl. As there, an update takes the place of an optimizer step: for that step no
    parameter of the optimizer moves. There the first update falls on the very first step, here one interval later. The
    paper updates every 100 steps of 32,000 (`every=0.003`); the default is rarer, so that short runs do well too.

    A batch norm divides the gradients of an output without connections by the root of its `eps`, and growth goes there: in a
    narrow ResNet-20 at 98 %, where outputs run dry, `SET` did better (docs/evidence.md).

    For the arguments see `Rewiring`.

    Example:
        >>> RigL(sparsity=0.9).label
        'RigL'
    """

    shards: ClassVar[Shards] = "any"

    takes_steps = True

    def keep_score(self, name: str, weight: Tensor, gradient: Tensor) -> Tensor:
        return magnitude(weight)

    def grow_score(self, name: str, weight: Tensor, gradient: Tensor) -> Tensor:
        return magnitude(gradient)
