r"""Vectors on the unit Lp sphere: norms, dual coordinates, the step of LpSGD, and rules for dropping and growing.

Source: Li, Yang, Li, Lu and Xie 2021, "Training Sparse Neural Network by Constraining Synaptic Weight on Unit Lp Sphere",
https://arxiv.org/abs/2103.16013, and the official repository WilliamLiPro/LpSS, whose class `LpCGD` is the step here.

A weight tensor is one vector per output: its slices along `dim`, 0 for linear layers and convolutions. With q = p / (p - 1),
a vector on the sphere has the dual coordinates v = sign(w) |w|^(p-1), and |w|_p = 1 means |v|_q = 1.
"""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from lightning_sparse.functional.dims import Dims, count_along, others

__all__ = [
    "check_exponent",
    "check_vectors",
    "expected_hoyer",
    "from_dual",
    "growth_factor",
    "hoyer_sparsity",
    "lp_norm",
    "lp_normalize",
    "lp_sgd_",
    "lp_sgd_step",
    "relative_magnitude",
    "to_dual",
]


def check_exponent(p: Any, name: str = "p") -> float:
    """The exponent of a sphere, or a ValueError: at p <= 1 the dual coordinates do not exist."""
    if not isinstance(p, Real) or not 1 < float(p) < math.inf:
        raise ValueError(
            f"{name}={p!r} must be a finite number above 1, from 1.05 (very sparse) through 2 (round) to 6 (flat)."
        )
    return float(p)


def check_vectors(weight: Tensor, name: str, remedy: str, dim: Dims = 0) -> None:
    """Refuse a weight whose outputs cannot be projected onto a sphere.

    Args:
        weight: vectors are its slices along `dim`.
        name: name of the weight in the message.
        remedy: remedy in the message.
        dim: the dimension that enumerates the vectors.

    Raises:
        ValueError: if it is sharded, is a vector itself, or has vectors of a single entry.
    """
    if hasattr(weight, "placements"):  # a DTensor, known without importing torch.distributed.tensor
        raise ValueError(f"{name} is sharded, and the norm of an output needs all of it; use 'ddp', or {remedy}.")
    if weight.ndim < 2:
        raise ValueError(f"{name} has shape {tuple(weight.shape)} and no vector per output; {remedy}.")
    if weight.numel() == count_along(weight, dim):
        raise ValueError(f"{name} has outputs of a single entry, which a sphere would hold at 1 or -1 forever; {remedy}.")


def lp_norm(vectors: Tensor, p: float, dim: Dims = 0) -> Tensor:
    r"""The p-norm of every vector, for any magnitude that the number format can represent.

    $$ \|x\|_p = m \Big(\sum_i (|x_i| / m)^p\Big)^{1/p}, \qquad m = \max_i |x_i| $$

    Without the factor m, (1e-4)^15 is zero in float32, and so would be the norm of a small gradient.

    Args:
        vectors: slices along `dim`.
        p: above 0.
        dim: the dimension that enumerates the vectors; they extend over all others.

    Returns:
        The norms, with the other dimensions kept at size 1.

    Example:
        >>> lp_norm(torch.tensor([[3e-30, 4e-30], [0.0, 0.0]]), 2.0).flatten()
        tensor([5.0000e-30, 0.0000e+00])
    """
    size, peak, along = _scaled(vectors, dim)
    return size.pow_(p).sum(along, keepdim=True).pow_(1 / p).mul_(peak)


def lp_normalize(vectors: Tensor, p: float, dim: Dims = 0) -> Tensor:
    """Every vector divided by its p-norm; a zero vector stays zero.

    Args:
        vectors: slices along `dim`.
        p: above 0.
        dim: the dimension that enumerates the vectors.

    Example:
        >>> lp_normalize(torch.tensor([[-3e-30, 4e-30], [0.0, 0.0]]), 2.0)
        tensor([[-0.6000,  0.8000],
                [ 0.0000,  0.0000]])
    """
    size, _, along = _scaled(vectors, dim)
    return _to_length_one(size, p, along).copysign_(vectors)


def to_dual(weight: Tensor, p: float) -> Tensor:
    """Dual coordinates v = sign(w) |w|^(p-1), entry by entry.

    Example:
        >>> to_dual(torch.tensor([0.25, -1.0]), 1.5)
        tensor([ 0.5000, -1.0000])
    """
    return weight.abs().pow_(p - 1).copysign_(weight)


def from_dual(dual: Tensor, p: float) -> Tensor:
    """The inverse of `to_dual`: w = sign(v) |v|^(1 / (p-1)), of unit p-norm where v has unit q-norm.

    Near p = 1 small duals become weights too small for the number format, that is, zeros; the duals keep their values.
    """
    return dual.abs().pow_(1 / (p - 1)).copysign_(dual)


def lp_sgd_step(dual: Tensor, gradient: Tensor, rate: float | Tensor, p: float, dim: Dims = 0) -> Tensor:
    r"""One step of gradient descent on the unit Lp sphere.

    $$ u = (1 - \eta) \, v - \eta \, g / \|g\|_q, \qquad v^+ = u / \|u\|_q, \qquad q = p / (p-1) $$

    A damped fixed-point iteration toward $v = -g / \|g\|_q$, where the loss is stationary on the sphere; the length of
    the gradient does not matter. A vector without a gradient stays; one whose u vanishes (eta = 1/2, gradient along v)
    stays too. A vector of zeros joins the sphere with its first gradient.

    Args:
        dual: v, of unit q-norm.
        gradient: gradient of the loss with respect to the weight, after momentum.
        rate: eta in [0, 1], how much of the new direction is mixed in; 1 jumps to it.
        p: above 1.
        dim: the dimension that enumerates the vectors.

    Returns:
        The new dual coordinates; `from_dual` converts them to weights.

    Example:
        >>> v = torch.tensor([[0.6, 0.8]])
        >>> lp_sgd_step(v, torch.tensor([[-1e-20, 0.0]]), 1.0, p=2.0)
        tensor([[1., 0.]])
    """
    q = p / (p - 1)
    moved = lp_normalize(gradient, q, dim).mul_(-rate).add_(dual * (1 - rate))
    size, peak, along = _scaled(moved, dim)
    # Both parts have unit norm: anything below machine precision is rounding, not a direction.
    vanished = peak <= torch.finfo(moved.dtype).eps
    if not vanished.is_cpu or bool(vanished.any()):  # rare; on the CPU the check is cheap and saves a pass
        return lp_normalize(torch.where(vanished, dual, moved), q, dim)
    return _to_length_one(size, q, along).copysign_(moved)


@torch.no_grad()
def lp_sgd_(
    weight: Tensor,
    dual: Tensor,
    buffer: Tensor | None,
    gradient: Tensor,
    rate: float | Tensor,
    p: float,
    *,
    momentum: float = 0.0,
    nesterov: bool = False,
    dim: Dims = 0,
) -> None:
    """`lp_sgd_step` with heavy-ball momentum on the gradient, in place: shared by the optimizer and the callback.

    b <- momentum * b + g; the step is along g + momentum * b with Nesterov, else along b.

    Args:
        weight: receives the new weights.
        dual: dual coordinates of unit q-norm, in float32 or wider; receives the new ones.
        buffer: b, zeros at first; None without momentum.
        gradient: gradient of the loss with respect to the weight.
        rate: eta in [0, 1].
        p: above 1.
        momentum: momentum factor, in [0, 1).
        nesterov: use Nesterov momentum.
        dim: the dimension that enumerates the vectors.
    """
    direction = gradient.to(dual.dtype)
    if buffer is not None:
        buffer.mul_(momentum).add_(direction)
        direction = direction.add(buffer, alpha=momentum) if nesterov else buffer
    dual.copy_(lp_sgd_step(dual, direction, rate, p, dim))
    weight.copy_(from_dual(dual, p))


def hoyer_sparsity(weight: Tensor, dim: Dims = 0) -> Tensor:
    r"""Hoyer's sparsity of every vector: 0 if all magnitudes are equal, 1 if a single entry is nonzero.

    $$ H(w) = \frac{\sqrt d - \|w\|_1 / \|w\|_2}{\sqrt d - 1} $$

    A zero vector counts as 1: nothing is left of it. The sparsity of a vector with a single entry is defined as 0.

    Source: Hoyer 2004, "Non-negative Matrix Factorization with Sparseness Constraints", JMLR 5, section 3.

    Args:
        weight: vectors are its slices along `dim`.
        dim: the dimension that enumerates the vectors.

    Returns:
        One number in [0, 1] per vector.

    Example:
        >>> hoyer_sparsity(torch.tensor([[0.0, -3.0, 0.0, 0.0], [2.0, 2.0, -2.0, 2.0]]))
        tensor([1., 0.])
    """
    size, _, along = _scaled(weight.detach(), dim)
    root = math.sqrt(weight.numel() / count_along(weight, dim))
    if root == 1:
        return size.sum(along).zero_()
    length = size.square().sum(along).sqrt_()
    ratio = torch.where(length > 0, size.sum(along) / length, 1.0)
    return ratio.neg_().add_(root).div_(root - 1).clamp_(0, 1)


def expected_hoyer(p: float, d: int, shape: float = 0.4) -> float:
    r"""Hoyer's sparsity that vectors of d entries, trained on the unit Lp sphere, are expected to have.

    $$ E[H] = \frac{\sqrt d - E}{\sqrt d - 1}, \quad
       E = d \, \frac{\Gamma(a + 1/2) \, \Gamma(d a)}{\Gamma(a) \, \Gamma(d a + 1/2)}, \quad a = 0.4 (p - 1) $$

    exactly so if squared weights are independent and Gamma distributed with shape a. Recovered from the curves of the
    authors' figure, not from the paper's text, which was not available; in that figure the trained convolutions come close
    to it and the linear layers do not.

    Args:
        p: exponent of the sphere, above 1.
        d: number of entries of a vector, at least 2.
        shape: a = shape * (p - 1).

    Raises:
        ValueError: if p or d is out of range.

    Example:
        >>> round(expected_hoyer(1.1, 25), 4)
        0.7758
    """
    a = shape * (check_exponent(p) - 1)
    if d < 2:
        raise ValueError(f"d={d} must be at least 2: one entry alone is neither sparse nor dense.")
    if not a > 0:
        raise ValueError(f"shape={shape} must be above 0.")
    gammas = math.lgamma(a + 0.5) - math.lgamma(a) + math.lgamma(d * a) - math.lgamma(d * a + 0.5)
    return (math.sqrt(d) - d * math.exp(gammas)) / (math.sqrt(d) - 1)


def relative_magnitude(weight: Tensor, mask: Tensor, dim: Dims = 0) -> Tensor:
    r"""The magnitude of every entry in units of the mean magnitude of the kept entries of its vector.

    The drop rule keeps what is kept and at least h here: the threshold adapts to each output's own scale.

    Args:
        weight: vectors are its slices along `dim`.
        mask: True = kept.
        dim: the dimension that enumerates the vectors.

    Example:
        >>> relative_magnitude(torch.tensor([[4.0, -2.0, 9.0]]), torch.tensor([[True, True, False]]))
        tensor([[1.3333, 0.6667, 3.0000]])
    """
    size, along = _wide(weight).abs(), _others(weight, dim)
    kept = mask.sum(along, keepdim=True).clamp_(min=1)
    mean = torch.where(mask, size, 0).sum(along, keepdim=True) / kept
    return torch.where(mean > 0, size / mean, 1.0)  # if all magnitudes are zero, none counts as small


def growth_factor(sparsity: float, target: float, threshold: float, margin: float) -> float:
    r"""How many connections return for each one that drops: the published controller.

    $$ \gamma = \frac{s}{s^*} \cdot \begin{cases} 1 - \delta & s < s^* (1 - h/2) \\ 1 + \delta & else \end{cases} $$

    It steers without a guarantee: sparsity rises only while enough weights drop.

    Args:
        sparsity: s, the current sparsity.
        target: s*, above 0.
        threshold: h, the current threshold.
        margin: delta, in [0, 1).

    Example:
        >>> growth_factor(0.45, 0.9, 0.2, 0.1), growth_factor(0.9, 0.9, 0.2, 0.1)
        (0.45, 1.1)
    """
    rising = sparsity < target * (1 - threshold / 2)
    return (1 - margin if rising else 1 + margin) * sparsity / target


def _wide(tensor: Tensor) -> Tensor:
    """At least float32: the powers near p = 1 multiply relative errors by more than ten."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _others(tensor: Tensor, dim: Dims) -> list[int]:
    """The dimensions that a vector extends over; a tensor of one dimension would be reduced as a whole."""
    if tensor.ndim < 2:
        raise ValueError(f"A tensor of shape {tuple(tensor.shape)} holds no vectors; give it one vector per output.")
    return others(tensor, dim)


def _scaled(vectors: Tensor, dim: Dims) -> tuple[Tensor, Tensor, list[int]]:
    """Magnitudes divided by the largest of their vector, that largest, and the dimensions of a vector."""
    along = _others(vectors, dim)
    size = _wide(vectors).abs()
    peak = size.amax(along, keepdim=True)
    return size.div_(torch.where(peak > 0, peak, 1)), peak, along


def _to_length_one(size: Tensor, p: float, along: list[int]) -> Tensor:
    """Magnitudes from `_scaled` divided by their p-norm, in place."""
    # The largest entry is 1, so the sum is at least 1 wherever there is something to normalize.
    total = size.pow(p).sum(along, keepdim=True).clamp_(min=1)
    return size.div_(total.pow_(1 / p))
