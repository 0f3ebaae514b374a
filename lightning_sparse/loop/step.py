"""One step of one optimizer, as a method sees it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_sparse.core import owner_of

__all__ = ["Step"]


@dataclass
class Step:
    """One step of one optimizer, as a method sees it.

    Args:
        optimizer: the optimizer that is about to move, or has moved.
        weights: the method's weights that this optimizer owns, as far as this rank holds them.
        gradient_scale: the current scale of the gradients if the optimizer itself unscales them (fused optimizers in 16-bit
            mixed precision), otherwise None.
        replaced: whether the method replaces this step; then the optimizer finds no gradients, and none of its weights,
            moments and counters move. A method sets it at station `silence`.
    """

    optimizer: Optimizer
    weights: Mapping[str, nn.Parameter]
    gradient_scale: Tensor | None = None
    replaced: bool = False

    def learning_rate(self, name: str) -> float | Tensor:
        """The current learning rate of one weight."""
        weight = owner_of(self.weights[name])
        for group in self.optimizer.param_groups:
            if any(parameter is weight for parameter in group["params"]):
                return group["lr"]  # type: ignore[no-any-return]
        raise KeyError(name)

    def add_gradients(self, gradients: Iterable[tuple[str, Tensor]]) -> None:
        """Add to the gradients of weights, at their current scale."""
        for name, gradient in gradients:
            weight = self.weights[name]
            if self.gradient_scale is not None:
                gradient = gradient * self.gradient_scale
            if weight.grad is None:
                weight.grad = gradient.to(weight.dtype).clone()
            else:
                weight.grad.add_(gradient)
