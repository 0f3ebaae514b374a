r"""Sparse connectivity learning: a unit step of trainable variables, and the gradients that move them.

Source: Tang et al. 2022, "Automatic Sparse Connectivity Learning for Neural Networks", https://arxiv.org/abs/2201.05020.
Only its abstract was at hand. From it: weight times unit step of a variable; a proxy that must be positive, identity chosen;
gradients normalized per feature; the number of connections as a penalty. The rest (norm, axis, scope) is our reading, and
steering the price toward a density is our extension.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from lightning_sparse.functional.dims import Dims, others

__all__ = [
    "FEATURE_NORMS",
    "STEP_PROXIES",
    "connection_count",
    "connection_price",
    "dead_features",
    "density_error",
    "identity_proxy",
    "leaky_relu_proxy",
    "normalize_features_",
    "softplus_proxy",
    "steer_price",
    "unit_step",
]

Proxy = Callable[[Tensor], Tensor]


def identity_proxy(variables: Tensor) -> Tensor:
    """1 everywhere: the derivative of the identity, the paper's choice."""
    return torch.ones_like(variables)


def leaky_relu_proxy(variables: Tensor, slope: float = 0.1) -> Tensor:
    """1 where positive, `slope` elsewhere: the derivative of a leaky ReLU."""
    return torch.full_like(variables, slope).masked_fill_(variables > 0, 1.0)


def softplus_proxy(variables: Tensor, sharpness: float = 1.0) -> Tensor:
    """The sigmoid, which is the derivative of softplus."""
    return torch.sigmoid(sharpness * variables)


STEP_PROXIES: dict[str, Proxy] = {
    "identity": identity_proxy,
    "leaky_relu": leaky_relu_proxy,
    "softplus": softplus_proxy,
}
"""All positive everywhere: where a proxy is zero, a variable can never move again."""


class _UnitStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, variables: Tensor, proxy: Proxy) -> Tensor:
        ctx.save_for_backward(variables)
        ctx.proxy = proxy
        return (variables > 0).to(variables.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (variables,) = ctx.saved_tensors
        return gradients[0] * ctx.proxy(variables), None


def unit_step(variables: Tensor, proxy: str | Proxy = "identity") -> Tensor:
    r"""1 where a variable is positive, else 0; backward, a proxy stands in for the derivative.

    $$ m = H(s), \qquad \frac{\partial L}{\partial s} := \frac{\partial L}{\partial m}\, p(s) $$

    Args:
        variables: s.
        proxy: p, by name (`STEP_PROXIES`) or as a function.

    Example:
        >>> s = torch.tensor([0.5, -0.5], requires_grad=True)
        >>> weight = torch.tensor([2.0, 3.0])
        >>> (weight * unit_step(s)).sum().backward()
        >>> s.grad
        tensor([2., 3.])
    """
    step: Tensor = _UnitStep.apply(variables, STEP_PROXIES[proxy] if isinstance(proxy, str) else proxy)
    return step


def _l2(gradient: Tensor, dims: tuple[int, ...]) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(gradient, dim=dims, keepdim=True)
    return norm


def _rms(gradient: Tensor, dims: tuple[int, ...]) -> Tensor:
    return _l2(gradient, dims) / math.sqrt(math.prod(gradient.shape[dim] for dim in dims))


def _max(gradient: Tensor, dims: tuple[int, ...]) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(gradient, math.inf, dim=dims, keepdim=True)
    return norm


FEATURE_NORMS: dict[str, Callable[[Tensor, tuple[int, ...]], Tensor] | None] = {
    "rms": _rms,
    "l2": _l2,
    "max": _max,
    "none": None,
}
"""What the gradient of a feature is divided by; `none` leaves it."""


def normalize_features_(gradient: Tensor, norm: str = "rms", feature: Dims | None = 0, eps: float = 1e-12) -> Tensor:
    r"""Divide the gradient of every feature by its own size, in place.

    $$ \hat g_f = g_f \Big/ \Big(\sqrt{\tfrac{1}{n}\textstyle\sum_j g_{fj}^2} + \epsilon\Big) $$

    over all n entries of a feature, kept and dropped. A feature without gradient stays zero.

    Args:
        gradient: of the task alone, in float32 or wider; what the regularizer adds comes later.
        norm: `rms` (above), `l2`, `max`, or `none`.
        feature: the dimension that counts features, or several; None takes the whole layer as one.
        eps: far below any real gradient.

    Example:
        >>> normalize_features_(torch.tensor([[3.0, -3.0], [0.0, 0.0]]))
        tensor([[ 1., -1.],
                [ 0.,  0.]])
    """
    size = FEATURE_NORMS[norm]
    return gradient if size is None else gradient.div_(size(gradient, _others(gradient, feature)).add_(eps))


def connection_count(variables: Iterable[Tensor]) -> int:
    """How many connections there are; times their price, the value of the regularizer.

    Example:
        >>> connection_count([torch.tensor([0.1, -0.1]), torch.tensor([0.0])])
        1
    """
    return sum(int((variable > 0).sum()) for variable in variables)


def dead_features(variables: Tensor, feature: Dims = 0) -> Tensor:
    """How many features have no connection left, as a 0-d tensor.

    Example:
        >>> dead_features(torch.tensor([[0.1, -0.1], [-0.1, -0.1]]))
        tensor(1)
    """
    return (variables.amax(_others(variables, feature)) <= 0).sum()


def connection_price(drive: float, unit: float) -> float:
    r"""$unit \cdot \sinh(drive)$: exponential far from zero, and below zero a reward for connections.

    Without any price the noise of the gradients alone prunes many connections, so low sparsities need a reward.

    Example:
        >>> round(connection_price(1.0, 0.01), 4), connection_price(0.0, 0.01)
        (0.0118, 0.0)
    """
    return unit * math.sinh(drive)


def density_error(density: float, wanted: float, target: float) -> float:
    r"""How far a density is off, in logarithms: above zero if denser than wanted now, below if sparser than in the end.

    In between it is zero: that connections go sooner than planned is no error while the target is not reached.

    Args:
        density: measured, positive.
        wanted: by now; not below the target.
        target: in the end.

    Example:
        >>> density_error(0.2, wanted=0.5, target=0.1), round(density_error(0.2, 0.1, 0.1), 3)
        (0.0, 0.693)
    """
    return math.log(density / min(max(density, target), wanted))


def steer_price(memory: float, error: float, elapsed: float) -> tuple[float, float]:
    r"""What a controller remembers, and the drive of the price that leads a density to its target.

    Proportional and integral control, both in logarithms:

    $$ i \leftarrow i + 20\, e\, \Delta t, \qquad u = i + 8\, e, \qquad |i|, |u| \le 6 $$

    The bound is a price of 200 units, beyond which the task has no say. The logarithm of the density follows that of the
    price with a slope between 1/2 and 1 and some lag; the gains were chosen on a LeNet-300-100, from 50 to 99% sparsity
    and from 235 to 4,700 steps. An extension of ours, not of the paper.

    Args:
        memory: i so far.
        error: e, see `density_error`.
        elapsed: $\Delta t$ since the last update, as a fraction of the time until the masks freeze.

    Example:
        >>> memory, drive = steer_price(1.0, error=0.1, elapsed=0.01)
        >>> round(memory, 3), round(drive, 3)
        (1.02, 1.82)
    """
    memory = max(-6.0, min(memory + 20 * error * elapsed, 6.0))
    return memory, max(-6.0, min(memory + 8 * error, 6.0))


def _others(tensor: Tensor, feature: Dims | None) -> tuple[int, ...]:
    return tuple(range(tensor.ndim) if feature is None else others(tensor, feature))
