"""Methods that own masks: silence before the step, project after it, keep the optimizer's memory clean."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lightning_sparse.core import MaskSet, Remembered, clear_moments
from lightning_sparse.loop import Sparsifier, Step

__all__ = ["Masked"]


class Masked(Sparsifier):
    """A method that holds weights at exact zeros through masks.

    At stations `silence` and `project`, at the cost of two passes over the weights per step. Pruned entries have zero
    weight, zero gradient into the optimizer and zero optimizer moments from the moment they are pruned; an entry that
    comes back starts with zero moments.
    """

    masks = Remembered(MaskSet)

    @property
    def mask_set(self) -> MaskSet | None:
        return self.masks

    @property
    def clears_moments(self) -> bool:
        return self.mask_set is not None

    def begin(self) -> None:
        self.masks = MaskSet(self.weights)

    def resume(self) -> None:
        self.masks.apply_(self.weights)

    def set_masks(self, masks: Mapping[str, Tensor]) -> None:
        """Exchange masks, and bring weights, moments and moving averages in line.

        Args:
            masks: by name; True = kept. Masks left out stay.
        """
        weights, mine = self.weights, self.masks
        unsettled = mine.replace(masks)
        for optimizer in self.run.optimizers:
            for name, entries in unsettled.items():
                clear_moments(optimizer, weights[name], entries)
        for copy in (weights, *self.run.averages()):
            mine.apply_({name: copy[name] for name in unsettled})
        for name, kept in mine.counts.items():
            if kept == 0 and name in unsettled:
                self.warn_of_empty(name, "Use a lower sparsity, allocation='erk', or give the layer its own layer_sparsity.")

    def clean(self) -> None:
        """Weights and moments may have come back from elsewhere; bring all of them in line."""
        self.masks.apply_(self.weights)
        for optimizer in self.run.optimizers:
            for name, weight in self.weights.items():
                clear_moments(optimizer, weight, self.masks.dropped(name))

    def silence(self, step: Step) -> None:
        self.masks.apply_({name: weight.grad for name, weight in step.weights.items()})

    def after_unseen_step(self, step: Step) -> None:
        for name, weight in step.weights.items():
            clear_moments(step.optimizer, weight, self.masks.dropped(name))

    def project(self, step: Step) -> None:
        self.masks.apply_(step.weights)
