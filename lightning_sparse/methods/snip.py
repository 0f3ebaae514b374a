"""SNIP: connection sensitivity at initialization."""

from __future__ import annotations

from typing import ClassVar, final

from lightning_sparse.families.pruning_at_init import PruningAtInitOnData
from lightning_sparse.functional import connection_sensitivity
from lightning_sparse.loop import Shards

__all__ = ["SNIP"]


@final
class SNIP(PruningAtInitOnData):
    r"""Before the first batch, keep the weights to which the loss is most sensitive; then train with a fixed mask.

    $$ s = |w \, \partial L / \partial w| $$

    at the initial weights, on `batches` batches of the training set. Costs one forward and one backward pass per batch,
    once.

    Source: Lee, Ajanthan and Torr 2019, "SNIP: Single-shot network pruning based on connection sensitivity",
    https://arxiv.org/abs/1810.02340.

    For the arguments see `PruningAtInitOnData`.

    Example:
        >>> SNIP(sparsity=0.9, batches=4).label
        'SNIP'
    """

    shards: ClassVar[Shards] = "any"

    def choose_masks(self) -> None:
        gradients = self.mean_over_data(self.gradient)
        scores = [connection_sensitivity(w, g) for w, g in zip(self.weights.values(), gradients, strict=True)]
        self.keep_best(scores)
