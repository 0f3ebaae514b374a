"""How far the methods of a run are with what they promise."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_sparse.loop.method import Method

__all__ = ["phase_of"]


def phase_of(methods: Sequence[Method]) -> str | None:
    """Where a run is: `dense`, `sparsifying`, or `at target` once every method that promises a sparsity has reached it.

    None where no method promises one.
    """
    reached = [answer for method in methods if (answer := method.at_target) is not None]
    if not reached:
        return None
    if all(reached):
        return "at target"
    masks = [masks for method in methods if (masks := method.mask_set) is not None]
    return "dense" if all(mask.kept == mask.total for mask in masks) else "sparsifying"
