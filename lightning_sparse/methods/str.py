"""STR: every layer learns by how much its weights are made smaller, and where that leaves nothing."""

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
    r"""Learn a threshold for every layer; weights are used smaller by it, and those below it are dropped.

    A weight w of layer l is used as $sign(w) \max(|w| - \sigma(s_l), 0)$ with the logistic function; weight decay pulls
    s, which starts below zero, up toward zero:

    $$ \frac{\partial L}{\partial s} = -\sigma'(s) \sum_{|w| > \sigma(s)} g\, sign(w) + \lambda s $$

    So layers find their own sparsity, which comes out as it comes; more decay is sparser. Dropped weights get no gradient,
    but the optimizer's weight decay and moments go on moving them, and a falling threshold lets them return.

    Dense weights and thresholds are the callback's; the model holds the weights as they are used, with exact zeros. At
    stations `before_step` and `after_step`, at the cost of some twelve passes over the weights per step, and of one more
    copy of them and a byte per weight in memory.

    Source: Kusupati et al. 2020, "Soft Threshold Weight Reparameterization for Learnable Sparsity",
    https://arxiv.org/abs/2002.03231. The default values are ours: which sparsity they give depends on the recipe.

    Args:
        strength: lambda, the weight decay of s, from 0 up.
        initial_threshold: sigma(s) at the start, in (0, 0.5).
        learning_rate: of s; None is that of the weights, step by step.
        momentum: of s, in [0, 1).
        targets: patterns that choose the weights; see `core.find_targets`.
        name: tells two callbacks of one class apart.

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
        """As in `ShadowWeights`, but what is hidden is what the model does not show: of kept weights, the threshold.

        Nothing is lost by rounding: a weight minus what is left of it is a number of the same precision.
        """
        averages = self.run.averages()
        for name, weight in weights.items():
            dense = self.hidden[name].copy_(weight)
            bits = mask_bits(self.shown(name, dense))
            threshold = self.threshold(name)
            limit: Any = threshold.item() if threshold.is_cpu else threshold  # by plain numbers torch clamps twice as fast
            weight.sub_(dense.clamp(-limit, limit))  # `soft_threshold`, in place
            apply_bits_(weight, bits)
            dense.sub_(weight)
            for average in averages:
                apply_bits_(average[name], bits.to(average[name].device))

    def resume(self) -> None:
        for name, weight in self.weights.items():
            hidden, threshold = self.hidden[name], self.threshold(name)
            ours = soft_threshold(hidden + weight, threshold).to(weight.dtype) == weight
            hidden.copy_(torch.where(ours, hidden, weight.sign() * threshold))  # what the model shows counts
        self.take_in(self.weights)
