"""A LightningModule around a network that predicts numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from lightning_sparse.core import check_whole
from lightning_sparse.models.checks import check_optimizer
from lightning_sparse.models.networks import MLP

__all__ = ["Regressor"]


def _adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=3e-3)


class Regressor(pl.LightningModule):
    """Mean squared error around any network; cosine over the run.

    Args:
        network: called with (num_classes, in_channels, image_size).
        num_classes: number of outputs; the command line takes it from the data.
        in_channels: number of inputs; the command line takes it from the data.
        image_size: 1, for inputs that are not images; the command line takes it from the data.
        optimizer: called with the parameters; default Adam with rate 3e-3.
        lr_scheduler: called with the optimizer and stepped per epoch; None is a cosine over the run, per step.
    """

    def __init__(
        self,
        network: Callable[[int, int, int], nn.Module] = MLP,
        num_classes: int = 1,
        in_channels: int = 10,
        image_size: int = 1,
        optimizer: OptimizerCallable = _adam,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("num_classes", num_classes), ("in_channels", in_channels), ("image_size", image_size)):
            check_whole(name, value, 1)
        check_optimizer(optimizer)
        self.network = network(num_classes, in_channels, image_size)
        self.make_optimizer, self.make_scheduler = optimizer, lr_scheduler

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.network(x)
        return out

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self._error(batch, "train")

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._error(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._error(batch, "test")

    def _error(self, batch: tuple[Tensor, Tensor], stage: str) -> Tensor:
        x, y = batch
        out = self(x)
        if y.shape != out.shape or not y.is_floating_point():
            raise ValueError(
                f"Regressor predicts numbers of shape {list(out.shape)}, but the targets are {y.dtype} of shape "
                f"{list(y.shape)}; use data with one number per output, or the model Classifier for classes."
            )
        loss = F.mse_loss(out, y)
        self.log(f"{stage}/loss", loss, prog_bar=stage == "val", batch_size=len(y), sync_dist=stage != "train")
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.parameters())
        if self.make_scheduler is not None:
            return {"optimizer": optimizer, "lr_scheduler": self.make_scheduler(optimizer)}
        schedule = LambdaLR(optimizer, self._cosine)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _cosine(self, step: int) -> float:
        if step == 0:  # querying the length now would load the data before the checkpoint
            return 1.0
        return (1 + math.cos(math.pi * min(1.0, step / self.trainer.estimated_stepping_batches))) / 2
