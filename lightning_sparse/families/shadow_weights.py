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
    """The optimizer moves dense weights; before its step and after it, all others see them masked.

    Between steps the model holds the kept entries, with exact zeros elsewhere, and `hidden` holds the others. Right before a
    step the two are put together, right after it they are taken apart by the mask as it is then. So whatever else changes
    a kept weight between steps is honored, and forward, backward, validation and checkpoints never see a dropped one (after
    a step that a gradient scaler skips, they are hidden again at the end of the batch).
    Gradients of dropped entries are removed (the chain rule through a mask); the optimizer's weight decay and moments still
    move them, as they would if the mask were part of the network.

    At stations `before_step` and `after_step`, at the cost of some six passes over the weights per step, and of one more
    copy of them in memory. In between, `hidden` is free: a method may keep there what it must carry over the step, such as
    a gradient that is not to be applied if the step is skipped.
    """

    hidden_dtype: torch.dtype = torch.float32
    """Of the dense values of dropped entries; those of the weights themselves are never narrowed."""

    hidden = Remembered[dict[str, Tensor]](dict, over="entries")
    """The dense values of dropped entries, zero where an entry is kept; in float32 or wider."""

    @abstractmethod
    def shown(self, name: str, dense: Tensor) -> Tensor:
        """The mask of a weight: True where the model is to show its dense value. Asked from `begin` on."""

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
            self.hidden[name].masked_fill_(weight != 0, 0)  # what the model shows counts, changed meanwhile or not
        self.take_in(self.weights)

    def reveal(self, weights: Mapping[str, nn.Parameter]) -> None:
        """Put the dense weights into the model; from then on `hidden` may be overwritten."""
        for name, weight in weights.items():
            weight.add_(self.hidden[name])  # exact: one of the two is zero

    def hide(self, weights: Mapping[str, nn.Parameter]) -> None:
        """Take dropped entries out of the model, and out of moving averages of it."""
        averages = self.run.averages()
        for name, weight in weights.items():
            bits = mask_bits(self.shown(name, weight))
            part_(weight, self.hidden[name], bits)
            for average in averages:
                apply_bits_(average[name], bits.to(average[name].device))

    def take_in(self, weights: Mapping[str, nn.Parameter]) -> None:
        """Bring the model in line with masks that have changed, or with weights that have been moved from outside."""
        self.reveal(weights)
        self.hide(weights)

    def before_step(self, step: Step) -> None:
        self.reveal(step.weights)

    def silence(self, step: Step) -> None:
        if step.gradient_scale is not None:
            self.run.unscale(step.optimizer)  # or infinities in what is removed, and was read, would not be found
        for name, weight in step.weights.items():
            if weight.grad is not None:
                apply_bits_(weight.grad, mask_bits(self.shown(name, weight)))

    def after_step(self, step: Step) -> None:
        self.hide(step.weights)

    def after_unseen_step(self, step: Step) -> None:
        self.take_in(step.weights)

    def undo_step(self, step: Step) -> None:
        self.hide(step.weights)
