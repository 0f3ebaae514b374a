"""Methods that own masks: silence before the step, project after it, keep the optimizer's memory clean."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_sparse.callbacks.base import Sparsifier
from lightning_sparse.callbacks.stations import Step
from lightning_sparse.core import Budget, MaskSet, Remembered, clear_moments

__all__ = ["Masked"]


class Masked(Sparsifier):
    """A method that holds weights at exact zeros through masks.

    At stations `silence` and `project`, at the cost of two passes over the weights per step. Pruned entries have zero
    weight, zero gradient into the optimizer and zero optimizer moments from the moment they are pruned; an entry that
    comes back starts with zero moments.
    """

    masks = Remembered(MaskSet)

    @abstractmethod
    def target_counts(self) -> tuple[int | None, dict[str, int]]:
        """What `goal` holds, for the chosen weights."""

    @property
    def mask_set(self) -> MaskSet | None:
        return self.masks

    def begin(self) -> None:
        self.masks = MaskSet(self.weights)
        total, layers = self.target_counts()
        self.goal = {"total": total, "layers": layers}

    def resume(self) -> None:
        self.masks.apply_(self.weights)

    def set_masks(self, masks: Mapping[str, Tensor]) -> None:
        """Exchange masks, and bring weights, moments and moving averages in line.

        Args:
            masks: by name; True = kept. Masks left out stay.
        """
        weights = self.weights
        changed = {}
        for name, mask in masks.items():
            unsettled = self.masks.dropped(name) | ~mask  # all but what was kept and stays kept
            if not mask.equal(self.masks[name]):
                changed[name] = mask
                for optimizer in self.stations.trainer.optimizers:
                    clear_moments(optimizer, weights[name], unsettled)
        self.masks.replace(changed)
        self.masks.changed = True  # also where nothing has changed: all ranks must come to the comparison together
        self.masks.apply_({name: weights[name] for name in changed})
        for average in self.stations.averages():
            self.masks.apply_({name: average[name] for name in changed})
        for name in changed:
            if self.masks.counts[name] == 0:
                rank_zero_warn(
                    f"{self.label} has removed all of '{name}'; signals no longer pass this layer. Use a lower sparsity, "
                    "allocation='erk', or give the layer its own layer_sparsity."
                )

    def prune(self, budget: Budget, sparsity: float, score: Callable[[str, Tensor], Tensor]) -> None:
        """Remove the lowest scores until exactly this fraction is removed; entries removed before come first.

        Args:
            budget: shares the sparsity among layers.
            sparsity: the fraction removed after this.
            score: of a weight, by name; higher survives.
        """
        scores = [
            score(name, weight).masked_fill(self.masks.dropped(name), -torch.inf) for name, weight in self.weights.items()
        ]
        masks = budget.masks(self.chosen, scores, sparsity, list(self.masks.counts.values()))
        self.set_masks(dict(zip(self.weights, masks, strict=True)))

    def silence(self, step: Step) -> None:
        self.masks.apply_({name: weight.grad for name, weight in step.weights.items()})

    def after_unseen_step(self, step: Step) -> None:
        for name, weight in step.weights.items():
            clear_moments(step.optimizer, weight, self.masks.dropped(name))

    def project(self, step: Step) -> None:
        self.masks.apply_(step.weights)
