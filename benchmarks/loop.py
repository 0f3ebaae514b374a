"""Access to the loop of a running fit: the only benchmark file that depends on its internals."""

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
    """Let these act from the next station on, in the fit of a method that has begun; none of them if there are none.

    Each finds weights and moments as if its last step had been its own.
    """
    assert method.loop is not None
    method.loop.methods = list(methods)
    for one in methods:
        if isinstance(one, Masked) and one.mask_set is not None:
            one.clean()  # the others have moved its pruned entries and their moments
            one.watch = Watch()
            for optimizer in one.run.optimizers:
                one.watch.note(Step(optimizer, one.loop.ownership.of(optimizer)[id(one)]))
                one.watch.trust(optimizer, one.masks.changes)


def stand_in(method: Rewiring, owner: Masked) -> None:
    """Begin a method in the fit of another, with the weights and masks of that, and with no update ever due."""
    assert owner.loop is not None
    method.enter(owner.run)
    method.loop, method.chosen, method.masks = owner.loop, owner.chosen, owner.masks
    method.begun_with, method.steps = owner.begun_with, 1
    method.window.start, method.window.end, method.window.done = 0.0, 1.0, FINAL
    for optimizer in owner.run.optimizers:
        owned = owner.loop.ownership.of(optimizer)
        owned[id(method)] = owned[id(owner)]


@contextmanager
def watched(station: Callable[[Any], Any], change: Callable[[Any], Any]) -> Iterator[None]:
    """Wrap the stations of loops and the replacement of masks in these while active."""
    functions = [(Loop, name, station) for name in STATIONS] + [(MaskSet, "replace", change)]
    originals = [getattr(owner, name) for owner, name, _ in functions]
    for (owner, name, wrap), original in zip(functions, originals, strict=True):
        setattr(owner, name, wrap(original))
    try:
        yield
    finally:
        for (owner, name, _), original in zip(functions, originals, strict=True):
            setattr(owner, name, original)
