"""Weights cut off at a threshold that is learned: what remains, and the gradients through it."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_sparse.functional.live import beyond
from lightning_sparse.functional.masks import apply_bits_, mask_bits

__all__ = ["long_tailed_slope", "soft_threshold", "soft_threshold_slope", "step_threshold_gradients"]


def long_tailed_slope(x: Tensor) -> Tensor:
    r"""A stand-in for the derivative of the unit step: $2 - 4|x|$ up to 0.4, then 0.4 up to 1, and 0 beyond.

    Source: Liu et al. 2020, "Dynamic Sparse Training: Find Efficient Sparse Network From Scratch With Trainable Masked
    Layers", https://arxiv.org/abs/2005.06870.

    Example:
        >>> long_tailed_slope(torch.tensor([0.0, -0.25, 0.7, 1.5]))
        tensor([2.0000, 1.0000, 0.4000, 0.0000])
    """
    inside = mask_bits(~beyond(x, x.new_ones(()), torch.empty_like(x, dtype=torch.bool)))
    slope = x.abs().mul_(-4).add_(2).clamp_(min=0.4)
    apply_bits_(slope, inside)
    return slope


def step_threshold_gradients(weight: Tensor, threshold: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    r"""Gradients of a loss through $q = w \cdot step(|w| - t)$, with the long-tailed slope h of the step.

    $$ \frac{\partial L}{\partial w} = g \,\big(step(|w| - t) + |w|\, h(|w| - t)\big), \qquad
       \frac{\partial L}{\partial t} = -g \, w \, h(|w| - t) $$

    Args:
        weight: w, dense.
        threshold: t, in a shape that broadcasts over the weight.
        gradient: g, of the loss by q, dense.

    Returns:
        the gradient by w, and the gradient by t before the sum over the entries that share a threshold.
    """
    size = weight.abs()
    excess = size - threshold
    slope = long_tailed_slope(excess)
    step = excess.sign_().clamp_(min=0)  # as numbers: adding a boolean mask converts it at full size first
    return step.add_(size * slope).mul_(gradient), slope.mul_(gradient.neg().mul_(weight))


def soft_threshold(weight: Tensor, threshold: Tensor) -> Tensor:
    r"""$sign(w) \max(|w| - t, 0)$ for t of at least zero.

    Example:
        >>> soft_threshold(torch.tensor([-3.0, 0.5, 2.0]), torch.tensor(1.0))
        tensor([-2.,  0.,  1.])
    """
    return weight - weight.clamp(-threshold, threshold)


def soft_threshold_slope(weight: Tensor, threshold: Tensor) -> Tensor:
    """How the soft threshold of a weight moves with the threshold: against its sign, if it is beyond."""
    slope = weight.sign().neg_()
    apply_bits_(slope, mask_bits(beyond(weight, threshold, torch.empty_like(weight, dtype=torch.bool))))
    return slope
