"""The penalty gradients of the regularization phase."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_sparse.functional import hypersparse_gradient, hypersparse_scale

__all__ = ["PENALTIES"]


def _adaptive(method: Any) -> Callable[[Tensor], Tensor]:
    weights = list(method.weights.values())
    scale = hypersparse_scale(weights, method.sparsity, method.alignment, method.max_pull, method.spread)
    method.scale = [scale.quantile, scale.pull]
    return lambda weight: hypersparse_gradient([weight], method.sparsity, scale)[0]


PENALTIES: dict[str, Callable[[Any], Callable[[Tensor], Tensor]]] = {
    "hypersparse": _adaptive,
    "l1": lambda method: torch.sign,
    "l2": lambda method: lambda weight: 2 * weight,
}
"""By name: the function that computes the gradient of one layer."""
