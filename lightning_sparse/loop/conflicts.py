"""What is refused at the start of a fit: runs, rivals and optimizers that a method cannot work with."""

from __future__ import annotations

from collections.abc import Sequence

from torch.optim import LBFGS, Optimizer

from lightning_sparse.core import RunLength, TooShort, averages, owner_of
from lightning_sparse.loop.method import Method

__all__ = ["check_method", "refuse_optimizers", "refuse_rivals", "refuse_shared_masks"]


def check_method(method: Method, length: RunLength) -> None:
    """Check a method before its run begins or continues.

    Args:
        method: that has entered the fit.
        length: of this fit.

    Raises:
        ValueError: for anything that cannot work.
    """
    method.check_brought()
    begun = method.length_as_begun(length)
    try:
        method.check(begun, method.run.share(length, begun))
    except TooShort as error:
        batches = method.run.trainer.fast_dev_run  # type: ignore[attr-defined]
        if not batches:
            raise
        raise ValueError(
            f"{error} fast_dev_run={batches} makes the run too short; for a trial run, set max_epochs and "
            "limit_train_batches instead."
        ) from error


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


def refuse_optimizers(method: Method, optimizers: Sequence[Optimizer]) -> None:
    """Refuse optimizers that move the weights in a way the method cannot follow, and weights that none of them moves."""
    for optimizer in optimizers:
        if isinstance(optimizer, LBFGS):
            raise ValueError(
                f"{method.label} does not work with LBFGS, which moves the weights several times per step; use a "
                "first-order optimizer such as SGD or AdamW."
            )
        if method.swaps_weights and averages(optimizer):
            raise ValueError(
                f"{method.label} does not work with {type(optimizer).__name__}, whose train() and eval() mix its own "
                "weights into those that the model shows; use another optimizer such as AdamW, or a method that only masks, "
                "such as MagnitudePruning or RigL."
            )
    owned = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    for target in method.chosen:
        if id(owner_of(target.weight)) not in owned and target.weight.requires_grad:
            raise ValueError(
                f"{method.label}: no optimizer updates '{target.name}'; return it from configure_optimizers or exclude it "
                f"with targets=['!{target.name}']."
            )
