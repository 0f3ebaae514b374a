"""Arguments that are refused when a module is created, not when its training begins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

__all__ = ["check_optimizer"]


def check_optimizer(make: Callable[[Any], Any]) -> None:
    """Refuse an optimizer that torch refuses, by creating it for a dummy parameter.

    Args:
        make: called with parameters.

    Raises:
        ValueError: with torch's message.
    """
    try:
        make([nn.Parameter(torch.zeros(1))])
    except ValueError as error:
        raise ValueError(f"optimizer is refused by torch: {str(error).rstrip('.')}; use a valid value.") from error
