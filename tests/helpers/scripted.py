"""A module that validates as it is told."""

from __future__ import annotations

from lightning_sparse.testing import Toy


class Scripted(Toy):
    """Validates as it is told, one value per validation, each a little worse than the one before."""

    def __init__(self) -> None:
        super().__init__()
        self.validations = 0

    def on_validation_epoch_end(self) -> None:
        self.validations += 1
        self.log("score", 1.0 / self.validations)
