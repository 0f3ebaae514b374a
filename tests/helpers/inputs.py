"""What reaches the layers of the toy, layer by layer."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_sparse.testing import fit, loader

LAYERS = {"net.0.weight": 0, "net.2.weight": 2, "net.6.weight": 6, "net.8.weight": 8}


def batches(count: int) -> Tensor:
    """The images of the first batches."""
    return torch.cat([x for x, _ in itertools.islice(loader(), count)])


def inputs(net: nn.Sequential, x: Tensor) -> dict[str, Tensor]:
    """What each layer sees in evaluation mode, as rows: one per sample, or per place of a convolution."""
    net, found = copy.deepcopy(net).eval(), {}
    with torch.no_grad():
        for index, layer in enumerate(net):
            if isinstance(layer, nn.Conv2d):
                patches = F.unfold(x, layer.kernel_size, padding=layer.padding, stride=layer.stride)
                found[f"net.{index}.weight"] = patches.transpose(1, 2).flatten(0, 1)
            elif isinstance(layer, nn.Linear):
                found[f"net.{index}.weight"] = x
            x = layer(x)
    return found


class Note(L.Callback):
    """Weights before the first step."""

    def on_train_batch_start(self, trainer: Any, module: Any, *args: Any) -> None:
        if trainer.global_step == 0:
            self.weights = {name: value.detach().clone() for name, value in module.named_parameters()}


def solved(method: L.Callback, module: L.LightningModule) -> dict[str, Tensor]:
    """The weights as a method that prunes before the first step leaves them."""
    note = Note()
    fit(module, method, note, max_epochs=1)
    return note.weights
