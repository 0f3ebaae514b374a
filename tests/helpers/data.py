"""Data of several kinds, and a module that notices whoever else goes through them."""

from __future__ import annotations

import random
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_sparse.testing import Toy, loader, trainer


class Talkative(Toy):
    """Logs, keeps metrics and buffers, draws random numbers, looks at its trainer."""

    def __init__(self) -> None:
        super().__init__(
            net=nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 4))
        )
        self.accuracy = MulticlassAccuracy(4)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.accuracy(self.net(batch[0]), batch[1])
        torch.rand(3), np.random.rand(2), random.random()
        self.log("loss", loss, batch_size=8)
        self.log_dict({"accuracy": self.accuracy}, batch_size=8)
        return {"loss": loss, "epoch": self.current_epoch, "trainer": self.trainer.max_epochs}


def run(module: L.LightningModule, data: Any, *callbacks: L.Callback, **options: Any) -> dict[str, Any]:
    """Two epochs: what is learned, what is logged, and which random numbers come next."""
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    runner = trainer(*callbacks, max_epochs=2, **options)
    runner.fit(module, data() if callable(data) else data, loader(1))
    return {
        "weights": {name: value.clone() for name, value in module.state_dict().items()},
        "logged": {name: float(value) for name, value in runner.callback_metrics.items()},
        "random": (torch.rand(1).item(), np.random.rand(), random.random()),
    }


def ordinary(workers: int = 0) -> DataLoader[Any]:
    data = TensorDataset(torch.rand(32, 1, 8, 8), torch.randint(0, 4, (32,)))
    return DataLoader(data, 8, shuffle=True, num_workers=workers, persistent_workers=workers > 0)


def with_generator() -> DataLoader[Any]:
    data = TensorDataset(torch.rand(32, 1, 8, 8), torch.randint(0, 4, (32,)))
    return DataLoader(data, 8, shuffle=True, generator=torch.Generator().manual_seed(3))


DATA = {"resumable": loader, "ordinary": ordinary, "workers": lambda: ordinary(1), "own generator": with_generator}
