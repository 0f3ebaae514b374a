"""Dimensions that enumerate vectors: one, or several for stacked matrices."""

from __future__ import annotations

import math

from torch import Tensor

__all__ = ["Dims", "count_along", "others"]

Dims = int | tuple[int, ...]


def others(tensor: Tensor, dim: Dims) -> list[int]:
    """All other dimensions.

    Example:
        >>> import torch
        >>> others(torch.ones(2, 3, 4), 1), others(torch.ones(2, 3, 4), (0, 1))
        ([0, 2], [2])
    """
    counting = {d % tensor.ndim for d in _several(dim)}
    return [d for d in range(tensor.ndim) if d not in counting]


def count_along(tensor: Tensor, dim: Dims) -> int:
    """The number of vectors.

    Example:
        >>> import torch
        >>> count_along(torch.ones(2, 3, 4), (0, 1))
        6
    """
    return math.prod(tensor.shape[d] for d in _several(dim))


def _several(dim: Dims) -> tuple[int, ...]:
    return (dim,) if isinstance(dim, int) else dim
