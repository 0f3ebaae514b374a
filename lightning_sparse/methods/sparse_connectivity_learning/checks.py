"""Check the arguments of SparseConnectivityLearning before anything else."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

from lightning_sparse.core import Span, check_choice
from lightning_sparse.functional import FEATURE_NORMS, STEP_PROXIES

__all__ = ["check_arguments"]

FEATURES = ("filter", "layer")


def check_arguments(method: Any) -> None:
    """Refuse values out of range, and values that contradict each other.

    Raises:
        ValueError: naming the value.
    """
    if method.price is None and method.sparsity is None:
        raise ValueError(
            f"{type(method).__name__} needs a sparsity, such as sparsity=0.95, or the price of a connection, such as "
            "price=0.05."
        )
    limits = {  # whether zero is allowed, upper bound, description
        "price": (False, math.inf, "a positive number"),
        "initial": (False, math.inf, "a positive number"),
        "learning_rate": (True, math.inf, "a number, 0 (masks stay dense) or more"),
        "momentum": (True, 1, "a number in [0, 1)"),
        "min_kept": (True, math.inf, "an integer >= 0"),
    }
    for name, (zero, below, meaning) in limits.items():
        value = getattr(method, name)
        number = float(value) if isinstance(value, Real) else -1.0
        fits = (number > 0 or (zero and number == 0)) and number < below
        fits &= name != "min_kept" or number % 1 == 0
        if not fits and not (name == "price" and value is None):
            raise ValueError(f"{name}={value!r} must be {meaning}.")
    check_choice("proxy", method.proxy, STEP_PROXIES)
    check_choice("norm", method.norm, FEATURE_NORMS)
    check_choice("feature", method.feature, FEATURES)
    if method.sparsity == 0:
        raise ValueError("sparsity=0 removes nothing; remove the callback.")
    warms_up = Span.parse(method.warmup, "warmup").value > 0
    if method.sparsity is not None and warms_up:
        raise ValueError(
            f"warmup={method.warmup!r} applies to a price; with a sparsity the controller sets the price, so omit warmup."
        )
    if not Span.parse(method.end, "end").value:
        raise ValueError(f"end={method.end!r} leaves no time to learn; set it later, or omit it.")
