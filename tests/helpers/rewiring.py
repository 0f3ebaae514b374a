"""What tests of dynamic sparse training share."""

from __future__ import annotations

from typing import Any

import lightning as L
from torch import Tensor

from lightning_sparse import SET, GraNet, RigL
from lightning_sparse.families import Masked, Rewiring
from lightning_sparse.testing import BATCHES

STEPS = 3 * BATCHES
METHODS: dict[str, type[Rewiring]] = {"SET": SET, "RigL": RigL, "GraNet": GraNet}


class Diary(L.Callback):
    """Masks after every batch."""

    def __init__(self, method: Masked) -> None:
        self.method = method
        self.first: dict[str, Tensor] = {}
        self.masks: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, *args: Any) -> None:
        self.masks.append({name: self.method.masks[name] for name in self.method.masks})

    def on_train_batch_start(self, *args: Any) -> None:
        self.first = self.first or {name: self.method.masks[name] for name in self.method.masks}

    def changes(self) -> list[int]:
        """The batches, from 1, after which masks were others than after the one before."""
        pairs = zip(self.masks, self.masks[1:], strict=False)
        return [i + 2 for i, (old, new) in enumerate(pairs) if any(not new[name].equal(old[name]) for name in old)]
