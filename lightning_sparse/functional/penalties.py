r"""Penalties on one weight tensor in closed form: value, gradient, and the proximal map where there is one.

All take the output dimension, or several dimensions for stacked matrices; only the group lasso uses it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_sparse.functional.dims import Dims, others

__all__ = ["PENALTIES", "Penalty"]


Total = Callable[[Tensor], Tensor]
"""Turns sums over a shard of a weight into sums over all of it; rows of outputs are never split."""


def alone(sums: Tensor) -> Tensor:
    """The shard is the whole."""
    return sums


@dataclass(frozen=True)
class Penalty:
    r"""A penalty R and its derivatives.

    Args:
        value: R(w), a 0-d tensor, given (w, dim, total).
        gradient: dR/dw, given the same, one of the subgradients where R has a kink: zero for what is zero.
        proximal_: moves w in place to $\arg\min_u \frac12 \|u - w\|^2 + t\,R(u)$, given (w, t, dim); None where this has
            no closed form. With t = learning rate x strength after a gradient step on the loss alone it is one step of
            proximal gradient descent, which makes exact zeros if the penalty has a kink there.
    """

    value: Callable[[Tensor, Dims, Total], Tensor]
    gradient: Callable[[Tensor, Dims, Total], Tensor]
    proximal_: Callable[[Tensor, float | Tensor, Dims], None] | None = None


def l1(weight: Tensor, dim: Dims = 0, total: Total = alone) -> Tensor:
    """The sum of magnitudes."""
    return total(_wide(weight).abs().sum())


def l1_gradient(weight: Tensor, dim: Dims = 0, total: Total = alone) -> Tensor:
    """The sign."""
    return weight.sign()


def soft_threshold_(weight: Tensor, threshold: float | Tensor, dim: Dims = 0) -> None:
    """Move every entry toward zero by the threshold; an entry that would cross zero becomes zero.

    Example:
        >>> weight = torch.tensor([-3.0, 0.5, 2.0])
        >>> soft_threshold_(weight, 1.0)
        >>> weight
        tensor([-2.,  0.,  1.])
    """
    threshold = torch.as_tensor(threshold, dtype=weight.dtype, device=weight.device)
    weight.sub_(weight.clamp(-threshold, threshold))


def l2(weight: Tensor, dim: Dims = 0, total: Total = alone) -> Tensor:
    """Half the squared norm, whose gradient is the weight: weight decay."""
    return total(_wide(weight).square().sum()) / 2


def l2_gradient(weight: Tensor, dim: Dims = 0, total: Total = alone) -> Tensor:
    """The weight itself."""
    return weight.clone()


def shrink_(weight: Tensor, threshold: float | Tensor, dim: Dims = 0) -> None:
    """Multiply every entry by the same factor, 1 / (1 + t)."""
    weight.div_(1 + threshold)


def group_lasso(weight: Tensor, dim: Dims = 0, total: Total = alone) -> Tensor:
    r"""The norms of all output channels, each times the root of its size: $\sum_c \sqrt{n} \, \|w_c\|_2$.

    Source: Yuan and Lin 2006, "Model selection and estimation in regression with grouped variables",
    https://doi.org/10.1111/j.1467-9868.2005.00532.x.
    """
    return _root_size(weight, dim) * total(_norms(weight, dim).sum())


def group_lasso_gradient(weight: Tensor, dim: Dims = 0, total: Total = alone) -> Tensor:
    """Each channel as a unit vector, times the root of its size; zero for a channel that is zero."""
    norms = _norms(weight, dim)
    scale = torch.where(norms > 0, _root_size(weight, dim) / norms, 0.0)
    return weight * scale.to(weight.dtype)


def group_soft_threshold_(weight: Tensor, threshold: float | Tensor, dim: Dims = 0) -> None:
    """Move every channel's norm toward zero by the threshold times the root of its size; short channels become zero.

    Example:
        >>> weight = torch.tensor([[3.0, 4.0], [0.1, 0.1]])
        >>> group_soft_threshold_(weight, 2.5 / 2**0.5)
        >>> weight
        tensor([[1.5000, 2.0000],
                [0.0000, 0.0000]])
    """
    norms = _norms(weight, dim)
    reach = threshold * _root_size(weight, dim)
    weight.mul_(torch.where(norms > reach, 1 - reach / norms, 0.0).to(weight.dtype))


def hoyer(weight: Tensor, dim: Dims = 0, total: Total = alone) -> Tensor:
    r"""Hoyer-Square: $(\sum_i |w_i|)^2 / \sum_i w_i^2$, between 1 (one entry left) and n (all alike), whatever the scale.

    Source: Yang, Wen and Li 2020, "DeepHoyer: Learning Sparser Neural Network with Differentiable Scale-Invariant
    Sparsity Measures", https://arxiv.org/abs/1908.09979.
    """
    weight = _wide(weight)
    size, energy = total(torch.stack([weight.abs().sum(), weight.square().sum()])).unbind()
    return torch.where(energy > 0, size.square() / energy, 0.0)


def hoyer_gradient(weight: Tensor, dim: Dims = 0, total: Total = alone) -> Tensor:
    r"""With $r = \sum |w| / \sum w^2$, $2 r \,(sign(w) - r\,w)$: entries below 1/r shrink, those above it grow."""
    wide = _wide(weight)
    size, energy = total(torch.stack([wide.abs().sum(), wide.square().sum()])).unbind()
    ratio = torch.where(energy > 0, size / energy, 0.0)
    return wide.sign().sub_(ratio * wide).mul_(2 * ratio).to(weight.dtype)


def _wide(weight: Tensor) -> Tensor:
    return weight.float() if weight.dtype in (torch.float16, torch.bfloat16) else weight


def _norms(weight: Tensor, dim: Dims) -> Tensor:
    """The norm of every output channel, in the shape that broadcasts over the weight."""
    norms: Tensor = torch.linalg.vector_norm(_wide(weight), dim=others(weight, dim), keepdim=True)
    return norms


def _root_size(weight: Tensor, dim: Dims) -> float:
    return math.sqrt(math.prod(weight.shape[d] for d in others(weight, dim)))


PENALTIES: dict[str, Penalty] = {
    "l1": Penalty(l1, l1_gradient, soft_threshold_),
    "l2": Penalty(l2, l2_gradient, shrink_),
    "group_lasso": Penalty(group_lasso, group_lasso_gradient, group_soft_threshold_),
    "hoyer": Penalty(hoyer, hoyer_gradient),
}
"""The penalties by name, each with its gradient and, where it has one, its proximal map."""
