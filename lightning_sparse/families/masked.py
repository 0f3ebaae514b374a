"""Methods with masks: hide gradients before the step, project after it, keep optimizer state clean."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_sparse.core import MaskSet, Mold, Remembered, clear_moments
from lightning_sparse.families.watch import Watch
from lightning_sparse.loop import Run, Sparsifier, Step

__all__ = ["Masked"]


class Masked(Sparsifier):
    """A method that holds weights at exact zeros through masks.

    Runs at station `silence`, at the cost of one pass over the gradients per step. Pruned entries have zero weight, zero
    gradient for the optimizer and zero optimizer moments from the moment they are pruned; an entry that returns starts with
    zero moments. Nearly every optimizer leaves such entries alone. If one does not, or something else writes to the weights,
    station `project` resets them, which costs a second pass (see `Watch`).
    """

    masks = Remembered(MaskSet)

    def __init__(self, *, targets: str | Sequence[str] = ("*",), name: str | None = None) -> None:
        super().__init__(targets=targets, name=name)
        self.watch = Watch()
        self._molds: dict[tuple[int, int], Mold] = {}

    @property
    def mask_set(self) -> MaskSet | None:
        return self.masks

    @property
    def clears_moments(self) -> bool:
        return self.mask_set is not None

    def enter(self, run: Run) -> None:
        super().enter(run)
        self.watch = Watch()
        self._molds.clear()

    def leave(self) -> None:
        super().leave()
        self._molds.clear()

    def begin(self) -> None:
        self.masks = MaskSet(self.weights)

    def resume(self) -> None:
        self.masks.apply_(self.weights)

    def set_masks(self, masks: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> None:
        """Replace masks, and update weights, moments and moving averages to match.

        Args:
            masks: True = kept. By name, or pairs of name and mask, which may be generated one by one, so that the new masks
                of a network are never in memory together. Omitted masks stay.
        """
        copies, before = (self.weights, *self.run.averages()), self.masks.counts
        self._molds.clear()  # they hold the old masks
        self.masks.replace(masks, lambda name, entries: self.bring_in_line(name, entries, copies))
        for name, kept in self.masks.counts.items():
            if kept == 0 and before[name]:
                self.warn_of_empty(name, "Use a lower sparsity, allocation='erk', or give the layer its own layer_sparsity.")

    def bring_in_line(self, name: str, entries: Tensor, copies: Sequence[Mapping[str, nn.Parameter]]) -> None:
        """A weight has a new mask: set its dropped entries and their optimizer state to zero.

        Args:
            name: name of the weight.
            entries: True = not kept before and after.
            copies: the weights by name, and those of moving averages.
        """
        for optimizer in self.run.optimizers:
            clear_moments(optimizer, copies[0][name], entries)
        for copy in copies:
            self.masks.apply_({name: copy[name]})

    def clean(self) -> None:
        """Reset all pruned entries: weights and moments may have been restored from elsewhere."""
        self.masks.apply_(self.weights)
        for optimizer in self.run.optimizers:
            for name, weight in self.weights.items():
                clear_moments(optimizer, weight, self.masks.dropped(name))

    def silence(self, step: Step) -> None:
        self._mold(step).press_gradients()
        if not self.watch.moved and self.watch.written(step):
            self.watch.distrust(step.optimizer)

    def after_unseen_step(self, step: Step) -> None:
        self.watch.distrust(step.optimizer)
        for name, weight in step.weights.items():
            clear_moments(step.optimizer, weight, self.masks.dropped(name))

    def project(self, step: Step) -> None:
        watch = self.watch
        if watch.moved:
            self._mold(step).press_weights()
        elif not watch.trusts(step, self.masks.changes):
            self._look(step.weights, f"{type(step.optimizer).__name__} (or something else that writes to the weights)")
            watch.trust(step, self.masks.changes)
        elif self.steps % self.run.log_interval == 0:
            self._look(watch.sample(step.weights), type(step.optimizer).__name__)
        watch.note(step)

    def settle(self) -> None:
        self._look(self.weights, "Something outside the optimizer's step")

    def _mold(self, step: Step) -> Mold:
        key = id(step.optimizer), len(step.weights)
        mold = self._molds.get(key)
        if mold is None or mold.changes != self.masks.changes:
            mold = self._molds[key] = Mold(self.masks, step.weights)
        return mold

    def _look(self, weights: Mapping[str, nn.Parameter], who: str) -> None:
        """Check that pruned entries are zero; if not, reset all of them, now and after every later step."""
        name = self.masks.astray(weights)
        if name is None:
            return
        self.masks.apply_(self.weights)
        if not self.watch.moved:
            self.watch.moved = True
            rank_zero_info(f"{self.label}: {who} moves pruned entries of '{name}'; they are put back after every step.")
