"""Magnitude pruning, one-shot and gradual."""

from __future__ import annotations

from typing import ClassVar, final

from torch import Tensor

from lightning_sparse.families.pruning import Pruning
from lightning_sparse.functional import magnitude
from lightning_sparse.loop import Shards

__all__ = ["MagnitudePruning"]


@final
class MagnitudePruning(Pruning):
    """Remove the smallest weights, all at once or gradually.

    Sources: Han et al. 2015, "Learning both Weights and Connections for Efficient Neural Networks",
    https://arxiv.org/abs/1506.02626 (one-shot); Zhu and Gupta 2017, "To prune, or not to prune",
    https://arxiv.org/abs/1710.01878 (gradual, the default).

    For the arguments see `Pruning`. One-shot in the middle of the run: `MagnitudePruning(0.9, start=0.5, end=0.5)`.

    Example:
        >>> MagnitudePruning(sparsity=0.9).label
        'MagnitudePruning'
    """

    shards: ClassVar[Shards] = "any"

    def score(self, name: str, weight: Tensor) -> Tensor:
        return magnitude(weight)
