"""For modules that need to access the methods that act on them."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_sparse.core import format_table
from lightning_sparse.loop.privates import trainer_of
from lightning_sparse.loop.sparsifier import Sparsifier, sparsifiers

__all__ = ["SparsityMixin"]


class SparsityMixin:
    """Give a LightningModule its own `sparsity_penalty()` and `sparsity_summary()`.

    In manual optimization no callback can change the loss, so methods that penalize features need this line:

        class Net(SparsityMixin, LightningModule):
            def training_step(self, batch, batch_idx):
                loss = ... + self.sparsity_penalty()
                self.manual_backward(loss)

    With automatic optimization the same line is allowed and counts once. Penalties on weights need no such line: they enter
    as gradients.
    """

    def sparsity_penalty(self) -> Tensor:
        """The sum of all feature penalties of this batch; zero if there are none."""
        loop = next((method.loop for method in self._methods() if method.loop is not None), None)
        penalty = None if loop is None else loop.hand_over_penalty()
        if penalty is not None:
            return penalty
        return torch.zeros((), device=self.device)  # type: ignore[attr-defined]

    def sparsity_summary(self) -> str:
        """A table of kept weights per layer, for the methods of the attached Trainer that own masks."""
        rows = []
        for method in self._methods():
            if method.mask_set is not None and len(method.mask_set):
                rows += method.summary()
        return format_table(rows)

    def _methods(self) -> list[Sparsifier]:
        trainer = trainer_of(self)
        return [] if trainer is None else sparsifiers(trainer)
