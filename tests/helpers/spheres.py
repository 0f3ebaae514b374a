"""What tests of the Lp sphere share."""

from __future__ import annotations

import lightning as L
import torch

from lightning_sparse.data import Digits
from lightning_sparse.models import MLP, Classifier
from lightning_sparse.testing import trainer

SPHERES = ["net.0.weight", "net.2.weight", "net.6.weight"]  # the last layer of the toy is free


def digits(epochs: int, *callbacks: L.Callback) -> Classifier:
    torch.manual_seed(0)
    data = Digits(batch_size=50)
    module = Classifier(
        lambda *shape: MLP(*shape, hidden=(64, 64), batch_norm=True),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
        in_channels=1,
        image_size=8,
    )
    trainer(*callbacks, max_epochs=epochs, limit_val_batches=0).fit(module, data)
    return module
