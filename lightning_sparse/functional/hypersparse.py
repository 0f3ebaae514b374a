r"""The adaptive penalty of HyperSparse, as its gradient in closed form.

Source: Glandorf, Kaiser and Rosenhahn 2023, "HyperSparse Neural Networks: Shifting Exploration to Exploitation through
Adaptive Regularization", https://arxiv.org/abs/2308.07163, and the official repository GreenAutoML4FAS/HyperSparse.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_sparse.functional.order import kth_smallest
from lightning_sparse.functional.spread import Spread

__all__ = [
    "HYPERSPARSE_ALIGNMENT",
    "HyperSparseScale",
    "hypersparse_gradient",
    "hypersparse_loss",
    "hypersparse_scale",
    "quantile_rank",
]

HYPERSPARSE_ALIGNMENT = math.atanh(1 / math.sqrt(3))
"""Where the slope of tanh falls fastest; the official code rounds it to 0.6585."""


def quantile_rank(sparsity: float, total: int) -> int:
    """The rank (0-based) of the magnitude on the pruning boundary: floor(sparsity * total).

    Example:
        >>> quantile_rank(0.99, 1_855_584), quantile_rank(0.29, 100)
        (1837028, 29)
    """
    return min(int(sparsity * total + 1e-6), total - 1)


class HyperSparseScale(NamedTuple):
    """Values shared by all weights, as 0-d tensors on their device.

    Args:
        quantile: the magnitude on the pruning boundary.
        slope: s, the factor on weights inside tanh.
        pull: P, the gradient of a weight near zero.
    """

    quantile: Tensor
    slope: Tensor
    pull: Tensor


def hypersparse_scale(
    weights: Sequence[Tensor],
    sparsity: float,
    alignment: float = HYPERSPARSE_ALIGNMENT,
    max_pull: float = math.inf,
    spread: Spread | None = None,
) -> HyperSparseScale:
    r"""The scale of the penalty for the current weights of the whole network.

    $$ s = x^* / q, \qquad P = s \sum_i |w_i| \Big/ \sum_i \tanh(s |w_i|), $$

    where q is the magnitude of rank floor(sparsity * n) among all n weights. P is at least 1. Nothing is read back to the
    host, and no temporary is larger than one layer.

    Args:
        weights: of all layers together; the quantile is global.
        sparsity: in (0, 1).
        alignment: x*.
        max_pull: cap on P, which grows without bound when the quantile goes to zero.
        spread: how weights are distributed over ranks; None if this rank holds all of them.

    Raises:
        ValueError: if sparsity is not in (0, 1).
    """
    if not 0 < sparsity < 1:
        raise ValueError(f"sparsity={sparsity} must be in (0, 1): the fraction that is removed.")
    total = sum(weight.numel() for weight in weights) if spread is None else spread.numel
    quantile = kth_smallest(weights, quantile_rank(sparsity, total), magnitudes=True, spread=spread)
    quantile = quantile.to(_wide(quantile))
    # If more weights are exactly zero than the quantile, the boundary is at zero, and nothing is pulled.
    largest = torch.finfo(quantile.dtype).max / 4  # twice it is still finite
    slope = torch.where(quantile > 0, alignment / quantile, 0.0).clamp(max=largest)
    norm, saturation = torch.zeros_like(quantile), torch.zeros_like(quantile)
    for weight in weights if spread is None else spread.counted(weights):
        size = weight.detach().abs().to(quantile.dtype)
        norm += size.sum()
        saturation += size.mul_(slope).tanh_().sum()
    if spread is not None:
        norm, saturation = spread.total(torch.stack([norm, saturation])).unbind()
    pull = torch.where(saturation > 0, slope * norm / saturation, 0.0).clamp(max=min(max_pull, largest))
    return HyperSparseScale(quantile, slope, pull)


def hypersparse_gradient(weights: Sequence[Tensor], sparsity: float, scale: HyperSparseScale | None = None) -> list[Tensor]:
    r"""The gradient of the adaptive penalty, one tensor per weight.

    $$ g_i = sign(w_i) \, P \, sech^2(s |w_i|) $$

    Near zero every weight is pulled by P, at the pruning boundary by 2/3 P, and at four times the boundary by P/49.

    Args:
        weights: weights of all layers, or, with a scale given, of some of them.
        sparsity: in (0, 1).
        scale: scale for all layers, from `hypersparse_scale`.

    Example:
        >>> [gradient] = hypersparse_gradient([torch.tensor([-0.1, 1.0, 10.0])], 0.5)
        >>> bool(gradient[0] < 0 < gradient[2] < gradient[1] < -gradient[0])
        True
    """
    scale = scale or hypersparse_scale(weights, sparsity)
    gradients = []
    for weight in weights:
        # sech^2(x) = 4 e / (1 + e)^2 with e = exp(-2x): no overflow, and no difference of nearly equal numbers.
        decay = weight.detach().abs().to(scale.slope.dtype).mul_(-2 * scale.slope).exp_()
        sech = decay.mul(4).div_(decay.add_(1).square_())
        gradients.append(sech.mul_(scale.pull).mul_(weight.detach().sign()))
    return gradients


def hypersparse_loss(weights: Sequence[Tensor], sparsity: float) -> Tensor:
    r"""A loss with the gradient of the adaptive penalty whose value is the L1 norm of the weights.

    $$ L = \Big[\sum_i |w_i| \Big/ \sum_j \tanh(s |w_j|)\Big] \sum_j \tanh(s |w_j|), $$

    where the bracket and s are constant for differentiation. The paper's own double sum has the same gradient, but the value
    0.

    Args:
        weights: of all layers together.
        sparsity: in (0, 1).
    """
    scale = hypersparse_scale(weights, sparsity)
    saturation = torch.stack([(scale.slope * weight.abs()).tanh().sum() for weight in weights]).sum()
    return torch.where(scale.slope > 0, scale.pull / scale.slope, 0.0) * saturation


def _wide(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32
