"""STR: every layer learns a soft threshold for its weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from lightning_sparse.core import Target, check_number
from lightning_sparse.families.learned_threshold import LearnedThreshold
from lightning_sparse.functional import apply_bits_, mask_bits, soft_threshold, soft_threshold_slope
from lightning_sparse.loop import Shards

__all__ = ["STR"]


@final
class STR(LearnedThreshold):
    r"""Learn a soft threshold for every layer; weights shrink by it, and those below it are dropped.

    A weight w of layer l is used as $sign(w) \max(|w| - \sigma(s_l), 0)$ with the logistic function; weight decay pulls s,
    which starts below zero, up toward zero:

    $$ \frac{\partial L}{\partial s} = -\sigma'(s) \sum_{|w| > \sigma(s)} g\, sign(w) + \lambda s $$

    So layers find their own sparsity, which is not set in advance; more decay is sparser. Dropped weights get no gradient,
    but the optimizer's weight decay and moments keep moving them, and a falling threshold lets them return.

    The callback keeps dense weights and thresholds; the model holds the thresholded weights, with exact zeros. Runs at
    stations `before_step` and `after_step`. Costs about twelve passes over the weights per step, plus one more copy of the
    weights and one byte per weight in memory.

    Source: Kusupati et al. 2020, "Soft Threshold Weight Reparameterization for Learnable Sparsity",
    https://arxiv.org/abs/2002.03231. The default values are ours; the sparsity they give depends on the recipe.

    Args:
        strength: lambda, the weight decay of s, at least 0.
        initial_threshold: initial value of sigma(s), in (0, 0.5).
        learning_rate: learning rate of s; None uses that of the weights, step by step.
        momentum: momentum of s, in [0, 1).
        targets: patterns that select the weights; see `core.find_targets`.
        name: distinguishes several callbacks of the same class.

    Example:
        >>> STR(strength=1e-3).label
        'STR'
    """

    shards: ClassVar[Shards] = "any"

    refused: ClassVar[Mapping[str, str]] = {
        **LearnedThreshold.refused,
        "decay": "the weight decay of s is called strength, like every factor of a penalty",
    }

    def __init__(
        self,
        *,
        strength: float = 5e-4,
        initial_threshold: float = 1e-3,
        learning_rate: float | None = None,
        momentum: float = 0.9,
        targets: str | Sequence[str] = ("*",),
        name: str | None = None,
    ) -> None:
        super().__init__(learning_rate=learning_rate, momentum=momentum, targets=targets, name=name)
        self.strength, self.initial_threshold = strength, initial_threshold
        check_number("strength", strength)
        if not (isinstance(initial_threshold, float) and 0 < initial_threshold < 0.5):
            raise ValueError(f"initial_threshold={initial_threshold!r} must be in (0, 0.5).")

    def initial(self, target: Target) -> Tensor:
        return torch.tensor(math.log(self.initial_threshold / (1 - self.initial_threshold)), dtype=torch.float64)

    def threshold(self, name: str) -> Tensor:
        return self.sources[name].sigmoid()

    def differentiate(self, name: str, weight: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        threshold = self.threshold(name)
        slope = soft_threshold_slope(weight, threshold)
        by_threshold = self.total(name)(gradient.mul_(slope).sum()) * threshold * (1 - threshold)
        return gradient.mul_(slope), by_threshold  # the square of the slope is the mask

    def pull(self, name: str) -> Tensor:
        return self.strength * self.sources[name]

    def hide(self, weights: Mapping[str, nn.Parameter]) -> None:
        """As in `ShadowWeights`, but what is hidden is what the model does not show: for kept weights, the threshold.

        Nothing is lost in rounding: the difference of a weight and its thresholded value has the same precision.
        """
        averages = self.run.averages()
        for name, weight in weights.items():
            dense = self.hidden[name].copy_(weight)
            bits = mask_bits(self.shown(name, dense))
            threshold = self.threshold(name)
            limit: Any = threshold.item() if threshold.is_cpu else threshold  # torch clamps by plain numbers twice as fast
            weight.sub_(dense.clamp(-limit, limit))  # `soft_threshold`, in place
            apply_bits_(weight, bits)
            dense.sub_(weight)
            for average in averages:
                apply_bits_(average[name], bits.to(average[name].device))

    def resume(self) -> None:
        for name, weight in self.weights.items():
            hidden, threshold = self.hidden[name], self.threshold(name)
            ours = soft_threshold(hidden + weight, threshold).to(weight.dtype) == weight
            hidden.copy_(torch.where(ours, hidden, weight.sign() * threshold))  # the model's value wins
        self.take_in(self.weights)
