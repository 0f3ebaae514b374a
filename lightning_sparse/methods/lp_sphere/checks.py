"""Check the arguments of LpSphere before anything else."""

from __future__ import annotations

from typing import Any

from lightning_sparse.core import check_choice, check_exponents, check_sparsity
from lightning_sparse.loop.rng import check_seed

__all__ = ["check_arguments"]

MODES = ("official", "feedback")


def check_arguments(method: Any) -> None:
    """Refuse values out of range.

    Raises:
        ValueError: naming the value.
    """
    check_exponents(method.p)
    if method.sparsity is not None:
        check_sparsity("sparsity", method.sparsity)
    check_sparsity("initial_sparsity", method.initial_sparsity)
    if not 0 < method.mixing <= 1:
        raise ValueError(f"mixing={method.mixing} must be in (0, 1]: the weight of the new direction in a step.")
    for label, value in (("momentum", method.momentum), ("growth_margin", method.growth_margin)):
        if not 0 <= value < 1:
            raise ValueError(f"{label}={value} must be in [0, 1).")
    if method.drop_threshold < 0:
        raise ValueError(f"drop_threshold={method.drop_threshold} must be >= 0: a fraction of an output's mean.")
    check_choice("mode", method.mode, MODES)
    check_seed(method.seed)
    if str(method.every).strip().endswith(("epoch", "epochs")):
        raise ValueError(
            f"every={method.every!r} falls before the first batch of an epoch, where there is no gradient for growth; "
            "write a fraction of the run, or 'n steps'."
        )
