"""A heat map of the similarity of layers on the validation data."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lightning_sparse.core import FeatureTap, feature_layers
from lightning_sparse.functional import off_diagonal_mean
from lightning_sparse.metrics import CKA

__all__ = ["SimilarityMap"]


class SimilarityMap(Callback):
    """Log the similarity of all pairs of layers after validation: a heat map, and the mean over pairs as `similarity`.

    Weights & Biases and TensorBoard get the figure; loggers that only have a folder get it as a file.

    Args:
        layers: patterns that select the layers; None finds blocks, see `core.feature_layers`.
        batches: number of batches used, from the first validation set.
        figure: False logs only the mean, which needs no matplotlib.

    Raises:
        ValueError: at the start, if there are fewer than two layers, or matplotlib is missing.
    """

    def __init__(self, layers: str | Sequence[str] | None = None, batches: int = 8, figure: bool = True) -> None:
        if batches < 1:
            raise ValueError(f"batches={batches} must be at least 1.")
        self.layers, self.batches, self.figure = layers, batches, figure
        self.history: list[float] = []
        """The mean similarity after each validation."""
        self.metric: CKA | None = None
        self._tap: FeatureTap | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self.figure and find_spec("matplotlib") is None:
            raise ValueError("SimilarityMap draws with matplotlib, which is not installed; install it, or set figure=False.")

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        patterns = [self.layers] if isinstance(self.layers, str) else self.layers
        found = feature_layers(pl_module, patterns)
        self._tap = FeatureTap(found, grad=False)
        self.metric = CKA([layer.name for layer in found]).to(pl_module.device)

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self._tap is not None:
            self._tap.open = batch_idx < self.batches and dataloader_idx == 0

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if self._tap is None or self.metric is None or not self._tap.open:
            return
        seen = self._tap.take()
        names = [layer.name for layer, _ in seen]
        if names != self.metric.names:  # a layer of an auxiliary branch may never be called here
            if self.metric.update_called or len(names) < 2:
                return
            self.metric = CKA(names).to(pl_module.device)
        self.metric.update([feature for _, feature in seen])

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._tap is None or self.metric is None:
            return
        self._close()
        if not self.metric.update_called:
            return
        matrix = self.metric.compute()
        mean = off_diagonal_mean([matrix])
        self.history.append(float(mean))
        pl_module.log("similarity", mean)
        if self.figure and trainer.is_global_zero and trainer.loggers:
            self._log_figure(trainer, matrix)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self._tap is not None:
            self._tap.remove()
        self._tap = None

    def _log_figure(self, trainer: pl.Trainer, matrix: Tensor) -> None:
        assert self.metric is not None
        figure, _ = self.metric.plot(matrix)
        loggers: list[Any] = list(trainer.loggers)  # loggers differ in what they can do
        for logger in loggers:
            if hasattr(logger, "log_image"):
                logger.log_image("similarity", [figure])
            elif hasattr(logger.experiment, "add_figure"):
                logger.experiment.add_figure("similarity", figure, trainer.global_step)
            elif logger.log_dir:
                folder = Path(logger.log_dir) / "similarity"
                folder.mkdir(parents=True, exist_ok=True)
                figure.savefig(folder / f"step={trainer.global_step}.png", dpi=150)
