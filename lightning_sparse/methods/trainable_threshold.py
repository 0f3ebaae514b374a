"""Trainable thresholds: every output unit learns the magnitude below which its weights are dropped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, final

import torch
from torch import Tensor

from lightning_sparse.core import Target, check_number
from lightning_sparse.families.learned_threshold import LearnedThreshold
from lightning_sparse.functional import step_threshold_gradients
from lightning_sparse.loop import Shards

__all__ = ["TrainableThreshold"]


@final
class TrainableThreshold(LearnedThreshold):
    r"""Learn a threshold for every output unit; weights below it are dropped, and may return.

    A weight w of unit c is used as $w \cdot step(|w| - t_c)$, thresholds start at zero, and

    $$ L \leftarrow L + \alpha \sum_c e^{-t_c} $$

    raises them. The step's derivative is replaced by a long-tailed slope, so thresholds and dropped weights learn too. When
    a layer has lost all but a hundredth of its weights, all its thresholds return to zero. The sparsity is not set in
    advance; more strength is sparser. Thresholds move by gradient descent, whatever the optimizer of the weights is.

    The callback keeps dense weights and thresholds; the model holds kept weights and exact zeros. Runs at stations
    `before_step` and `after_step`. Costs about fifteen passes over the weights per step, plus one more copy of the weights
    and one byte per weight in memory.

    Source: Liu et al. 2020, "Dynamic Sparse Training: Find Efficient Sparse Network From Scratch With Trainable Masked
    Layers", https://arxiv.org/abs/2005.06870. There the thresholds are parameters of the model's own optimizer.

    Args:
        strength: alpha, at least 0; the published value for CIFAR-10 with SGD at a rate of 0.1 over 160 epochs is 5e-6.
        learning_rate: learning rate of the thresholds; None uses that of their weights, step by step.
        momentum: momentum of the thresholds, in [0, 1).
        targets: patterns that select the weights; see `core.find_targets`.
        name: distinguishes several callbacks of the same class.

    Example:
        >>> TrainableThreshold(strength=1e-5).label
        'TrainableThreshold'
    """

    shards: ClassVar[Shards] = "any"

    def __init__(
        self,
        *,
        strength: float = 5e-6,
        learning_rate: float | None = None,
        momentum: float = 0.9,
        targets: str | Sequence[str] = ("*",),
        name: str | None = None,
    ) -> None:
        super().__init__(learning_rate=learning_rate, momentum=momentum, targets=targets, name=name)
        self.strength = strength
        check_number("strength", strength)

    def misfit(self, target: Target) -> str | None:
        if target.parts_outputs:
            return "is sharded along its inputs, and the threshold of an output needs all of them on one rank"
        return super().misfit(target)

    @property
    def dropped_learn(self) -> bool:
        return True

    def initial(self, target: Target) -> Tensor:
        shape = [1] * target.weight.ndim
        for dim in target.output_dims:
            shape[dim] = target.weight.shape[dim]  # the size of this rank's shard
        return torch.zeros(shape)

    def threshold(self, name: str) -> Tensor:
        return self.sources[name]

    def differentiate(self, name: str, weight: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        by_weight, by_threshold = step_threshold_gradients(weight, self.sources[name], gradient)
        return by_weight, by_threshold.sum_to_size(self.sources[name].shape)

    def pull(self, name: str) -> Tensor:
        return -self.strength * torch.exp(-self.sources[name])

    def thresholds_moved(self, name: str, dense: Tensor) -> None:
        kept, size = self.total(name)(self.shown(name, dense).count_nonzero()), self.mask_set.numel(name)
        self.sources[name].masked_fill_(kept <= 0.01 * size, 0)
