"""Detection as torchvision does it: losses in train mode, predictions in evaluation mode."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn


class Detector(nn.Module):
    """Images and boxes as lists; a dictionary of losses in train mode, else a list of detections."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5))
        self.head = nn.Linear(8, 4)

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        boxes = self.head(self.backbone(torch.stack(images)).mean((2, 3)))
        if not self.training:
            return [{"boxes": box[None]} for box in boxes]
        assert targets is not None
        return {"boxes": (boxes - torch.cat([target["boxes"] for target in targets])).abs().mean()}


class Detection(L.LightningModule):
    """Trains a detector as the tutorials do."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        losses = self.model(*batch)
        return sum(losses.values())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)
