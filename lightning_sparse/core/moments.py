"""Optimizer state of entries whose connection has changed."""

from __future__ import annotations

from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["clear_moments"]


def clear_moments(optimizer: Optimizer, parameter: nn.Parameter, where: Tensor) -> None:
    """Set an optimizer's memory of some entries to zero, as if they had just been created.

    Works for every optimizer that keeps per-entry state in tensors of the parameter's shape: momentum, first and second
    moments, averages. Step counters and factored moments are shared by a whole tensor and stay.

    Args:
        optimizer: which owns the parameter.
        parameter: whose state is cleared.
        where: a boolean tensor of its shape; True entries are cleared.
    """
    for value in optimizer.state.get(parameter, {}).values():
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            value.masked_fill_(where.to(value.device), 0)
