"""Sparse evolutionary training: grow at random."""

from __future__ import annotations

from typing import ClassVar, final

from torch import Tensor

from lightning_sparse.families.rewiring import Rewiring
from lightning_sparse.functional import hashed_score, magnitude, random_generator
from lightning_sparse.loop import Shards

__all__ = ["SET"]


@final
class SET(Rewiring):
    """Drop the smallest weights, grow others at random.

    Source: Mocanu et al. 2018, "Scalable training of artificial neural networks with adaptive sparse connectivity inspired
    by network science", https://arxiv.org/abs/1707.04780. The smallest weights are those of lowest magnitude, as in the
    later comparisons of Evci et al. 2020 and Liu et al. 2021, whose annealed drop fraction is also the default. The original
    drops positive and negative weights separately; the closest setting is
    `SET(0.9, allocation='er', every='1 epoch', end=1.0, drop_schedule='constant')`.

    For the arguments see `Rewiring`. No gradient is read or kept.

    Example:
        >>> SET(sparsity=0.9).label
        'SET'
    """

    shards: ClassVar[Shards] = "any"

    reads_gradients = False

    def keep_score(self, name: str, weight: Tensor, gradient: Tensor) -> Tensor:
        return magnitude(weight)

    def grow_score(self, name: str, weight: Tensor, gradient: Tensor) -> Tensor:
        return hashed_score(weight, random_generator(self.drawn_seed, self.updates, name), self.places(name))
