"""Methods of one Trainer that would undo each other's work."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_sparse.loop.method import Method

__all__ = ["refuse_rivals", "refuse_shared_masks"]


def refuse_shared_masks(methods: Sequence[Method]) -> None:
    """Refuse two masks on the same weight."""
    owner: dict[int, Method] = {}
    for method in methods:
        if method.mask_set is None:
            continue
        for name, weight in method.weights.items():
            if id(weight) in owner:
                raise ValueError(
                    f"{owner[id(weight)].label} and {method.label} both own masks of '{name}'; give each its own targets, "
                    "or keep one of them."
                )
            owner[id(weight)] = method


def refuse_rivals(methods: Sequence[Method]) -> None:
    """Refuse other methods on a weight that one method moves itself."""
    moved = {id(method.weights[name]): (method, name) for method in reversed(methods) for name in method.moves}
    for other in methods:
        if other.mask_set is None and not other.prepares_steps and not other.answers(Method.project):
            continue
        for weight in other.weights.values():
            method, name = moved.get(id(weight), (other, ""))
            if method is not other:
                raise ValueError(
                    f"{method.label} moves '{name}' itself, so {other.label} cannot act on it too; give each its own "
                    f"targets, or let {type(method).__name__} remove weights with its own sparsity."
                )
