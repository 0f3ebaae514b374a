"""Classification in one small LightningModule."""

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
from torchmetrics.classification import MulticlassAccuracy

from lightning_sparse.core import check_whole
from lightning_sparse.models.checks import check_optimizer
from lightning_sparse.models.networks import ResNet

__all__ = ["Classifier"]

NetworkCallable = Callable[[int, int, int], nn.Module]


def _sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=5e-4)


class Classifier(pl.LightningModule):
    """Cross-entropy and accuracy around any network.

    Args:
        network: called with (num_classes, in_channels, image_size).
        num_classes: number of outputs; the command line takes it from the data.
        in_channels: channels of the images; the command line takes it from the data.
        image_size: height and width; the command line takes it from the data.
        optimizer: called with the parameters; default SGD with momentum 0.9, rate 0.1, weight decay 5e-4.
        lr_scheduler: called with the optimizer and stepped per epoch; None is a cosine over the run, per step.
        label_smoothing: label smoothing of the training loss.
        annealing: the fraction of the run after which the default cosine reaches zero; for a method that trains in rounds
            and rewinds the learning rate, the fraction of one round.
    """

    def __init__(
        self,
        network: NetworkCallable = ResNet,
        num_classes: int = 10,
        in_channels: int = 3,
        image_size: int = 32,
        optimizer: OptimizerCallable = _sgd,
        lr_scheduler: LRSchedulerCallable | None = None,
        label_smoothing: float = 0.0,
        annealing: float = 1.0,
    ) -> None:
        super().__init__()
        if num_classes == 1:
            raise ValueError(
                "num_classes=1 is regression, not classification; use the model Regressor, or data with classes."
            )
        for name, value in (("num_classes", num_classes), ("in_channels", in_channels), ("image_size", image_size)):
            check_whole(name, value, 2 if name == "num_classes" else 1)
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing={label_smoothing} must be in [0, 1): the share for the other classes.")
        check_optimizer(optimizer)
        self.network = network(num_classes, in_channels, image_size)
        self.make_optimizer, self.make_scheduler = optimizer, lr_scheduler
        self.label_smoothing, self.annealing = label_smoothing, annealing
        if not 0 < annealing <= 1:
            raise ValueError(f"annealing={annealing} must be a fraction of the run, above 0 and up to 1.")
        self.train_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.val_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(num_classes, average="micro")

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.network(x)
        return out

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        x, y = batch
        logits = self(x)
        loss = F.cross_entropy(logits, y, label_smoothing=self.label_smoothing)
        accuracy = self.train_accuracy(logits, y)
        self.log("train/loss", loss, batch_size=len(y))
        self.log("train/accuracy", self.train_accuracy, on_step=False, on_epoch=True, batch_size=len(y))
        return {"loss": loss, "accuracy": accuracy}

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "val", self.val_accuracy)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "test", self.test_accuracy)

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self(batch[0]).softmax(1)  # type: ignore[no-any-return]

    def _evaluate(self, batch: tuple[Tensor, Tensor], stage: str, accuracy: MulticlassAccuracy) -> None:
        x, y = batch
        logits = self(x)
        accuracy(logits, y)
        self.log(f"{stage}/loss", F.cross_entropy(logits, y), batch_size=len(y), sync_dist=True)
        self.log(f"{stage}/accuracy", accuracy, prog_bar=True, batch_size=len(y))

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.parameters())
        if self.make_scheduler is not None:
            return {"optimizer": optimizer, "lr_scheduler": self.make_scheduler(optimizer)}
        schedule = LambdaLR(optimizer, self._cosine)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _cosine(self, step: int) -> float:
        # The length is queried only after the first step: querying earlier would load the data before the checkpoint.
        if step == 0:
            return 1.0
        return (1 + math.cos(math.pi * min(1.0, step / (self.annealing * self.trainer.estimated_stepping_batches)))) / 2
