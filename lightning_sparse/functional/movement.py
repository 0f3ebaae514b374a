"""Scores that are summed over the steps of a training: movement, Taylor expansion, Fisher information."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

__all__ = ["MOVEMENT_SCORES", "MovementScore"]


class MovementScore(NamedTuple):
    """A score of weights that is accumulated over a training.

    Args:
        of_step: what a step adds to a sum, from the weights and their gradients.
        of_sum: the score, from the current weights and the sum; higher survives.
    """

    of_step: Callable[[Tensor, Tensor], Tensor]
    of_sum: Callable[[Tensor, Tensor], Tensor]


def _movement(weight: Tensor, gradient: Tensor) -> Tensor:
    return -(weight * gradient)


def _taylor(weight: Tensor, gradient: Tensor) -> Tensor:
    return (weight * gradient).square()


def _fisher(weight: Tensor, gradient: Tensor) -> Tensor:
    return gradient.square()


def _as_it_is(weight: Tensor, total: Tensor) -> Tensor:
    return total.clone()


def _loss_without(weight: Tensor, total: Tensor) -> Tensor:
    return weight.to(total).square() * total / 2


MOVEMENT_SCORES = {
    "movement": MovementScore(_movement, _as_it_is),
    "taylor": MovementScore(_taylor, _as_it_is),
    "fisher": MovementScore(_fisher, _loss_without),
}
"""By name; the sources are with `MovementPruning`."""
