"""What is refused when a module is made, and not when its training begins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

__all__ = ["check_optimizer"]


def check_optimizer(make: Callable[[Any], Any]) -> None:
    """Refuse an optimizer that torch refuses: it is tried on a parameter of its own.

    Args:
        make: called with parameters.

    Raises:
        ValueError: with what torch says.
    """
    try:
        make([nn.Parameter(torch.zeros(1))])
    except ValueError as error:
        raise ValueError(f"optimizer is refused by torch: {str(error).rstrip('.')}; give a value that it takes.") from error
