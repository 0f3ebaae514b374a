"""The best checkpoint among those that have reached the target sparsity.

The only file of `observe` that uses private names of Lightning. It overrides `_save_topk_checkpoint` and
`_save_last_checkpoint`, because there is no hook between "a checkpoint is due" and "is it among the best", and
`_find_last_checkpoints`, because Lightning takes the newest file for `ckpt_path="last"` without reading it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, final

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_sparse.loop.phase import phase_of
from lightning_sparse.loop.sparsifier import sparsifiers
from lightning_sparse.observe.asked import AskedMetric
from lightning_sparse.observe.checkpoint_io import newest_readable, why_unreadable

__all__ = ["SparsityCheckpoint"]

OWN = ("epoch", "step")
"""What `ModelCheckpoint` can monitor without a log."""

Phase = Literal["dense", "sparsifying", "at target"]


@final
class SparsityCheckpoint(ModelCheckpoint):
    """`ModelCheckpoint` that selects only among models at target sparsity, so a dense epoch is never the best.

    A model counts once every method with a target sparsity has reached it, and only by metrics measured since then: by the
    latest validation, if there is one. Everything it writes belongs to its phase, including `last.ckpt`. To resume from any
    point add a plain `ModelCheckpoint(save_last=True)`; for the best of other phases add one `SparsityCheckpoint` for each.

    When a run is resumed, files that a kill or a full disk has corrupted are named and skipped: `ckpt_path="last"` uses the
    newest readable file, and the best is chosen among the readable ones. (`AtomicCheckpointIO` leaves no corrupt files.)

    Args:
        phase: the phase whose best model is kept: `at target`, `dense`, or `sparsifying` in between.
        options: options of `ModelCheckpoint`, such as `monitor`, `mode`, `save_top_k`, `dirpath`.

    Raises:
        ValueError: if `monitor` is never logged (before the first step, or after the first epoch if that could not be known
            earlier).

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
        self._asked = AskedMetric(None if self.monitor in OWN else self.monitor, "SparsityCheckpoint: monitor")

    @property
    def state_key(self) -> str:
        return f"{super().state_key}[{self.phase}]"

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if not _can_be_read(self.best_model_path):
            self.best_model_path, self.best_model_score = "", None
        self.best_k_models = {path: score for path, score in self.best_k_models.items() if _can_be_read(path)}
        if self.best_k_models:
            best, worst = (max, min) if self.mode == "max" else (min, max)
            self.best_model_path = best(self.best_k_models, key=self.best_k_models.__getitem__)
            self.best_model_score = self.best_k_models[self.best_model_path]
            self.kth_best_model_path = worst(self.best_k_models, key=self.best_k_models.__getitem__)
            self.kth_value = self.best_k_models[self.kth_best_model_path]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._asked.begin()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._validated, self._found = None, bool(self.best_model_path)
        if phase_of(sparsifiers(trainer)) is None:
            rank_zero_warn(
                "SparsityCheckpoint: no method in this Trainer promises a sparsity, so every checkpoint counts as "
                f"'{self.phase}'."
            )

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._asked.before_training(trainer, pl_module, batch)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_epoch_start(trainer, pl_module)
        self._asked.after_epoch(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._asked.after_validation(trainer)
        self._validated = phase_of(sparsifiers(trainer))
        super().on_validation_end(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        try:
            self._asked.after_epoch(trainer)
        except ValueError as error:  # the only epoch is over, and its results stay
            rank_zero_warn(str(error))
            return
        if self.save_top_k != 0 and not self._found and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            rank_zero_warn(
                f"SparsityCheckpoint has saved nothing: the run was not '{self.phase}' when a checkpoint was due; train "
                "longer, or end the schedule earlier."
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

    def _find_last_checkpoints(self, trainer: pl.Trainer) -> set[str]:
        found = super()._find_last_checkpoints(trainer)
        whole = {path for path in found if _can_be_read(path)}
        before = None if whole or not found else newest_readable(Path(next(iter(found))).parent, leave_out=found)
        return whole if before is None else {str(before)}


def _can_be_read(path: str) -> bool:
    """Whether a checkpoint can be read; warns if not. Paths that are not local are accepted as they are."""
    if not path or "://" in path or (reason := why_unreadable(path)) is None:
        return bool(path)
    if Path(path).exists():  # otherwise a better one has replaced it
        rank_zero_warn(f"SparsityCheckpoint: '{path}' cannot be read as a checkpoint ({reason}) and is skipped.")
    return False
