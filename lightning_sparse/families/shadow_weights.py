"""Methods whose optimizer moves dense weights while the model shows sparse ones."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_sparse.core import Remembered
from lightning_sparse.functional import apply_bits_, mask_bits, part_
from lightning_sparse.loop import Sparsifier, Step

__all__ = ["ShadowWeights"]


class ShadowWeights(Sparsifier):
    """The optimizer moves dense weights; everything else sees them masked.

    Between steps the model holds the kept entries, with exact zeros elsewhere, and `hidden` holds the others. Right before a
    step both are combined, and right after it they are separated by the current mask. So any other change to a kept weight
    between steps is preserved, and forward, backward, validation and checkpoints never see a dropped one (after a step that
    a gradient scaler skips, they are hidden again at the end of the batch). Gradients of dropped entries are removed (the
    chain rule through a mask). The optimizer's weight decay and moments still move them, as they would if the mask were part
    of the network.

    Runs at stations `before_step` and `after_step`. Costs about six passes over the weights per step, and one more copy of
    them in memory. During a step, `hidden` is free: a method may store there what it needs after the step, such as a
    gradient that must not be applied if the step is skipped.
    """

    hidden_dtype: torch.dtype = torch.float32
    """Precision of the dense values of dropped entries; those of the weights themselves are never narrowed."""

    hidden = Remembered[dict[str, Tensor]](dict, over="entries")
    """The dense values of dropped entries, zero where an entry is kept; in float32 or wider."""

    @abstractmethod
    def shown(self, name: str, dense: Tensor) -> Tensor:
        """The mask of a weight: True where the model shows its dense value. Called from `begin` on."""

    @property
    def dropped_live_on(self) -> bool:
        return True

    def begin(self) -> None:
        self.hidden = {
            name: torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, self.hidden_dtype))
            for name, weight in self.weights.items()
        }
        self.hide(self.weights)

    def resume(self) -> None:
        for name, weight in self.weights.items():
            self.hidden[name].masked_fill_(weight != 0, 0)  # the model's value wins, changed in the meantime or not
        self.take_in(self.weights)

    def reveal(self, weights: Mapping[str, nn.Parameter]) -> None:
        """Put the dense weights into the model; from then on `hidden` may be overwritten."""
        for name, weight in weights.items():
            weight.add_(self.hidden[name])  # exact: one of the two is zero

    def hide(self, weights: Mapping[str, nn.Parameter]) -> None:
        """Remove dropped entries from the model and from moving averages of it."""
        averages = self.run.averages()
        for name, weight in weights.items():
            bits = mask_bits(self.shown(name, weight))
            part_(weight, self.hidden[name], bits)
            for average in averages:
                apply_bits_(average[name], bits.to(average[name].device))

    def take_in(self, weights: Mapping[str, nn.Parameter]) -> None:
        """Update the model to masks that have changed, or to weights that were changed from outside."""
        self.reveal(weights)
        self.hide(weights)

    def before_step(self, step: Step) -> None:
        self.reveal(step.weights)

    def silence(self, step: Step) -> None:
        if step.gradient_scale is not None:
            self.run.unscale(step.optimizer)  # otherwise infinities in removed gradients that were read would not be found
        for name, weight in step.weights.items():
            if weight.grad is not None:
                apply_bits_(weight.grad, mask_bits(self.shown(name, weight)))

    def after_step(self, step: Step) -> None:
        self.hide(step.weights)

    def after_unseen_step(self, step: Step) -> None:
        self.take_in(step.weights)

    def undo_step(self, step: Step) -> None:
        self.hide(step.weights)
