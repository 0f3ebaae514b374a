"""How far the methods of a run are from their target sparsity."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_sparse.loop.method import Method

__all__ = ["phase_of"]


def phase_of(methods: Sequence[Method]) -> str | None:
    """The phase of a run: `dense`, `sparsifying`, or `at target` once every method with a target sparsity has reached it.

    None if no method has one.
    """
    reached = [answer for method in methods if (answer := method.at_target) is not None]
    if not reached:
        return None
    if all(reached):
        return "at target"
    masks = [masks for method in methods if (masks := method.mask_set) is not None]
    return "dense" if all(mask.kept == mask.total for mask in masks) else "sparsifying"
