"""Access to the loop of a running fit. This is the only benchmark file that depends on its internals."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lightning_sparse.core import FINAL, MaskSet
from lightning_sparse.families import Masked, Rewiring
from lightning_sparse.families.watch import Watch
from lightning_sparse.loop import Loop, Sparsifier, Step

STATIONS = ("before_step", "_after_step", "batch_start", "batch_end", "_direct_step")


def hand_over(method: Sparsifier, methods: Sequence[Sparsifier]) -> None:
    """Make `methods` the only active methods of a running fit, from the next station on. The list may be empty.

    Each method finds weights and moments as if it had also made the last step. `method` is any method that has begun in this
    fit.
    """
    assert method.loop is not None
    method.loop.methods = list(methods)
    for one in methods:
        if isinstance(one, Masked) and one.mask_set is not None:
            one.clean()  # other methods have changed its pruned entries and their moments
            one.watch = Watch()
            for optimizer in one.run.optimizers:
                step = Step(optimizer, one.loop.ownership.of(optimizer).weights[id(one)])
                one.watch.note(step)
                one.watch.trust(step, one.masks.changes)


def stand_in(method: Rewiring, owner: Masked) -> None:
    """Start a method in the fit of another one, with the weights and masks of that one, so that no update is ever due."""
    assert owner.loop is not None
    method.enter(owner.run)
    method.loop, method.chosen, method.masks = owner.loop, owner.chosen, owner.masks
    method.begun_with, method.steps = owner.begun_with, 1
    method.window.start, method.window.end, method.window.done = 0.0, 1.0, FINAL
    for optimizer in owner.run.optimizers:
        owned = owner.loop.ownership.of(optimizer).weights
        owned[id(method)] = owned[id(owner)]


@contextmanager
def watched(station: Callable[[Any], Any], change: Callable[[Any], Any]) -> Iterator[None]:
    """Wrap the stations of loops, and the replacement of masks, while the context is active."""
    functions = [(Loop, name, station) for name in STATIONS] + [(MaskSet, "replace", change)]
    originals = [getattr(owner, name) for owner, name, _ in functions]
    for (owner, name, wrap), original in zip(functions, originals, strict=True):
        setattr(owner, name, wrap(original))
    try:
        yield
    finally:
        for (owner, name, _), original in zip(functions, originals, strict=True):
            setattr(owner, name, original)
