"""Slow versions of what the package computes, from the papers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def slow_hsic(x: Tensor, y: Tensor) -> Tensor:
    """The unbiased estimator of Song et al., term by term, from raw Gram matrices in float64."""
    x, y = x.flatten(1).double(), y.flatten(1).double()
    return slow_hsic_of_grams(x @ x.T, y @ y.T)


def slow_hsic_of_grams(k: Tensor, l: Tensor) -> Tensor:  # noqa: E741
    n = len(k)
    k, l = k - k.diag().diag(), l - l.diag().diag()  # noqa: E741
    ones = torch.ones(n, 1, dtype=k.dtype, device=k.device)
    trace = (k @ l).diagonal().sum()
    product = (ones.T @ k @ ones) * (ones.T @ l @ ones) / ((n - 1) * (n - 2))
    return (trace + (product - 2 * ones.T @ k @ l @ ones / (n - 2)).squeeze()) / (n * (n - 3))


def slow_cka(x: Tensor, y: Tensor) -> Tensor:
    return slow_hsic(x, y) / (slow_hsic(x, x).sqrt() * slow_hsic(y, y).sqrt())


def sample(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def related(n: int = 16) -> list[Tensor]:
    """Three features of one origin, of different sizes and shapes."""
    x = sample(n, 12)
    return [x, (x @ sample(12, 20, seed=1) + sample(n, 20, seed=2)).relu(), (x @ sample(12, 18, seed=3)).view(n, 2, 3, 3)]


def by_loop(gradient: Tensor, norm: str, feature: int | None) -> Tensor:
    """Feature by feature, entry by entry."""
    result = torch.zeros_like(gradient)
    for index in range(1 if feature is None else gradient.shape[feature]):
        part = gradient if feature is None else gradient.select(feature, index)
        entries = [float(value) for value in part.flatten()]
        size = {
            "rms": math.sqrt(sum(e * e for e in entries) / len(entries)),
            "l2": math.sqrt(sum(e * e for e in entries)),
            "max": max(abs(e) for e in entries),
            "none": 1.0 - 1e-12,
        }[norm]
        (result if feature is None else result.select(feature, index)).copy_(part / (size + 1e-12))
    return result


def slow_regrow(mask: Tensor, keep: Tensor, grow: Tensor, count: int) -> Tensor:
    """Algorithm 1 of RigL with Python's own sorting."""
    ones = [i for i, bit in enumerate(mask.flatten().tolist()) if bit]
    k, g = keep.flatten().tolist(), grow.flatten().tolist()
    survivors = sorted(ones, key=lambda i: (-k[i], i))[: len(ones) - count]
    free = [i for i in range(mask.numel()) if i not in set(survivors)]
    grown = sorted(free, key=lambda i: (-g[i], i))[:count]
    new = torch.zeros(mask.numel(), dtype=torch.bool)
    new[survivors + grown] = True
    return new.view(mask.shape)


class BinaryStep(torch.autograd.Function):
    """As the paper defines it: a step forward, the long-tailed slope backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        slopes = [2 - 4 * abs(v) if abs(v) <= 0.4 else 0.4 if abs(v) <= 1 else 0.0 for v in x.flatten().tolist()]
        return grad * torch.tensor(slopes, dtype=x.dtype).view_as(x)
