"""Point 8: what cannot work is refused with one sentence that names the value given, before anything is changed."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ModelPruning

from lightning_sparse.loop import Sparsifier
from lightning_sparse.testing.case import Case, Inapplicable, recorded, require
from lightning_sparse.testing.state import differences, left_behind, masks_of
from lightning_sparse.testing.toys import BATCHES, Toy, loader, toy, trainer

__all__ = [
    "refuses_a_second_owner",
    "refuses_an_impossible_target",
    "refuses_other_arguments_on_resume",
    "refuses_unfit_company",
    "refuses_unknown_targets",
    "stores_its_arguments",
]


def _remade(method: Sparsifier, **changes: Any) -> Sparsifier:
    """Return a new method of the same class with the same arguments, except for `changes`."""
    missing = sorted(changes.keys() - method.config().keys())
    if missing:
        raise Inapplicable(f"{type(method).__name__} does not take {missing}")
    return type(method)(**{**{name: getattr(method, name) for name in method.config()}, **changes})


def _refused(module: pl.LightningModule, callbacks: Sequence[Callback], given: str, what: str, **options: Any) -> None:
    """Require that a fit raises a one-line ValueError that names the value given, and leaves everything unchanged."""
    before = copy.deepcopy(module.state_dict())
    runner = trainer(*callbacks)
    try:
        runner.fit(module, loader(), loader(1), **options)
    except ValueError as error:
        require(given in str(error), f"The refusal of {what} does not name {given!r}: {error}")
        require("\n" not in str(error), f"The refusal of {what} is more than a sentence: {error}")
    else:
        raise AssertionError(f"{what} is not refused.")
    methods = [callback for callback in callbacks if isinstance(callback, Sparsifier)]
    require("ckpt_path" in options or not differences(before, module.state_dict()), f"{what} was refused too late.")
    for method in methods:
        wrong = left_behind(method, module, runner)
        require(not wrong, f"{what} was refused, and {method.label} has left {wrong} behind.")


def stores_its_arguments(case: Case) -> None:
    """Arguments are stored as given, under their own names; a resumed run compares them."""
    for method in case.fresh()[1]:
        label = type(method).__name__
        try:
            config, again = method.config(), _remade(method).config()
        except (AttributeError, TypeError, ValueError) as error:
            raise AssertionError(f"{label} must store its arguments as given, under their own names: {error}") from error
        wrong = differences(config, again)
        require(not wrong, f"Made again with the arguments it stores, {label} stores others: {wrong}.")


def refuses_an_impossible_target(case: Case) -> None:
    """A sparsity that leaves no weights is refused before the first batch."""
    asked = [method for method in case.fresh()[1] if method.config().get("sparsity") is not None]
    if not asked:
        raise Inapplicable("no sparsity is asked for")
    for method in asked:
        _refused(toy(), [_remade(method, sparsity=0.999999)], "0.999999", "sparsity=0.999999 of a tiny network")


def refuses_unknown_targets(case: Case) -> None:
    """A pattern that matches no layer is refused by name."""
    for method in case.fresh()[1]:
        _refused(toy(), [_remade(method, targets=["no.such.layer"])], "no.such.layer", "a pattern that matches nothing")


def refuses_a_second_owner(case: Case) -> None:
    """Two methods cannot mask the same weight."""
    trained = recorded(case, "sgd").methods
    if not any(masks_of(method) for method in trained):
        raise Inapplicable("no masks are owned")
    for method in [new for new, old in zip(case.fresh()[1], trained, strict=True) if masks_of(old)]:
        second = _remade(method)
        second.__class__ = type("Second", (type(method),), {})  # else Lightning cannot tell their states apart
        _refused(toy(), [method, second], "Second", "a second owner of the same masks")


def refuses_unfit_company(case: Case) -> None:
    """LBFGS, `ModelPruning` and weights that no optimizer updates are refused by name."""

    class SecondOrder(Toy):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters())

    class Idle(Toy):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([self.net[0].bias], lr=0.1)

    for method in case.fresh()[1]:
        _refused(SecondOrder(), [_remade(method)], "LBFGS", "LBFGS")
        _refused(toy(), [_remade(method), ModelPruning("random_unstructured")], "ModelPruning", "ModelPruning beside it")
        _refused(Idle(), [_remade(method)], "net.", "a weight that no optimizer updates")


def refuses_other_arguments_on_resume(case: Case) -> None:
    """A run cannot be resumed with arguments other than those it was started with."""
    file = recorded(case, "sgd").files("full")[BATCHES]
    for number in range(len(case.fresh()[1])):
        callbacks, methods = case.fresh()
        changed = _remade(methods[number], targets=methods[number].targets * 2)  # the same weights
        others = [changed if callback is methods[number] else callback for callback in callbacks]
        _refused(toy(), others, "targets=", "another argument on resume", ckpt_path=file)
