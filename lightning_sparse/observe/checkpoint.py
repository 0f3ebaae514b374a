"""The best checkpoint among those that are as sparse as they are to be.

The only file of `observe` that touches private names of Lightning: it overrides `_save_topk_checkpoint` and
`_save_last_checkpoint`, because there is no hook between "a checkpoint is due" and "is it among the best".
"""

from __future__ import annotations

from typing import Any, Literal, final

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_sparse.loop.phase import phase_of
from lightning_sparse.loop.sparsifier import sparsifiers

__all__ = ["SparsityCheckpoint"]

Phase = Literal["dense", "sparsifying", "at target"]


@final
class SparsityCheckpoint(ModelCheckpoint):
    """`ModelCheckpoint` that chooses only among models at target sparsity, so the dense epoch is never the best.

    A model counts from the moment every method that promises a sparsity has reached it, and only by metrics measured since:
    by the latest validation, where there is one. All that it writes belongs to its phase, `last.ckpt` too: to resume from
    any moment add a plain `ModelCheckpoint(save_last=True)`, and for the best of other phases one of these for each.

    Args:
        phase: whose best is kept: `at target`, `dense`, or `sparsifying` in between.
        options: of `ModelCheckpoint`, such as `monitor`, `mode`, `save_top_k`, `dirpath`.

    Example:
        >>> SparsityCheckpoint(monitor="val/accuracy", mode="max").phase
        'at target'
    """

    def __init__(self, phase: Phase = "at target", **options: Any) -> None:
        phases = ("dense", "sparsifying", "at target")
        if phase not in phases:
            raise ValueError(f"phase={phase!r} is unknown; choose from {list(phases)}.")
        super().__init__(**options)
        self.phase = phase
        self._validated: str | None = None
        self._found = False

    @property
    def state_key(self) -> str:
        return f"{super().state_key}[{self.phase}]"

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._validated, self._found = None, bool(self.best_model_path)
        if phase_of(sparsifiers(trainer)) is None:
            rank_zero_warn(
                "SparsityCheckpoint: no method in this Trainer promises a sparsity, so every checkpoint counts as "
                f"'{self.phase}'."
            )

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._validated = phase_of(sparsifiers(trainer))
        super().on_validation_end(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if self.save_top_k != 0 and not self._found and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            rank_zero_warn(
                f"SparsityCheckpoint has saved nothing: the run was not '{self.phase}' when a checkpoint was due; train "
                "on, or end the schedule earlier."
            )

    def eligible(self, trainer: pl.Trainer) -> bool:
        """Whether the model, and the metrics that judge it, belong to this callback's phase."""
        phase = phase_of(sparsifiers(trainer))
        if phase is None:
            return True
        judged = self._validated if trainer.enable_validation else phase
        return phase == judged == self.phase

    def _save_topk_checkpoint(self, trainer: pl.Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        if self.eligible(trainer):
            self._found = True
            super()._save_topk_checkpoint(trainer, monitor_candidates)

    def _save_last_checkpoint(self, trainer: pl.Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        if self.eligible(trainer):
            super()._save_last_checkpoint(trainer, monitor_candidates)
