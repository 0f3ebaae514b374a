"""The metric that a user asks for: a metric that is never logged is refused as early as possible."""

from __future__ import annotations

import difflib
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_sparse.loop.dry_run import dry_run, take_step
from lightning_sparse.loop.sparsifier import sparsifiers

__all__ = ["AskedMetric"]

HOOKS = (
    *("on_fit_start", "on_train_start", "on_train_epoch_start", "on_train_epoch_end", "on_train_batch_start"),
    *("on_train_batch_end", "on_before_backward", "on_after_backward", "on_before_zero_grad", "on_before_optimizer_step"),
    *("optimizer_step", "backward"),
)
"""Hooks in which a module may log besides its validation and its `training_step`."""

LOG_NO_METRIC = (
    *("lightning_sparse.", "lightning.pytorch.cli", "lightning.pytorch.callbacks.progress"),
    *("lightning.pytorch.callbacks.model_checkpoint", "lightning.pytorch.callbacks.model_summary"),
    *("lightning.pytorch.callbacks.rich_model_summary", "lightning.pytorch.callbacks.early_stopping"),
)
"""Modules of callbacks that log no metrics."""


class AskedMetric:
    """Tracks what has been logged so far.

    The validation that Lightning runs before training shows what validation logs, and one step on a copy that logs nothing
    shows what training logs. If nothing else could log a metric, that is enough to refuse before the first step; otherwise
    after the first epoch.

    Args:
        name: name of the metric; None requests nothing.
        argument: who asks, and with which argument.
    """

    def __init__(self, name: str | None, argument: str = "SparsityMonitor: metric") -> None:
        self.name, self.argument = name, argument
        self._known: set[str] = set()
        self._validated = self._tried = False

    def begin(self) -> None:
        """Forget a previous run."""
        self._known, self._validated, self._tried = set(), False, False

    def after_validation(self, trainer: pl.Trainer) -> None:
        """Record what a validation logged, including the one before training."""
        self._known |= set(trainer.callback_metrics)
        self._validated = True

    def before_training(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> None:
        """Refuse a metric that nothing here could log; to be called at every batch, only the first call counts.

        Raises:
            ValueError: naming what is logged.
        """
        first, self._tried = not self._tried, True
        if not first or self._is_logged(trainer) or not (self._validated or not trainer.enable_validation):
            return
        others = [c for c in trainer.callbacks if not type(c).__module__.startswith(LOG_NO_METRIC)]  # type: ignore[attr-defined]
        if others or any(is_overridden(hook, module) for hook in HOOKS):
            return
        try:
            self._known |= _logged_by_a_step(trainer, module, batch)
        except Exception:  # training itself will raise it
            return
        if not self._is_logged(trainer):
            raise self._refusal()

    def after_epoch(self, trainer: pl.Trainer) -> None:
        """Refuse a metric that was not logged in a whole epoch and its validation.

        Raises:
            ValueError: naming what is logged.
        """
        if not self._tried or self._is_logged(trainer) or not (self._validated or not trainer.enable_validation):
            return
        raise self._refusal()

    def _is_logged(self, trainer: pl.Trainer) -> bool:
        self._known |= set(trainer.callback_metrics)
        ours = [method.label for method in sparsifiers(trainer)]
        return self.name is None or self.name in self._known or self.name.partition("/")[0] in ours

    def _refusal(self) -> ValueError:
        names = sorted(name for name in self._known if not name.startswith("sparsity"))
        near = difflib.get_close_matches(str(self.name), names, n=1, cutoff=0.6)
        remedy = f"did you mean '{near[0]}'?" if near else f"choose from {names}." if names else "nothing is logged here."
        return ValueError(f"{self.argument}='{self.name}' is not logged; {remedy}")


def _logged_by_a_step(trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> set[str]:
    names: set[str] = set()

    def log(name: str, *args: Any, **options: Any) -> None:
        names.update((name, f"{name}_step", f"{name}_epoch"))

    def log_dict(values: Any, *args: Any, **options: Any) -> None:
        for name in values:
            log(name)

    with dry_run(trainer, module) as twin, trainer.precision_plugin.train_step_context():
        vars(twin).update(log=log, log_dict=log_dict)
        take_step(twin, batch, 0)
    return names
