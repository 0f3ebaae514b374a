"""Methods that learn the magnitude below which weights are dropped."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from lightning_sparse.core import LiveMasks, Remembered, Target, check_number
from lightning_sparse.families.shadow_weights import ShadowWeights
from lightning_sparse.functional import beyond
from lightning_sparse.loop import Step

__all__ = ["LearnedThreshold"]


class LearnedThreshold(ShadowWeights):
    """A method that keeps the weights above a threshold, and learns the threshold together with them.

    The callback owns the threshold parameters and moves them by gradient descent with momentum, at the learning rate of the
    weights. A method defines how thresholds are computed and what the gradients are.

    Args:
        learning_rate: learning rate of the threshold parameters; None uses that of the weights, step by step.
        momentum: their momentum, in [0, 1).
    """

    refused: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("sparsity", "allocation", "structure", "layer_sparsity"),
        "thresholds are learned, so sparsity is not set in advance; more strength is sparser",
    )

    sources = Remembered[dict[str, Tensor]](dict, over="outputs")
    """The threshold parameters, by weight; in float32 or wider."""
    velocity = Remembered[dict[str, Tensor]](dict, over="outputs")
    """Their momentum."""
    alive = Remembered[dict[str, Tensor]](dict, over="entries")
    """The current masks; True is above the threshold."""

    def __init__(
        self,
        *,
        learning_rate: float | None = None,
        momentum: float = 0.9,
        targets: str | Sequence[str] = ("*",),
        name: str | None = None,
    ) -> None:
        super().__init__(targets=targets, name=name)
        self.learning_rate, self.momentum = learning_rate, momentum
        self._gradients: dict[str, Tensor] = {}
        self._masks = LiveMasks({})
        if learning_rate is not None:
            check_number("learning_rate", learning_rate)
        if not (isinstance(momentum, int | float) and 0 <= momentum < 1):
            raise ValueError(f"momentum={momentum!r} must be in [0, 1).")

    @abstractmethod
    def initial(self, target: Target) -> Tensor:
        """The initial threshold parameters of a weight."""

    @abstractmethod
    def threshold(self, name: str) -> Tensor:
        """The thresholds of a weight, in a shape that broadcasts over it."""

    @abstractmethod
    def differentiate(self, name: str, weight: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the loss with respect to the dense weight and its threshold parameters.

        Args:
            name: name of the weight.
            weight: the dense weight.
            gradient: of the loss with respect to the weight that the model shows; may be overwritten.
        """

    @abstractmethod
    def pull(self, name: str) -> Tensor:
        """The gradient of the penalty with respect to the threshold parameters."""

    def thresholds_moved(self, name: str, dense: Tensor) -> None:
        """Called after the thresholds have moved."""

    @property
    def mask_set(self) -> LiveMasks:
        if self._masks.variables is not self.alive:
            self._masks = LiveMasks(self.alive, self.layouts.get("entries"))
        return self._masks

    def begin(self) -> None:
        for target in self.chosen:
            wide = torch.promote_types(target.weight.dtype, torch.float32)
            self.sources[target.name] = self.initial(target).to(target.weight.device, wide)
            self.velocity[target.name] = torch.zeros_like(self.sources[target.name])
            self.alive[target.name] = torch.ones_like(target.weight, dtype=torch.bool)
        super().begin()

    def shown(self, name: str, dense: Tensor) -> Tensor:
        return beyond(dense, self.threshold(name), self.alive[name])

    def epoch_end(self) -> Mapping[str, float | Tensor]:
        counts = self.mask_set.counts
        for name, kept in counts.items():
            if kept == 0:
                self.warn_of_empty(name, f"Lower the strength, or exclude the layer with targets=['!{name}'].")
        return {"kept": float(sum(counts.values()))}

    def before_step(self, step: Step) -> None:
        super().before_step(step)
        for name, weight in step.weights.items():
            if weight.grad is None:
                continue  # its optimizer skips it, so this does too
            by_weight, by_source = self.differentiate(name, weight, weight.grad)
            if step.gradient_scale is not None:
                by_source = by_source / step.gradient_scale
            self._gradients[name] = by_source.to(self.sources[name]) + self.pull(name)
            weight.grad.copy_(by_weight)

    def silence(self, step: Step) -> None:
        """Do nothing: `differentiate` already gave the gradients of dropped entries."""

    def after_step(self, step: Step) -> None:
        for name, weight in step.weights.items():
            if weight.grad is None:
                continue
            rate = step.learning_rate(name) if self.learning_rate is None else self.learning_rate
            self.velocity[name].mul_(self.momentum).add_(self._gradients.pop(name))
            self.sources[name].sub_(self.velocity[name] * rate)
            self.thresholds_moved(name, weight)
        super().after_step(step)

    def numbers(self) -> Mapping[str, float | Tensor]:
        """The mean over layers of their mean thresholds."""
        means = [self._mean(name, self.threshold(name)) for name in self.weights]
        return {"threshold": torch.stack(means).mean()}

    def _mean(self, name: str, threshold: Tensor) -> Tensor:
        layout = self.layouts.get("outputs", {}).get(name)
        if layout is None or threshold.ndim == 0:
            return threshold.mean()
        return self.total(name)(threshold.sum()) / layout.numel
